"""Exports: graphs of PyTorch's own ops, that run in other runtimes and without this library."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.export import Dim

import mvkernels
import mvmodels
from mvkernels import export, swap
from mvkernels import nn as fused
from mvkernels.commands import cli
from mvkernels.report import UsageError
from mvmodels import mobile_former
from tests.swap.conftest import randomise, timm_block, transformers_block


class Small(nn.Module):
    """A network of a few layers with both kinds of fused modules in it: converters take seconds for it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.transformer = fused.PatchTransformer(8, depth=1, heads=2)
        self.read = fused.MobileToFormer(8, 12)
        self.write = fused.FormerToMobile(8, 12)
        self.tokens = nn.Parameter(torch.randn(3, 12))
        self.head = nn.Linear(8, 5)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.transformer(self.stem(image))
        tokens = self.tokens.expand(image.shape[0], -1, -1)
        return self.head(self.write(x, self.read(x, tokens)).mean((2, 3)))


@pytest.fixture
def small() -> Iterator[nn.Module]:
    torch.manual_seed(0)
    yield randomise(Small())


IMAGE = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(0))


def foreign(program: torch.export.ExportedProgram) -> list[str]:
    """Calls of what is neither an aten op nor arithmetic on sizes."""
    calls = [n.target for g in program.graph_module.modules() for n in g.graph.nodes if n.op == "call_function"]
    return [str(c) for c in calls if not str(c).startswith("aten.") and getattr(c, "__module__", "") != "_operator"]


@pytest.mark.parametrize("family", ["transformers", "timm"])
def test_a_swapped_block_exports_for_all_sizes(family):
    """Also those that the patch does not divide, which the block resizes."""
    block = {"transformers": transformers_block, "timm": timm_block}[family]()
    scale = 2 if family == "transformers" else 1
    original_of = {}
    for height, width in ((10, 8), (6, 6), (7, 9)):
        x = torch.randn(3, 12, height * scale, width * scale)
        with torch.no_grad():
            original_of[height] = x, block(x)
    swap(block)
    dynamic = ({0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC},)
    with torch.no_grad():
        program = torch.export.export(block, (torch.randn(2, 12, 8 * scale, 12 * scale),), dynamic_shapes=dynamic)
        assert not foreign(program)
        for x, expected in original_of.values():
            torch.testing.assert_close(program.module()(x), expected, rtol=1e-4, atol=1e-4)


def test_mobile_former_exports_for_all_sizes():
    model = randomise(mvmodels.create_model("mobile_former_26m", num_classes=5)).double()
    batch, height, width = Dim("batch"), Dim("height", min=2, max=64), Dim("width", min=2, max=64)
    shapes = ({0: batch, 2: 32 * height, 3: 32 * width},)
    with torch.no_grad():
        example = torch.randn(2, 3, 64, 96, dtype=torch.float64)
        program = torch.export.export(model, (example,), dynamic_shapes=shapes)
        assert not foreign(program)
        other = torch.randn(1, 3, 96, 64, dtype=torch.float64)
        torch.testing.assert_close(program.module()(other), model(other), rtol=1e-7, atol=1e-7)


ALONE = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("mvkernels", "mvmodels", "transformers", "timm"):
            raise ImportError(name)
