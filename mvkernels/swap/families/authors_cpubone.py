"""``ConvAttention`` of CPUBone and LowFormer, in the code that the authors published. Recognised by structure.

See :mod:`mvkernels.swap.by_structure`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mvkernels.swap import by_structure
from mvkernels.swap.conv_attention import fused
from mvkernels.swap.eligibility import asked, log_once, not_hooked, not_its_own, unusual_call
from mvkernels.swap.swapped import Swapped

CALLS_PARTS = True
_CHILDREN = ("conv_proj", "pwise", "sda", "o_proj", "upsampling")


def _changed(module: Any) -> str:
    return not_hooked(module.sda, "sda") or not_its_own(module.sda, "scaled_dot_product")


def why_not(module: Any, model: nn.Module) -> str:
    """Why the fused form cannot replace this ``ConvAttention``; empty if it can."""
    reason = by_structure.holds_something_else(module, _CHILDREN) or _changed(module)
    reason = reason or by_structure.holds_something_else(module.sda, (), "sda")
    if reason:
        return reason
    generator = torch.Generator().manual_seed(0)
    sides = [(each * module.att_stride, other * module.att_stride) for each, other in ((3, 2), (1, 4))]
    maps = [
        torch.randn(2, module.input_dim, *side, generator=generator, dtype=torch.float64, device="cpu")
        for side in sides
    ]
    return by_structure.computes_something_else(module, SwappedConvAttention, maps, _fused)


def form(module: nn.Module) -> type:
    """The fused form of such a module."""
    return SwappedConvAttention


def _fused(module: Any, x: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    return fused(module, x)[:batch, :channels, :height, :width]


class SwappedConvAttention(Swapped):
    """A ``ConvAttention`` that calls :func:`mvkernels.patch_attention` with a patch of 1."""

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x (B, C, H, W) -> (B, C, H, W)."""
        reason = "the call has other arguments than the map" if args or kwargs else unusual_call(x)
        reason = reason or asked(_changed, self)
        if reason:
            log_once(self, reason)
            return self.mvk_original.forward(self, x, *args, **kwargs)
        return _fused(self, x)
