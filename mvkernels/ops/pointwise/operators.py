"""The 1 x 1 convolution and the packing of its weights as torch operators of the C++ extension."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mvkernels.dispatch import flops, library
from mvkernels.ops.common.packed import HEADER, wide

_NAME = "pointwise"


def packed_size(weight: Tensor) -> int:
    """Elements of this weight packed: as ``count`` in csrc/cpu/pointwise/pointwise.h."""
    return HEADER + wide(weight.shape[0]) * (weight.shape[1] + 1)


def _fake_pack(weight: Tensor, *_: Any) -> Tensor:
    return weight.new_empty(packed_size(weight))


def _fake(x: Tensor, packed: Tensor, outputs: int, *rest: Any) -> Tensor:
    b, _, height, width = x.shape
    return x.new_empty((b, height, width, outputs)).permute(0, 3, 1, 2)


def _count(x: flops.Shape, packed: Any, outputs: int, *_: Any) -> int:
    b, channels, height, width = x
    return 2 * b * height * width * channels * outputs


_WEIGHTS = "(Tensor weight, Tensor? bias, bool normed, Tensor? norm_weight, Tensor? norm_bias) -> Tensor"
pack = library.define("cpp", f"{_NAME}_pack", _WEIGHTS, _fake_pack)

# gate (B, C): factors of the channels of x, in the place of a norm; (B, 3, C): factors, what is subtracted before they
# multiply, and what is added then.
_CALL = "(Tensor x, Tensor packed, int outputs, bool normed, float eps, int activation, Tensor? residual, "
_CALL += "Tensor? gate=None) -> Tensor"
forward = library.define("cpp", _NAME, _CALL, _fake, count=_count)
