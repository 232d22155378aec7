"""mobile_to_former on Triton.

Forward: ``forward_slices`` reads the map once, a slice of its pixels a program; with more than one slice
``forward_merge`` puts the slices together. Backward: ``backward_rows`` reads the map for the sums of each token's
row, which ``backward_merge`` puts together, and ``backward_slices`` reads it again and writes dx, with what each slice
adds to dquery; ``sum_slices`` adds that up. What follows from shapes, strides and dtype is planned once and cached
(triton_plan.py); the static audit compiles the very same launches.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
import triton

from mvkernels import launch
from mvkernels.checks import empty_map
from mvkernels.ops.mobile_to_former import triton_device
from mvkernels.ops.mobile_to_former.triton_configs import TO_FORMER, TOKENS
from mvkernels.ops.mobile_to_former.triton_plan import Problem, backward_launches, forward_launches
from mvkernels.ops.patch_attention.triton_kernels import _precision
from mvkernels.ops.patch_attention.triton_plan import Launch

_LOG2E = 1.4426950408889634
_MAX_HEAD_DIM = 256
_INT32 = 2**31
# Decided when the kernels were decorated, as Triton itself does.
_INTERPRETED = not isinstance(triton_device.forward_slices, triton.JITFunction)


def why_not(query: torch.Tensor, x: torch.Tensor, scale: float | None) -> str | None:
    """Why these kernels cannot run a call, or None. Takes the op's checked arguments; never raises."""
    return why_no_kernel(x, query)


def why_no_kernel(x: torch.Tensor, tokens: torch.Tensor) -> str | None:
    """Why neither bridge's kernels can run on a map and a token set, or None."""
    type_ = x.device.type
    if type_ == "cpu" and not _INTERPRETED:
        return "CPU tensors run on Triton only under TRITON_INTERPRET=1"
    if type_ not in ("cpu", "cuda", "xpu"):
        return f"no Triton for device type {type_}"
    if _INTERPRETED and x.dtype == torch.bfloat16:
        return "bfloat16 products are wrong in Triton's interpreter"
    if too_old := launch.why_too_old(x.device):
        return too_old
    batch, heads, d, height, width = x.shape
    m = tokens.shape[2]
    if d > _MAX_HEAD_DIM:
        return f"head_dim {d}: want at most {_MAX_HEAD_DIM}"
    if width * heads * d >= _INT32 or 2 * height * width >= _INT32:
        return "a row or a plane of the map passes 2**31 elements"
    if batch * heads * (height * width + m + 16) * (1 + m // TOKENS) >= _INT32:
        return "batch * heads * pixels * tokens / 16 passes 2**31"
    return None


def problem_of(
    op: str, x: torch.Tensor, tokens: int, named: Sequence[tuple[str, torch.Tensor]], residual: bool = False
) -> Problem:
    """The launcher's description of a call on the map ``x`` and the tensors ``named``, x among them."""
    place = ("cpu", None) if _INTERPRETED else (x.device.type, x.device.index)
    strides = tuple((name, tensor.stride()) for name, tensor in named)
    precision = _precision(x.dtype, x.device.type)
    return Problem(op, tuple(x.shape), tokens, strides, residual, x.dtype, precision, launch.device_of(*place))


def run(launches: list[Launch], tensors: dict[str, torch.Tensor], scale: float) -> None:
    """Launch on the device of the map ``x``."""
    device, dtype = tensors["x"].device, tensors["x"].dtype
    floats = {"scale": scale, "scale2": scale * _LOG2E, "scale_low": 0.0, "scale2_low": 0.0}
    if dtype == torch.float64:  # Triton passes a float as float32: send the rest of it after
        for name in ("scale", "scale2"):
            high = ctypes.c_float(floats[name]).value
            floats |= {name: high, name + "_low": floats[name] - high}
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            for each in launches:
                each(tensors, floats)
    else:
        for each in launches:
            each(tensors, floats)


def sums_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def forward(query: torch.Tensor, x: torch.Tensor, scale: float) -> torch.Tensor:
    """query (B, h, M, D), x (B, h, D, H, W) -> (B, h, M, D), contiguous.

    Inputs are read in place, whatever their strides.
    """
    launches, slices = forward_launches(problem_of(TO_FORMER, x, query.shape[2], (("q", query), ("x", x))))
    out = query.new_empty(query.shape)
    tensors = {"q": query, "x": x, "o": out}
    if slices > 1:
        dtype = sums_dtype(x.dtype)
        tensors["sums"] = query.new_empty((slices, *query.shape), dtype=dtype)
        tensors["stats"] = query.new_empty((slices, *query.shape[:3], 2), dtype=dtype)
    run(launches, tensors, scale)
    return out


def backward(
    grad: torch.Tensor, query: torch.Tensor, x: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dquery, contiguous; dx, dense in the order of x).

    grad (B, h, M, D) with any strides. No atomics: the same bits in every run.
    """
    named = (("g", grad), ("q", query), ("x", x))
    launches, slices = backward_launches(problem_of(TO_FORMER, x, query.shape[2], named))
    tensors = dict(named) | {"dq": query.new_empty(query.shape), "dx": empty_map(x, x.shape[2])}
    dtype, rows = sums_dtype(x.dtype), query.shape[:3]
    tensors["stats"] = query.new_empty((*rows, 4), dtype=dtype)
    tensors["index"] = query.new_empty(rows, dtype=torch.int32)
    if slices > 1:
        tensors["stats_parts"] = query.new_empty((slices, *rows, 4), dtype=dtype)
        tensors["index_parts"] = query.new_empty((slices, *rows), dtype=torch.int32)
        tensors["dq_sums"] = query.new_empty((slices, *query.shape), dtype=dtype)
    run(launches, tensors, scale)
    return tensors["dq"], tensors["dx"]
