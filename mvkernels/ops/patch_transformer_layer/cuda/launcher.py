"""The layer with its attention in CUDA C++; the kernels on rows are Triton's.

What calls both is :mod:`mvkernels.ops.patch_transformer_layer.layer`.
The attention reads query, key and value where they are in the packed qkv, and writes a packed dqkv. Its rows are
aligned as the channels of a head are: to 16 bytes where these are a multiple of 8 halves, and to 8 of 4.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from mvkernels.cuda import modules
from mvkernels.cuda.attention import plan
from mvkernels.dispatch.registry import OPS
from mvkernels.ops.patch_transformer_layer import layer

forward = partial(layer.forward, "cuda")
backward = partial(layer.backward, "cuda")


def why_not(*arguments: Any) -> str | None:
    """Why these kernels cannot run a call, or None. Takes the op's checked arguments; never raises."""
    x, heads, patch = arguments[0], arguments[13], arguments[14]
    rows = OPS["patch_transformer_layer"].why_not["triton"]
    if reason := modules.why_not(x) or rows(*arguments):
        return reason
    batch, channels, height, width = x.shape
    shape = batch, heads, channels // heads, height, width
    return plan.why_not(shape, shape[2], x.dtype, patch, None, True, modules.arch_of(x.device.index))