sys.meta_path.insert(0, Block())
import torch
program = torch.export.load(sys.argv[1])
image, expected = torch.load(sys.argv[2])
error = float((program.module()(image) - expected).abs().max())
assert error < 1e-5, error
assert "mvkernels" not in sys.modules
"""


def test_a_saved_graph_runs_where_this_library_is_not(small, tmp_path):
    found = export.export_model(small, IMAGE, "torch", tmp_path / "small.pt2", dynamic=True)
    assert found.ok and found.bytes > 1000 and found.checked == [[2, 3, 16, 24], [3, 3, 48, 88]]
    assert found.input_shape[:2] == ["any", "3"]
    other = torch.rand(1, 3, 20, 36)
    with torch.no_grad():
        torch.save((other, small(other)), tmp_path / "expected.pt")
    command = [sys.executable, "-c", ALONE, str(tmp_path / "small.pt2"), str(tmp_path / "expected.pt")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_onnx_runs_with_dynamic_axes(small, tmp_path):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    found = export.export_model(small, IMAGE, "onnx", tmp_path / "small.onnx", dynamic=True)
    assert found.ok and found.error < 1e-4 and found.input_shape[1] == "3"
    run = export.TARGETS["onnx"].load(tmp_path / "small.onnx", 1)
    for size in ((1, 3, 12, 20), (5, 3, 36, 16)):
        image = torch.rand(size)
        with torch.no_grad():
            torch.testing.assert_close(run(image), small(image), rtol=1e-4, atol=1e-4)


def test_onnx_of_a_swapped_block_resizes_as_the_block_does(tmp_path):
    """ONNX divides negative sizes towards zero: once, a map of 5 rows was resized to 4."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    block = timm_block(transformer_depth=1)
    x = torch.randn(2, 12, 8, 12)
    with torch.no_grad():
        odd = torch.randn(3, 12, 5, 7)
        expected = block(odd)
    swap(block)
    program = export.program(block, x, dynamic=True)
    export.TARGETS["onnx"].write(program, tmp_path / "block.onnx")
    found = export.TARGETS["onnx"].load(tmp_path / "block.onnx", 1)(odd)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


class Attention(nn.Module):
    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return mvkernels.relu_linear_attention(query, key, value, eps=self.eps, backend="reference")


