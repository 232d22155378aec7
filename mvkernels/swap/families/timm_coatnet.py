"""``Attention2d`` of CoAtNet in timm (``timm.models.maxxvit``), between its two 1×1 convolutions.

Position biases are made in every call, as in timm.
"""

from __future__ import annotations

from typing import Any

from timm.models.maxxvit import Attention2d
from torch import Tensor, nn

from mvkernels.ops.patch_attention import patch_attention
from mvkernels.swap.eligibility import asked, drops_attention, log_once, not_plain, replaced, unusual_call
from mvkernels.swap.swapped import Swapped
from mvkernels.swap.timm_parts import bias_of, not_position, qkv_of, scale_of

CALLS_PARTS = True


def why_not(module: Any) -> str:
    """Why the fused form cannot replace this ``Attention2d`` in its current state; empty if it can."""
    reason = replaced(Attention2d, "forward") or not_plain(module.attn_drop, nn.Dropout, "attn_drop")
    return reason or not_position(module.rel_pos, "rel_pos")


class SwappedAttention2d(Swapped):
    """An ``Attention2d`` that calls :func:`mvkernels.patch_attention` with a patch of 1."""

    def forward(self: Any, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
        """x (B, C, H, W) -> (B, C_out, H, W)."""
        reason = "shared_rel_pos is given" if shared_rel_pos is not None else unusual_call(x)
        reason = reason or asked(why_not, self) or drops_attention(self, self.attn_drop)
        if not reason and self.rel_pos is not None and self.rel_pos.window_area != x.shape[2] * x.shape[3]:
            reason = f"its biases are for {self.rel_pos.window_area} pixels, but the map has {x.shape[2] * x.shape[3]}"
        if reason:
            log_once(self, reason)
            return Attention2d.forward(self, x, shared_rel_pos)
        query, key, value = qkv_of(self.qkv(x), self.num_heads, self.head_first)
        bias = bias_of(self.rel_pos, query.dtype)
        out = patch_attention(query, key, value, 1, bias=bias, scale=scale_of(self), backend=self.mvk_backend)
        return self.proj_drop(self.proj(out.flatten(1, 2)))


SWAPPED = SwappedAttention2d
