"""``LiteMLA`` of EfficientViT (MIT) in timm (``timm.models.efficientvit_mit``), between its two projections.

Microsoft's EfficientViT (``efficientvit_m0`` to ``m5``) is another network, with softmax attention.
"""

from __future__ import annotations

from typing import Any

from timm.models.efficientvit_mit import ConvNormAct, LiteMLA
from torch import Tensor

from mvkernels.swap import lite_mla
from mvkernels.swap.eligibility import asked, not_its_own, not_plain, replaced
from mvkernels.swap.folding.forms import packs_now, rests
from mvkernels.swap.packing import layers
from mvkernels.swap.packing.timm import of_efficientvit
from mvkernels.swap.swapped import Swapped


def why_not(module: Any) -> str:
    """Why the fused form cannot replace this ``LiteMLA`` in its current state; empty if it can."""
    return _of_timm(module) or lite_mla.why_not(module)


def _of_timm(module: Any) -> str:
    return (
        replaced(LiteMLA, "forward", "_attn")
        or not_its_own(module, "forward", "_attn")
        or not_plain(module.qkv, ConvNormAct, "qkv")
        or not_plain(module.proj, ConvNormAct, "proj")
    )


class SwappedLiteMLA(Swapped):
    """A ``LiteMLA`` that calls :func:`mvkernels.multiscale_linear_attention` between its projections."""

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x (B, C, H, W) -> (B, C_out, H, W)."""
        out = lite_mla.forward(self, x, bool(args or kwargs), asked(_of_timm, self), _project)
        return LiteMLA.forward(self, x, *args, **kwargs) if out is None else out


def _project(module: Any, projection: Any, x: Tensor) -> Tensor:
    """A projection with its norm, on packed weights where the call may have them."""
    parts = of_efficientvit(projection) if packs_now(module, x) else []
    activation = rests(*parts[0]) if parts else None
    out = None if activation is None else layers.convolve(*parts[0][:2], activation, x)
    return lite_mla.as_module(module, projection, x) if out is None else out


SWAPPED = SwappedLiteMLA
