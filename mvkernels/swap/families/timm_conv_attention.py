"""``ConvAttention`` of CPUBone and of LowFormer in timm (``timm.models.cpubone``, ``timm.models.lowformer``)."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.functional import pad

from mvkernels.swap.conv_attention import fused
from mvkernels.swap.eligibility import asked, log_once, replaced, unusual_call
from mvkernels.swap.swapped import Swapped
from mvkernels.swap.timm_parts import scale_of

CALLS_PARTS = True


def why_not(module: Any) -> str:
    """Why the fused form cannot replace this ``ConvAttention`` in its current state; empty if it can."""
    reason = replaced(module.mvk_original if isinstance(module, Swapped) else type(module), "forward")
    if not reason and module.pwise.out_channels != 3 * module.num_heads * module.head_dim:
        reason = f"pwise has {module.pwise.out_channels} channels, want queries, keys and values of every head"
    return reason


class SwappedConvAttention(Swapped):
    """A ``ConvAttention`` that calls :func:`mvkernels.patch_attention` with a patch of 1."""

    def forward(self: Any, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> (B, C, H, W)."""
        reason = unusual_call(x) or asked(why_not, self)
        if reason:
            log_once(self, reason)
            return self.mvk_original.forward(self, x)
        height, width = x.shape[2:]
        # CPUBone's projection of 2 x 2 would round odd sizes down.
        if getattr(self, "small_kernels", False) and self.att_stride > 1:
            below, beside = -height % self.att_stride, -width % self.att_stride
            x = pad(x, (0, beside, 0, below)) if below or beside else x
        return fused(self, x, scale_of(self))[..., :height, :width]


SWAPPED = SwappedConvAttention
