"""``SwinTransformerBlock`` of Swin in timm (``timm.models.swin_transformer``): its windows, in place.

``set_input_size`` changes windows and tables of a block, so that everything is read in each call.
"""

from __future__ import annotations

from typing import Any

from timm.models.swin_transformer import SwinTransformerBlock, WindowAttention
from torch import Tensor, nn

from mvkernels.swap.eligibility import (
    asked,
    drops_attention,
    log_once,
    not_its_own,
    not_plain,
    replaced,
    unusual_call,
)
from mvkernels.swap.swapped import Swapped
from mvkernels.swap.windows import attend_in_windows, gathered, maps_of, other_mask


def why_not(block: Any) -> str:
    """Why the fused form cannot replace this ``SwinTransformerBlock`` in its current state; empty if it can."""
    attention = block.attn
    return (
        replaced(SwinTransformerBlock, "forward", "_attn", "get_attn_mask")
        or not_its_own(block, "_attn", "get_attn_mask")
        or not_plain(attention, WindowAttention, "attn")
        or replaced(WindowAttention, "_get_rel_pos_bias")
        or not_its_own(attention, "_get_rel_pos_bias")
        or not_plain(attention.qkv, nn.Linear, "attn.qkv")
        or not_plain(attention.softmax, nn.Softmax, "attn.softmax")
        or not_plain(attention.attn_drop, nn.Dropout, "attn.attn_drop")
        or not_plain(attention.proj, nn.Linear, "attn.proj")
        or not_plain(attention.proj_drop, nn.Dropout, "attn.proj_drop")
    )


class SwappedBlock(Swapped):
    """A ``SwinTransformerBlock`` that calls :func:`mvkernels.window_attention`: without roll, partition and mask."""

    def forward(self: Any, x: Tensor) -> Tensor:
        """x (B, H, W, C) -> (B, H, W, C)."""
        return SwinTransformerBlock.forward(self, x)

    def _attn(self: Any, x: Tensor) -> Tensor:
        reason = unusual_call(x) or asked(why_not, self) or other_mask(self, x)
        attention = self.attn
        reason = reason or drops_attention(attention, attention.attn_drop)
        if reason:
            log_once(self, reason)
            return SwinTransformerBlock._attn(self, x)
        return attend_in_windows(
            x,
            self.window_size,
            self.shift_size,
            lambda x: maps_of(attention.qkv(x), attention.num_heads),
            gathered(attention.relative_position_bias_table.t(), attention.relative_position_index),
            lambda x: attention.proj_drop(attention.proj(x)),
            scale=None if attention.fused_attn else attention.scale,  # of fused attention timm uses the default
            roll_first=True,
            backend=self.mvk_backend,
        )


SWAPPED = SwappedBlock
