"""diffusers' ``RMSNorm`` in a few passes, and with what is added after it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.normalization import RMSNorm
from torch import Tensor

from mvkernels.swap.packing import layers
from mvkernels.swap.packing.blocks import not_own


def norm_of(norm: Any) -> Callable[..., Tensor] | None:
    """``norm(x) + residual`` of tokens (..., C) and perhaps a residual; None if the norm is another, or not in float32.

    The result is written over ``x`` if it is told that it may be.
    """
    if not_own(norm, RMSNorm) or layers.not_single(norm.weight, norm.bias):
        return None
    weight, bias, eps = norm.weight, norm.bias, norm.eps

    def run(x: Tensor, residual: Tensor | None = None, in_place: bool = False) -> Tensor:
        # One pass over x, where a square and its mean are two.
        squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
        factor = squares.div_(x.shape[-1]).add_(eps).rsqrt_()
        out = x.mul_(factor) if in_place else x * factor
        rest = [t for t in (residual, bias if weight is not None else None) if t is not None]
        if weight is not None:
            out = torch.addcmul(rest.pop(0), out, weight, out=out) if rest else out.mul_(weight)
        for each in rest:
            out.add_(each)
        return out

    return run


def norm_of_map(norm: Any) -> Callable[[Tensor, Tensor | None], Tensor] | None:
    """The same of maps (B, C, H, W), the first of which nobody else has: the result is written over it."""
    run = norm_of(norm)
    if run is None:
        return None

    def of_map(x: Tensor, residual: Tensor | None) -> Tensor:
        beside = None if residual is None else residual.permute(0, 2, 3, 1)
        return run(x.permute(0, 2, 3, 1), beside, True).permute(0, 3, 1, 2)

    return of_map
