"""The dense 3 x 3 convolution and the packing of its weights as torch operators of the C++ extension."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mvkernels.dispatch import flops, library
from mvkernels.ops.common.packed import HEADER, wide

_NAME = "conv3x3"
_FEW = 16
"""Channels from which Winograd's algorithm is taken."""
_LARGE, _MANY = 16, 96
"""Sides and channels from which it is F(4 x 4): the errors that it multiplies are near those of one long sum then."""


def tile_of(inputs: int, outputs: int, stride: int, height: int, width: int) -> int:
    """Which algorithm a convolution takes: F(4 x 4, 3 x 3), F(2 x 2, 3 x 3), or 0 for the direct one.

    A tile of 4 saves the most products; on small maps much of it hangs over, and the weights' transforms, four times
    as large as the weights, are what has to be read.
    """
    if stride != 1 or inputs < _FEW or outputs < _FEW:
        return 0
    large = (height >= _LARGE) & (width >= _LARGE)  # one question, not two: one guard of torch.compile
    return 4 if inputs >= _MANY and large else 2


def packed_size(weight: Tensor, tile: int) -> int:
    """Elements of this weight packed: as ``count`` in csrc/cpu/conv3x3/conv3x3.h."""
    points = (tile + 2) ** 2 if tile else 9
    return HEADER + wide(weight.shape[0]) * (points * weight.shape[1] + 1)


def _fake_pack(weight: Tensor, bias: Any, tile: int) -> Tensor:
    return weight.new_empty(packed_size(weight, tile))


def _size(x: Any, stride: int) -> tuple[int, int, int]:
    """Batch and sides of the result, for the size of a map."""
    b, _, height, width = x
    return b, (height - 1) // stride + 1, (width - 1) // stride + 1


def _fake(x: Tensor, beside: Tensor | None, packed: Tensor, outputs: int, tile: int, stride: int, *_: Any) -> Tensor:
    return x.new_empty((*_size(x.shape, stride), outputs)).permute(0, 3, 1, 2)


def _count(x: flops.Shape, beside: Any, packed: Any, outputs: int, tile: int, stride: int, *_: Any) -> int:
    b, height, width = _size(x, stride)
    return 2 * 9 * b * height * width * outputs * (x[1] + (0 if beside is None else beside[1]))


pack = library.define("cpp", f"{_NAME}_pack", "(Tensor weight, Tensor? bias, int tile) -> Tensor", _fake_pack)

_CALL = "(Tensor x, Tensor? beside, Tensor packed, int outputs, int tile, int stride, int activation, "
_CALL += "Tensor? residual) -> Tensor"
forward = library.define("cpp", _NAME, _CALL, _fake, count=_count)
