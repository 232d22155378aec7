"""``Attention2d`` of CoAtNet in timm (``timm.models.maxxvit``), between its two 1×1 convolutions.

The bias table is gathered in every call, as in timm. The window attention of timm's named MaxViT models is of another
class, ``AttentionCl``; only a configuration with ``use_nchw_attn`` uses ``Attention2d``.
"""

from __future__ import annotations

from typing import Any

from timm.layers import RelPosBias
from timm.models.maxxvit import Attention2d
from torch import Tensor, nn

from mvkernels.ops.patch_attention import patch_attention
from mvkernels.swap.eligibility import asked, drops_attention, log_once, not_hooked, not_plain, replaced, unusual_call
from mvkernels.swap.swapped import Swapped


def why_not(module: Any) -> str:
    """Why the fused form cannot replace this ``Attention2d`` in its current state; empty if it can."""
    reason = replaced(Attention2d, "forward") or not_plain(module.attn_drop, nn.Dropout, "attn_drop")
    position = module.rel_pos
    if reason or position is None:
        return reason
    reason = not_plain(position, RelPosBias, "rel_pos") or replaced(RelPosBias, "get_bias")
    if not reason and "get_bias" in position.__dict__:
        reason = "rel_pos has a replaced get_bias"
    if not reason and position.prefix_tokens:
        reason = f"rel_pos has biases for {position.prefix_tokens} prefix tokens, want biases for pixels only"
    return reason or not_hooked(position, "rel_pos")


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
        packed = self.qkv(x)
        if self.head_first:
            query, key, value = packed.unflatten(1, (self.num_heads, -1)).chunk(3, dim=2)
        else:
            query, key, value = packed.unflatten(1, (3, self.num_heads, -1)).unbind(1)
        bias = None if self.rel_pos is None else self.rel_pos.get_bias()[0].to(query.dtype)
        # Where timm calls scaled_dot_product_attention it does not use its own scale.
        scale = None if self.fused_attn else self.scale
        out = patch_attention(query, key, value, 1, bias=bias, scale=scale, backend=self.mvk_backend)
        return self.proj_drop(self.proj(out.flatten(1, 2)))


SWAPPED = SwappedAttention2d
