"""Launches of mobile_to_former's Triton kernels: all that follows from shapes, strides and dtype alone."""

from __future__ import annotations

from mvkernels.ops.mobile_to_former.triton import kernels, wide_kernels
from mvkernels.triton import configs
from mvkernels.triton.bridge.plan import SCALE2, BridgeProblem, Plan
from mvkernels.triton.launch import Launch
from mvkernels.triton.maps import lanes


@configs.memo
def forward_launches(problem: BridgeProblem) -> tuple[list[Launch], int]:
    """(launches, slices) of a forward call; tensors ``q x o``, with more than one slice ``sums stats``."""
    plan = Plan(problem, "forward_slices", "qx")
    split = plan.slices > 1
    # A pointer that is not used must be one.
    pointers = ("q", "x", "sums", "stats") if split else ("q", "x", "o", "o")
    kernel = wide_kernels.forward_wide if plan.wide else kernels.forward_slices
    blocks = plan.token_blocks * plan.pieces
    launches = [plan.launch(kernel, blocks, pointers, SCALE2, plan.meta | {"SPLIT": split})]
    if split:
        d = problem.shape[2]
        wide = lanes(d)
        meta = {"D": d, "WIDTH": wide}
        launches.append(plan.merge(kernels.forward_merge, wide, ("sums", "stats", "o"), meta))
    return launches, plan.slices


@configs.memo
def backward_launches(problem: BridgeProblem) -> tuple[list[Launch], int]:
    """(launches, slices) of a backward call; tensors ``g q x stats index dq dx``.

    With more than one slice also ``stats_parts index_parts dq_sums``. Floats ``scale scale_low scale2 scale2_low``.
    Both stages have one plan, and so the same tiles: a score is the same bits in both.
    """
    plan = Plan(problem, "backward_slices", "gqx")
    split = plan.slices > 1
    rows, whole = ("stats_parts", "index_parts"), ("stats", "index")
    kernel = wide_kernels.rows_wide if plan.wide else kernels.backward_rows
    meta = {name: value for name, value in plan.meta.items() if name != "SLICE"}
    alone = not plan.wide and not split and plan.token_blocks == 1
    launches = []
    if not alone:
        found = rows if split else whole
        launches.append(plan.launch(kernel, plan.token_blocks, ("g", "q", "x", *found), SCALE2, meta))
    if split:
        launches.append(plan.merge(kernels.backward_merge, 1, (*rows, *whole), {}))
    kernel = wide_kernels.backward_wide if plan.wide else kernels.backward_slices
    pointers = ("g", "q", "x", *whole, "dq_sums" if split else "dq", "dx")
    meta = plan.made_map("D") | ({} if plan.wide else {"ALONE": alone, "PARTS": plan.parts})
    launches += plan.backward(kernel, pointers, meta)
    return launches + ([plan.sum_slices("dq")] if split else []), plan.slices
