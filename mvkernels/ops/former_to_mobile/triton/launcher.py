"""former_to_mobile on Triton.

Forward: ``forward_pixels`` reads the map once and writes it once, residual included. Backward: ``backward_slices``
reads map and gradient once and writes dx, with what each slice of pixels adds to dkey and dvalue; ``sum_slices`` adds
that up where there is more than one slice. Launches are planned once and cached, as mobile_to_former's.
"""

from __future__ import annotations

import torch

from mvkernels.dispatch.checks import empty_map
from mvkernels.ops.former_to_mobile.triton.plan import backward_launches, forward_launches
from mvkernels.triton.bridge.configs import TO_MOBILE
from mvkernels.triton.bridge.plan import launch, problem_of, why_no_bridge
from mvkernels.triton.launch import parts


def why_not(x: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None, residual: bool) -> str | None:
    """Why these kernels cannot run a call, or None. Takes the op's checked arguments; never raises."""
    return why_no_bridge(x, key)


def forward(x: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, residual: bool) -> torch.Tensor:
    """x (B, h, D, H, W), key, value (B, h, M, D) -> (B, h, D, H, W), dense in x's order.

    Inputs are read in place, whatever their strides.
    """
    named = (("x", x), ("k", key), ("v", value))
    out = empty_map(x, x.shape[2])
    launches = forward_launches(problem_of(TO_MOBILE, x, key.shape[2], named, residual))
    launch(launches, dict(named) | {"o": out}, scale)
    return out


def backward(
    grad: torch.Tensor, x: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, residual: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dx, dense in the order of x; dkey and dvalue, contiguous).

    grad (B, h, D, H, W) with any strides. No atomics: the same bits in every run.
    """
    named = (("g", grad), ("x", x), ("k", key), ("v", value))
    launches, slices = backward_launches(problem_of(TO_MOBILE, x, key.shape[2], named, residual))
    made = {"dx": empty_map(x, x.shape[2]), "dk": key.new_empty(key.shape), "dv": value.new_empty(value.shape)}
    tensors = dict(named) | made
    if slices > 1:
        tensors["dk_sums"], tensors["dv_sums"] = parts(slices, key), parts(slices, value)
    launch(launches, tensors, scale)
    return made["dx"], made["dk"], made["dv"]
