"""Launches of former_to_mobile's Triton kernels: all that follows from shapes, strides and dtype alone."""

from __future__ import annotations

from mvkernels.ops.former_to_mobile.triton import kernels, wide_kernels
from mvkernels.triton import configs
from mvkernels.triton.bridge.plan import SCALE2, BridgeProblem, Plan
from mvkernels.triton.launch import Launch


@configs.memo
def forward_launches(problem: BridgeProblem) -> list[Launch]:
    """The launch of a forward call; tensors ``x k v o``, floats ``scale2 scale2_low``."""
    plan = Plan(problem, "forward_pixels", "xkv")
    meta = plan.meta | plan.made_map("O") | {"RESIDUAL": problem.residual}
    ints = (*plan.strides(), *plan.map.sizes[:3], plan.tiles)
    kernel = wide_kernels.forward_wide if plan.wide else kernels.forward_pixels
    return [Launch(kernel, plan.kernel, plan.units * plan.tiles * plan.pieces, ("x", "k", "v", "o"),
                   SCALE2, ints, meta, plan.options)]  # fmt: skip


@configs.memo
def backward_launches(problem: BridgeProblem) -> tuple[list[Launch], int]:
    """(launches, slices) of a backward call; tensors ``g x k v dx dk dv``, more than one slice ``dk_sums dv_sums``.

    Floats ``scale scale_low scale2 scale2_low``.
    """
    plan = Plan(problem, "backward_slices", "gxkv")
    split = plan.slices > 1
    pointers = ("g", "x", "k", "v", "dx", *(("dk_sums", "dv_sums") if split else ("dk", "dv")))
    meta = plan.made_map("D") | {"RESIDUAL": problem.residual}
    kernel = wide_kernels.backward_wide if plan.wide else kernels.backward_slices
    launches = plan.backward(kernel, pointers, meta)
    return launches + ([plan.sum_slices("dk", "dv")] if split else []), plan.slices