@pytest.mark.parametrize("eps", [1e-15, 1e-9, 1e-5, 5e-324])
def test_onnx_keeps_what_is_added_to_the_divisor(eps, tmp_path):
    """Its optimizer leaves the addition of a small number out: pixels whose query has nothing above 0 became NaN."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    import onnxruntime

    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, 2, 4, 3, 5, generator=generator) for _ in range(3)]
    inputs[0][0, 0, :, 1] = -1.0
    inputs[0][1] *= 1e-8  # so that eps counts
    model = Attention(eps)
    expected = model(*inputs)
    program = torch.export.export(model, tuple(inputs))
    torch.testing.assert_close(program.module()(*inputs), expected, rtol=1e-5, atol=1e-6, equal_nan=True)
    if eps < 1e-30:  # nothing in float32: NaN is the right answer to some converters
        return
    with export.quiet():
        torch.onnx.export(program, (), tmp_path / "op.onnx", dynamo=True)
    session = onnxruntime.InferenceSession(tmp_path / "op.onnx", providers=["CPUExecutionProvider"])
    fed = {given.name: value.numpy() for given, value in zip(session.get_inputs(), inputs)}
    found = torch.from_numpy(session.run(None, fed)[0])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert not found[0, 0, :, 1].any()


def test_openvino_runs(small, tmp_path):
    pytest.importorskip("openvino")
    found = export.export_model(small, IMAGE, "openvino", tmp_path / "small.xml")
    assert found.ok and found.error < 1e-4


@pytest.mark.parametrize(
    "name",
    [
        "small",
        pytest.param("transformers:mobilevit_xxs", marks=pytest.mark.slow),
        pytest.param("mobile_former", marks=pytest.mark.slow),
        pytest.param("mvmodels:efficientvit_b0", marks=pytest.mark.slow),
    ],
)
def test_executorch_runs_and_xnnpack_has_most_of_it(name, small, tmp_path):
    pytest.importorskip("executorch.exir")
    from mvkernels import third_party

    if name.startswith("transformers"):
        pytest.importorskip("transformers")
    if name == "mobile_former":  # one block of each kind: the whole one takes minutes to lower
        size = mobile_former.SIZES["26m"]
        model: nn.Module = mobile_former.MobileFormer(replace(size, blocks=" ".join(size.blocks.split()[:2]))).eval()
    else:
        model = small if name == "small" else third_party.build(name)
    image = IMAGE[:1] if name == "small" else torch.rand(1, 3, 64, 64)
    found = export.export_model(model, image, "executorch", tmp_path / "model.pte")
    assert found.ok and found.checked and found.bytes == (tmp_path / "model.pte").stat().st_size
    assert found.details["delegated_share"] > 0.5, found.details


def test_what_is_not_installed_is_told_with_its_extra(capsys, monkeypatch):
    real = importlib.import_module

    def missing(name: str, *rest: object) -> object:
        if name.startswith("executorch"):
            raise ModuleNotFoundError("No module named 'executorch'", name="executorch")
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", missing)
    assert cli.main(["export", "transformers:mobilevit_xxs", "--to", "executorch"]) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and "pip install 'mvkernels[export]'" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["transformers:mobilevit_xxs"], "--to"),
        (["transformers:mobilevit_xxs", "--to", "tflite"], "invalid choice"),
        (["nobody:model", "--to", "torch"], "unknown model"),
        (["mvmodels:no_such_model", "--to", "torch"], "unknown model"),
        (["mvmodels:efficientvit_b0", "--to", "torch", "--pretrained"], "no weights to download"),
        (["mvmodels:efficientvit_b0", "--to", "torch", "--dynamic", "--batch", "1"], "at least 2"),
        (["mvmodels:efficientvit_b0", "--to", "torch", "--swap", "--original"], "not allowed with"),
        (["mvmodels:efficientvit_b0", "--to", "torch", "--size", "large"], "'large' is not a whole number"),
    ],
)
def test_bad_usage_is_one_line_and_status_2(arguments, message, capsys):
    try:
        status = cli.main(["export", *arguments])
    except SystemExit as exit:
        status = exit.code
    out, err = capsys.readouterr()
    assert status == 2 and not out and err.count("\n") == 1 and message in err


def test_a_path_that_cannot_be_written(small):
    with pytest.raises(UsageError, match="cannot be written"):
        export.export_model(small, IMAGE, "torch", "/proc/no/such.pt2")


@pytest.mark.parametrize("target", ["torch", "onnx", "openvino", "coreml"])
def test_a_name_that_the_target_cannot_write(target, small, tmp_path):
    """Told of the name, and not of the model; what lay there stays."""
    for package in export.TARGETS[target].needs:
        pytest.importorskip(package)
    folder = tmp_path / "folder"
    (folder / "kept").mkdir(parents=True)
    with pytest.raises(UsageError, match="folder cannot be written"):
        export.export_model(small, IMAGE, target, folder)
    assert (folder / "kept").is_dir()


def test_a_model_that_cannot_be_exported(tmp_path):
    class Moody(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(UsageError, match=r"torch\.export cannot export the model") as caught:
        export.export_model(Moody(), IMAGE, "torch", tmp_path / "moody.pt2")
    assert "\n" not in str(caught.value)


def test_a_wrong_file_is_told(small, tmp_path, monkeypatch, capsys):
    """Status 1, and the difference."""
    from mvkernels import third_party

    kind = export.TARGETS["torch"]
    broken = export.Target(kind.suffix, (), kind.write, lambda path, threads: lambda image: torch.zeros(2, 5))
    monkeypatch.setitem(export.TARGETS, "torch", broken)
    monkeypatch.setattr(third_party, "build", lambda *_: small)
    monkeypatch.setattr(third_party, "picture", lambda *_: (IMAGE, "noise"))
    arguments = ["export", "mvmodels:efficientvit_b0", "--to", "torch", "--output", str(tmp_path / "x.pt2"), "--json"]
    assert cli.main(arguments) == 1
    out, err = capsys.readouterr()
    assert not json.loads(out)["ok"] and "differ from those of the model" in err
