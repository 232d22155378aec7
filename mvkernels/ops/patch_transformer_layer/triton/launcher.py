"""The layer on Triton, the attention too; what launches it is :mod:`mvkernels.ops.patch_transformer_layer.layer`."""

from __future__ import annotations

from functools import partial
from typing import Any

from mvkernels.ops.patch_attention import why_not_triton as why_not_attention
from mvkernels.ops.patch_transformer_layer import layer
from mvkernels.triton.maps import INT32, divides

_MAX_CHANNELS = 256

forward = partial(layer.forward, "triton")
backward = partial(layer.backward, "triton")


def why_not(*arguments: Any) -> str | None:
    """Why these kernels cannot run a call, or None. Takes the op's checked arguments; never raises."""
    x, heads, patch = arguments[0], arguments[13], arguments[14]
    batch, channels, height, width = x.shape
    maps = x.unflatten(1, (heads, channels // heads))
    reason = why_not_attention(maps, maps, maps, patch, None, None)
    if reason:
        return reason
    if channels > _MAX_CHANNELS:
        return f"{channels} channels: want at most {_MAX_CHANNELS}"
    if 3 * channels * height * width >= INT32 or channels * arguments[9].shape[0] >= INT32:
        return "qkv of a map, or a weight, passes 2**31 elements"
    if not divides(height, width):
        return "pixels * width of a map passes 2**32"
    if 2 * batch * height * width >= INT32:
        return "batch * pixels passes 2**30"
    return None
