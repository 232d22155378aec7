"""Plain ONNX exports: what ONNX Runtime makes of the reference implementations."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from mvkernels import export, swap

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytest.importorskip("timm")

from tests.swap.timm_windows import attention2d, maxvit, multi_query, swin, swin_v2, tiny_vit  # noqa: E402


def through_onnxruntime(block: nn.Module, x: torch.Tensor, folder: Path) -> list[list[int]]:
    """The permutations that are left in ONNX Runtime's graph of a block, which is right."""
    with torch.no_grad(), export.quiet():
        expected = block(x)
        export.TARGETS["onnx"].write(torch.export.export(block, (x,)), folder / "block.onnx")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    session = onnxruntime.InferenceSession(str(folder / "block.onnx"), options, providers=["CPUExecutionProvider"])
    (out,) = session.run(None, {"image": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(out), expected, rtol=1e-4, atol=1e-4)
    nodes = onnx.load(folder / "optimised.onnx").graph.node
    return [list(node.attribute[0].ints) for node in nodes if node.op_type == "Transpose"]


@pytest.mark.parametrize(
    "make",
    [swin, partial(swin, shift_size=0), swin_v2, partial(swin_v2, shift_size=0), tiny_vit, maxvit],
    ids=["swin shifted", "swin", "swin v2 shifted", "swin v2", "tiny vit", "maxvit"],
)
def test_channels_stay_innermost(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    """A permutation that moves the channels from their place costs ten times as much as one of whole pixels."""
    block = make()
    x = torch.randn(1, 8, 12, 16 if make is maxvit else 12, generator=torch.Generator().manual_seed(0))
    x = x.permute(0, 3, 1, 2).contiguous() if make is tiny_vit else x
    assert swap(block).count == 1
    permutations = through_onnxruntime(block, x, tmp_path)
    of_maps = [axes for axes in permutations if len(axes) > 4]  # the others are TinyViT's own
    assert of_maps and all(axes[-1] == len(axes) - 1 for axes in of_maps), permutations


@pytest.mark.parametrize("make", [attention2d, multi_query], ids=["MobileNetV4", "MobileNetV4, keys shared"])
def test_a_whole_map_is_turned_and_not_cut(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    """Patches of one pixel have no axes of their own, which would be seven, and permuted by single numbers."""
    block = make()
    assert swap(block).count == 1
    x = torch.randn(1, 12, 6, 8, generator=torch.Generator().manual_seed(0))
    permutations = through_onnxruntime(block, x, tmp_path)
    assert permutations and all(len(axes) <= 5 for axes in permutations), permutations
