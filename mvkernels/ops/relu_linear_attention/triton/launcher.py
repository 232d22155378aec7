"""relu_linear_attention on Triton.

Forward: the sums over pixels of k and v, then each pixel of q against them. Backward: dq and the sums' gradient from
q and the incoming gradient, then dk and dv from that. A unit whose pixels stay in one program is one launch; else it is
three: slices, their sum, slices. What follows from shapes, strides and dtype is planned once and cached
(plan.py); the static audit compiles the very same launches.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mvkernels.dispatch.checks import empty_map
from mvkernels.dispatch.launches import run
from mvkernels.ops.relu_linear_attention.triton.plan import backward_launches, forward_launches
from mvkernels.triton.launch import INTERPRETED, in_two, parts, why_not_triton, why_too_large
from mvkernels.triton.maps import INT32
from mvkernels.triton.problem import Problem, sums_dtype

# Beyond these the sums do not fit the registers beside the tiles.
_MOST = {"float16": 64, "bfloat16": 64, "tf32": 64, "float32": 64, "float64": 32}


def why_not(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, eps: float) -> str | None:
    """Why these kernels cannot run a call, or None. Takes the op's checked arguments; never raises."""
    batch, heads, d, height, width = query.shape
    units = batch * heads
    reason = why_not_triton(query, d, _MOST) or why_too_large(width, heads * d, 2 * height * width)
    if reason is None and (units * height * width >= INT32 or units * (d + 1) * d >= INT32):
        reason = "batch * heads * pixels, or the sums of all heads, pass 2**31"
    return reason


def problem_of(named: Sequence[tuple[str, torch.Tensor]]) -> Problem:
    """The description of a call on these maps, by name."""
    return Problem.of(named[0][1], named, INTERPRETED)


def forward_into(
    out: torch.Tensor, sums: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, eps: float
) -> None:
    """Write the output to the map ``out`` of any strides, and the sums, (B, h, D + 1, D), contiguous."""
    named = (("q", query), ("k", key), ("v", value), ("o", out))
    launches, slices = forward_launches(problem_of(named))
    tensors = dict(named) | {"sums": sums}
    if slices > 1:
        tensors["parts"] = parts(slices, sums)
    run(launches, tensors, in_two(query.dtype, eps=eps))


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
        tensors |= {"dsums": sums.new_empty(sums.shape), "parts": parts(slices, sums)}
    run(launches, tensors, in_two(query.dtype, eps=eps))


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
