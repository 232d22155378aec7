"""mobile_to_former on Triton.

Forward: ``forward_slices`` reads the map once, a slice of its pixels a program; with more than one slice
``forward_merge`` puts the slices together. Backward: ``backward_rows`` reads the map for the sums of each token's
row, which ``backward_merge`` puts together, and ``backward_slices`` reads it again and writes dx, with what each slice
adds to dquery; ``sum_slices`` adds that up. What follows from shapes, strides and dtype is planned once and cached
(plan.py); the static audit compiles the very same launches.
"""

from __future__ import annotations

import torch

from mvkernels.dispatch.checks import empty_map
from mvkernels.ops.mobile_to_former.triton.plan import backward_launches, forward_launches
from mvkernels.triton.bridge.configs import TO_FORMER
from mvkernels.triton.bridge.plan import launch, problem_of, why_no_bridge
from mvkernels.triton.launch import parts
from mvkernels.triton.problem import sums_dtype


def why_not(query: torch.Tensor, x: torch.Tensor, scale: float | None) -> str | None:
    """Why these kernels cannot run a call, or None. Takes the op's checked arguments; never raises."""
    return why_no_bridge(x, query)


def forward(query: torch.Tensor, x: torch.Tensor, scale: float) -> torch.Tensor:
    """query (B, h, M, D), x (B, h, D, H, W) -> (B, h, M, D), contiguous.

    Inputs are read in place, whatever their strides.
    """
    launches, slices = forward_launches(problem_of(TO_FORMER, x, query.shape[2], (("q", query), ("x", x))))
    out = query.new_empty(query.shape)
    tensors = {"q": query, "x": x, "o": out}
    if slices > 1:
        tensors["sums"], tensors["stats"] = parts(slices, query), parts(slices, query, (*query.shape[:3], 2))
    launch(launches, tensors, scale)
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
    rows = query.shape[:3]
    tensors["stats"] = query.new_empty((*rows, 4), dtype=sums_dtype(x.dtype))
    tensors["index"] = query.new_empty(rows, dtype=torch.int32)
    if slices > 1:
        tensors["stats_parts"], tensors["dq_sums"] = parts(slices, query, (*rows, 4)), parts(slices, query)
        tensors["index_parts"] = query.new_empty((slices, *rows), dtype=torch.int32)
    launch(launches, tensors, scale)
    return tensors["dq"], tensors["dx"]
