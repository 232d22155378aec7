"""``LiteMLA`` of EfficientViT (MIT) in timm (``timm.models.efficientvit_mit``), between its two projections.

Microsoft's EfficientViT (``efficientvit_m0`` to ``m5``) is another network, with softmax attention.
"""

from __future__ import annotations

from typing import Any

from timm.models.efficientvit_mit import ConvNormAct, LiteMLA
from torch import Tensor

from mvkernels.nn.efficientvit import aggregate_and_attend
from mvkernels.swap import lite_mla
from mvkernels.swap.eligibility import asked, not_its_own, not_plain, replaced
from mvkernels.swap.packing import layers
from mvkernels.swap.packing.plans import Keep, Run
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

    mvk_methods = ("_conv_forward", "_attn")

    def mvk_sizes(self: Any) -> tuple[int, int]:
        """The projection's channels."""
        return self.proj.conv.out_channels, 1

    def mvk_plan(self: Any, keep: Keep, adds: bool = False) -> Run | None:
        """On packed weights."""
        projections = of_efficientvit(self.qkv, self.proj)
        if why_not(self) or not projections:
            return None
        into = layers.convolution(projections[0], keep)
        out = layers.multiplication(projections[1][0], keep, projections[1][2], None, projections[1][1])
        if into is None or out is None:
            return None
        settings = (self.aggreg, self.dim, self.eps, self.mvk_backend)
        if adds:
            return lambda x: out(aggregate_and_attend(into(x), *settings), x)
        return lambda x: out(aggregate_and_attend(into(x), *settings))

    def mvk_adding_plan(self: Any, keep: Keep) -> Run | None:
        """The sum in the projection."""
        same = self.qkv.conv.in_channels == self.proj.conv.out_channels
        return self.mvk_plan(keep, adds=True) if same else None

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x (B, C, H, W) -> (B, C_out, H, W)."""
        out = lite_mla.forward(self, x, bool(args or kwargs), asked(_of_timm, self))
        return LiteMLA.forward(self, x, *args, **kwargs) if out is None else out


SWAPPED = SwappedLiteMLA
