"""What fused ONNX exports did wrong once: graphs that ended the process, blocks that were none, misread sizes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import mvkernels
from mvkernels import export
from mvkernels.commands import cli
from mvkernels.dispatch import extension
from mvkernels.report import UsageError

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.skipif(extension.module is None, reason="the C++ kernels are not built")

if extension.module is not None:
    from tests.export.onnx_nodes import model_of, session

SIZES = {"expand": (16, 8, 1, 1), "depthwise": (16, 1, 3, 3), "project": (8, 16, 1, 1)}


def block_of(stride: int = 1, **sizes: tuple[int, ...]) -> Any:
    """A graph with an inverted residual alone, with weights of these sizes."""
    weights = {name: np.ones(shape, np.float32) for name, shape in {**SIZES, **sizes}.items()}
    names = ["x", "expand", "", "depthwise", "", "project", ""]
    attributes = {"stride": stride, "activation": 1, "residual": 0}
    return model_of("inverted_residual", {"x": np.empty((1, 6, 6, 8))}, names, attributes, weights)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stride": 0}, "the stride is neither 1 nor 2"),
        ({"stride": 3}, "the stride is neither 1 nor 2"),
        ({"expand": (16, 0, 1, 1)}, "expand has no elements"),
        ({"depthwise": (16, 1, 0, 0)}, "depthwise has no elements"),
        ({"project": (0, 16, 1, 1)}, "project has no elements"),
        ({"expand": (0, 8, 1, 1), "depthwise": (0, 1, 3, 3), "project": (8, 0, 1, 1)}, "expand has no elements"),
        ({"depthwise": (16, 1, 7, 7)}, "the kernel is neither 3 nor 5"),
    ],
    ids=str,
)
def test_a_block_that_cannot_be_run_is_refused_when_the_session_is_made(change: dict[str, Any], message: str) -> None:
    with pytest.raises(Exception, match=f"mvkernels: inverted_residual: .*{message}"):
        session(block_of(**change))


def test_a_block_that_can_be_run() -> None:
    (out,) = session(block_of()).run(None, {"x": np.ones((1, 6, 6, 8), np.float32)})
    assert out.shape == (1, 6, 6, 8) and out[0, 2, 2, 0] == 16 * 9 * 8


class Block(nn.Module):
    """An inverted residual that would become a node, and a place in it for more."""

    def __init__(self, stride: int = 1) -> None:
        super().__init__()
        self.expand = nn.Sequential(nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16), nn.Hardswish())
        self.depthwise = nn.Sequential(nn.Conv2d(16, 16, 3, stride, 1, groups=16), nn.Hardswish())
        self.project = nn.Conv2d(16, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(self.depthwise(self.expand(x)))


class InputViewChanged(Block):
    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        out = super().forward(x)
        x[:, :4].mul_(3.0)
        return out + x


class HiddenViewChanged(Block):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.expand(x)
        hidden[:, :4].mul_(3.0)
        return self.project(self.depthwise(hidden)) + x


class StatisticsViewChanged(Block):
    def forward(self, x: Tensor) -> Tensor:
        self.expand[1].running_mean[:4].add_(5.0)
        return super().forward(x)


class StridedWithASum(Block):
    def __init__(self) -> None:
        super().__init__(2)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[:, :, :1, :1]) + x[:, :, :1, :1]


class WithASizeOfData(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x[x > 0].sum()


class ChangedUnderAutocast(Block):
    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        out = super().forward(x)
        with torch.autocast("cpu", enabled=False):
            x[:, :4].mul_(3.0)
        return out + x


class InputChangedBefore(Block):
    """This one is a block: what it reads is not changed while it runs."""

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        x[:, :4].mul_(3.0)
        return super().forward(x) + x


@pytest.mark.parametrize(
    ("make", "nodes"),
    [
        (Block, 1),
        (InputViewChanged, 0),
        (HiddenViewChanged, 0),
        (StatisticsViewChanged, 0),
        (InputChangedBefore, 1),
        (WithASizeOfData, 1),
        (ChangedUnderAutocast, 0),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_what_is_changed_in_place_through_a_view(make: Any, nodes: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    found = export.export_model(make(), torch.randn(1, 8, 6, 6), "onnx", tmp_path / "m.onnx", fused=True)
    assert found.ok and found.details["fused_nodes"] == nodes


def test_a_stride_has_no_residual(tmp_path: Path) -> None:
    """On a map of one pixel the result has the sizes of the input."""
    torch.manual_seed(0)
    found = export.export_model(StridedWithASum(), torch.randn(1, 8, 3, 3), "onnx", tmp_path / "m.onnx", fused=True)
    assert found.ok


class OfOnePixel(nn.Module):
    """An op on a map that has one pixel in the example, and more in other pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 8, stride=8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.stem(x).chunk(3, 1)
        return mvkernels.relu_linear_attention(*(m.unflatten(1, (2, 4)) for m in (q, k, v)), eps=1.0).flatten(1, 2)


def test_a_map_of_one_pixel_in_the_example(tmp_path: Path) -> None:
    """Its strides fit both layouts. Other sizes have one of them."""
    torch.manual_seed(0)
    model, path = OfOnePixel().eval(), tmp_path / "m.onnx"
    program_sizes = torch.rand(2, 3, 8, 8)
    export.export_model(model, program_sizes, "onnx", path, fused=True, dynamic=True)
    run = session(str(path))
    for size in ((8, 72), (8, 8), (8, 16)):
        image = torch.rand(1, 3, *size)
        (out,) = run.run(None, {run.get_inputs()[0].name: image.numpy()})
        torch.testing.assert_close(torch.from_numpy(out), model(image).detach(), atol=1e-5, rtol=1e-5)


def test_a_wrong_instruction_set_does_no_lasting_harm() -> None:
    """A registration that was refused leaves sessions and later registrations as they are."""
    code = """
import os, numpy as np, onnxruntime
from mvkernels.export import onnxruntime_library
from tests.export.onnx_nodes import model_of, session
from tests.export.test_onnx_faults import block_of
def register():
    onnxruntime.SessionOptions().register_custom_ops_library(onnxruntime_library())
os.environ["MVKERNELS_CPU_ISA"] = "nope"
try:
    register()
except Exception as error:
    assert "MVKERNELS_CPU_ISA" in str(error)
else:
    raise AssertionError
del os.environ["MVKERNELS_CPU_ISA"]
run = session(block_of())
os.environ["MVKERNELS_CPU_ISA"] = "nope"
register()
print(run.run(None, {"x": np.ones((1, 6, 6, 8), np.float32)})[0][0, 2, 2, 0])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.strip() == str(16.0 * 9 * 8), done.stderr


def test_without_the_extension_there_are_no_fused_exports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its operators are what such an export keeps. Beside torch 2.9 the attention would be missing without a word."""
    monkeypatch.setattr(extension, "module", None)
    monkeypatch.setattr(extension, "reason", "the C++ extension needs torch 2.10")
    with pytest.raises(UsageError, match=r"onnx with fused ops: the C\+\+ extension needs torch 2.10"):
        export.require("onnx", fused=True)


def test_a_model_without_such_ops_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("timm")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["export", "timm:resnet10t", "--to", "onnx", "--fused", "--size", "32"]) == 0
    out, _ = capsys.readouterr()
    assert "no op of this library is in the model" in out and (tmp_path / "resnet10t-fused.onnx").exists()
