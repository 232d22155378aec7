"""Which op does the work of a convolution, by its settings alone."""

from __future__ import annotations

from typing import Any

from torch import nn


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
