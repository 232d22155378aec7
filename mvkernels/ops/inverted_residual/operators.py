"""The inverted residual as torch operators: of the C++ extension, with the packing of its weights, and of Triton."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mvkernels.dispatch import checks, flops, library
from mvkernels.ops.common.packed import HEADER, wide

_NAME = "inverted_residual"


def packed_size(expand: Tensor | None, depthwise: Tensor, project: Tensor | None) -> int:
    """Elements of these weights packed: as ``count`` in csrc/cpu/inverted_residual/inverted_residual.h."""
    hidden, outputs, taps = depthwise.shape[0], 0 if project is None else project.shape[0], depthwise.shape[2] ** 2
    size = HEADER + wide(hidden) * (taps + 1) + wide(outputs) * (hidden + 1)
    return size if expand is None else size + wide(hidden) * (expand.shape[1] + 1)


def _fake_pack(
    expand: Tensor | None, expand_bias: Any, depthwise: Tensor, depthwise_bias: Any, project: Tensor | None, *_: Any
) -> Tensor:
    return depthwise.new_empty(packed_size(expand, depthwise, project))


def _size(x: Any, stride: int) -> tuple[int, int, int]:
    """Batch and sides of the result, for the size of a map."""
    b, _, height, width = x
    return b, (height - 1) // stride + 1, (width - 1) // stride + 1


def _fake(
    x: Tensor, packed: Tensor, hidden: int, outputs: int, kernel: int, expands: bool, stride: int, *_: Any
) -> Tensor:
    return x.new_empty((*_size(x.shape, stride), outputs or hidden)).permute(0, 3, 1, 2)


def _count(
    x: flops.Shape, packed: Any, hidden: int, outputs: int, kernel: int, expands: bool, stride: int, *_: Any
) -> int:
    b, height, width = _size(x, stride)
    expansion = b * x[2] * x[3] * hidden * x[1] if expands else 0
    return 2 * (expansion + b * height * width * hidden * (kernel**2 + outputs))


_WEIGHTS = "(Tensor? expand, Tensor? expand_bias, Tensor depthwise, Tensor? depthwise_bias, Tensor? project, "
_WEIGHTS += "Tensor? project_bias) -> Tensor"
pack = library.define("cpp", f"{_NAME}_pack", _WEIGHTS, _fake_pack)

# outputs is 0 without a projection: the result is the activated map of the depthwise convolution. `before` is the
# activation of the expansion, -1 for the same. Slopes (B, 2, hidden) are of a dynamic ReLU after the expansion and
# after the depthwise convolution, max(slopes[:, 0] x, slopes[:, 1] x), in addition to the activations.
_CALL = "(Tensor x, Tensor packed, int hidden, int outputs, int kernel, bool expands, int stride, int activation, "
_CALL += "bool residual, int before=-1, Tensor? slopes_before=None, Tensor? slopes=None) -> Tensor"
forward = library.define("cpp", _NAME, _CALL, _fake, count=_count)


def launcher() -> Any:
    """The module that launches the Triton kernel, imported only here."""
    from mvkernels.ops.inverted_residual.triton import launcher

    return launcher


def _fake_triton(
    x: Tensor, expand: Any, expand_bias: Any, depthwise: Any, depthwise_bias: Any, project: Tensor, bias: Any,
    stride: int, *_: Any
) -> Tensor:  # fmt: skip
    return checks.empty_map(x[:, :, ::stride, ::stride], project.shape[0])


def _count_triton(
    x: flops.Shape, expand: Any, expand_bias: Any, depthwise: flops.Shape, depthwise_bias: Any, project: flops.Shape,
    bias: Any, stride: int, *_: Any
) -> int:  # fmt: skip
    return _count(x, None, project[1], project[0], depthwise[-1], expand is not None, stride)


_TENSORS = "Tensor x, Tensor? expand, Tensor? expand_bias, Tensor depthwise, Tensor? depthwise_bias, Tensor project, "
_TENSORS += "Tensor? project_bias"
forward_triton = library.define(
    "triton", _NAME, f"({_TENSORS}, int stride, int activation, bool residual) -> Tensor", _fake_triton,
    library.launched(launcher, "forward", _fake_triton), count=_count_triton,
)  # fmt: skip
