"""Which op does the work of a convolution, by its settings alone."""

from __future__ import annotations

from typing import Any

from torch import nn

ROWS = 0
"""In the place of a stride: what comes out is no map but rows (..., C), with the leading axes of the input."""
SAME = 0
"""In the place of a number of channels: those of the input."""


def sizes_of(layer: Any) -> tuple[int, int]:
    """The sizes of what a Linear or a convolution makes, as in ``Swapped.mvk_sizes``."""
    return (layer.out_features, ROWS) if isinstance(layer, nn.Linear) else (layer.out_channels, layer.stride[0])


def following(first: int, then: int) -> int | None:
    """The stride, as in ``Swapped.mvk_sizes``, of two modules in turn; None if no number says it."""
    rounds_both = first * then < 0 and 1 not in (first, then)
    if rounds_both or (first == ROWS) != (then == ROWS):
        return None
    return -first * then if first < 0 and then < 0 else first * then


def side_after(side: int, stride: int) -> int:
    """A side of a map after this stride."""
    return side // -stride if stride < 0 else -(-side // stride)


def stride_of_pool(pool: Any) -> int | None:
    """The stride of a pool that halves the map; None if it is another."""
    if type(pool) not in (nn.AvgPool2d, nn.MaxPool2d) or pool.ceil_mode or pool.stride != 2:
        return None
    return {(3, 1): 2, (2, 0): -2}.get((pool.kernel_size, pool.padding))


def of_convolution(conv: Any) -> str:
    """The op that does the work of this convolution, "pointwise" or "conv3x3"; "depthwise" for a part of
    "inverted_residual", "widening" if each channel that comes in is that of several; empty if there is none."""
    if not isinstance(conv, nn.Conv2d):
        return ""  # what somebody has put in its place
    if conv.dilation != (1, 1) or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return ""
    kernel, stride, padding = conv.kernel_size, conv.stride, conv.padding
    if stride[0] != stride[1] or stride[0] not in (1, 2) or padding != (kernel[0] // 2,) * 2 or kernel[0] != kernel[1]:
        return ""
    if conv.groups == 1 and kernel == (1, 1) and stride == (1, 1):
        return "pointwise"
    if conv.groups == 1 and kernel == (3, 3):
        return "conv3x3"
    if conv.groups == conv.in_channels and kernel[0] in (3, 5):
        return "depthwise" if conv.out_channels == conv.in_channels else "widening"
    return ""
