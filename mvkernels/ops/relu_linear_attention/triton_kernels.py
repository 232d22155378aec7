"""relu_linear_attention on Triton.

Forward: the sums over pixels of k and v, then each pixel of q against them. Backward: dq and the sums' gradient from
q and the incoming gradient, then dk and dv from that. A unit whose pixels stay in one program is one launch; else it is
three: slices, their sum, slices. What follows from shapes, strides and dtype is planned once and cached
(triton_plan.py); the static audit compiles the very same launches.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
import triton

from mvkernels import launch
from mvkernels.checks import empty_map
from mvkernels.ops.mobile_to_former.triton_kernels import sums_dtype
from mvkernels.ops.patch_attention.triton_kernels import _precision
from mvkernels.ops.patch_attention.triton_plan import Launch
from mvkernels.ops.relu_linear_attention import triton_device
from mvkernels.ops.relu_linear_attention.triton_plan import Problem, backward_launches, forward_launches

# Beyond these the sums do not fit the registers beside the tiles.
_MAX_HEAD_DIM = {"float16": 64, "bfloat16": 64, "tf32": 64, "float32": 64, "float64": 32}
_INT32 = 2**31
# Decided when the kernels were decorated, as Triton itself does.
INTERPRETED = not isinstance(triton_device.forward_slices, triton.JITFunction)


def why_not(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, eps: float) -> str | None:
    """Why these kernels cannot run a call, or None. Takes the op's checked arguments; never raises."""
    batch, heads, d, height, width = query.shape
    return why_no_kernel(query, batch * heads, heads * d, d, height, width)


def why_no_kernel(map_: torch.Tensor, units: int, channels: int, d: int, height: int, width: int) -> str | None:
    """Why a device, dtype or size is not for these kernels, or None."""
    type_ = map_.device.type
    if type_ == "cpu" and not INTERPRETED:
        return "CPU tensors run on Triton only under TRITON_INTERPRET=1"
    if type_ not in ("cpu", "cuda", "xpu"):
        return f"no Triton for device type {type_}"
    if INTERPRETED and map_.dtype == torch.bfloat16:
        return "bfloat16 products are wrong in Triton's interpreter"
    if too_old := launch.why_too_old(map_.device):
        return too_old
    name = "tf32" if _precision(map_.dtype, type_) == "tf32" else str(map_.dtype).removeprefix("torch.")
    if d > _MAX_HEAD_DIM[name]:
        return f"head_dim {d}: want at most {_MAX_HEAD_DIM[name]} in {name}"
    if width * channels >= _INT32 or 2 * height * width >= _INT32:
        return "a row or a plane of the map passes 2**31 elements"
    if units * height * width >= _INT32 or units * (d + 1) * d >= _INT32:
        return "batch * heads * pixels, or the sums of all heads, pass 2**31"
    return None


def problem_of(named: Sequence[tuple[str, torch.Tensor]], precision: str | None = None) -> Problem:
    """The launcher's description of a call on these maps (B, heads, head_dim, H, W)."""
    map_ = named[0][1]
    place = ("cpu", None) if INTERPRETED else (map_.device.type, map_.device.index)
    strides = tuple((name, each.stride()) for name, each in named)
    precision = precision or _precision(map_.dtype, map_.device.type)
    return Problem(tuple(map_.shape), strides, map_.dtype, precision, launch.device_of(*place))


def run(launches: list[Launch], tensors: dict[str, torch.Tensor], eps: float = 0.0) -> None:
    """Launch on the device of the tensors."""
    device = next(iter(tensors.values())).device
    high = ctypes.c_float(eps).value  # Triton passes a float as float32: send the rest of it after
    floats = {"eps": high, "eps_low": eps - high}
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            for each in launches:
                each(tensors, floats)
    else:
        for each in launches:
            each(tensors, floats)


def forward_into(
    out: torch.Tensor, sums: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, eps: float
) -> None:
    """Write the output to the map ``out`` of any strides, and the sums, (B, h, D + 1, D), contiguous."""
    named = (("q", query), ("k", key), ("v", value), ("o", out))
    launches, slices = forward_launches(problem_of(named))
    tensors = dict(named) | {"sums": sums}
    if slices > 1:
        tensors["parts"] = sums.new_empty((slices, *sums.shape))
    run(launches, tensors, eps)


def backward_into(
    grads: Sequence[torch.Tensor],
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sums: torch.Tensor,
    eps: float,
) -> None:
    """Write dq, dk, dv to the maps ``grads`` of any strides, which may be query, key and value themselves."""
    named = (("g", grad), ("q", query), ("k", key), ("v", value), *zip(("dq", "dk", "dv"), grads))
    launches, slices = backward_launches(problem_of(named))
    # With one slice the sums' gradient is not written: any tensor will do.
    tensors = dict(named) | {"sums": sums, "dsums": sums}
    if slices > 1:
        tensors |= {"dsums": sums.new_empty(sums.shape), "parts": sums.new_empty((slices, *sums.shape))}
    run(launches, tensors, eps)


def forward(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, eps: float
            ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Maps (B, h, D, H, W) -> (out, dense in the order of query; sums (B, h, D + 1, D), contiguous).

    sums is float32 (float64 for float64): row d < D the sum over pixels of relu(k)_d v, row D that of relu(k). Inputs
    are read in place, whatever their strides.
    """
    b, h, d = query.shape[:3]
    out = empty_map(query, d)
    sums = query.new_empty((b, h, d + 1, d), dtype=sums_dtype(query.dtype))
    forward_into(out, sums, query, key, value, eps)
    return out, sums


def backward(
    grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sums: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq, dk, dv), each dense in the order of its input; sums is forward's. No atomics: the same bits in every run."""
    dq, dk, dv = (empty_map(each, each.shape[2]) for each in (query, key, value))
    backward_into((dq, dk, dv), grad, query, key, value, sums, eps)
    return dq, dk, dv
