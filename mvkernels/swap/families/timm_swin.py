"""``SwinTransformerBlock`` of Swin in timm (``timm.models.swin_transformer``): its windows, in place.

``set_input_size`` changes windows and tables of a block, so that everything is read in each call.
"""

from __future__ import annotations

from typing import Any

from timm.models.swin_transformer import SwinTransformerBlock, WindowAttention
from torch import Tensor

from mvkernels.swap.eligibility import not_its_own, not_plain_parts, replaced
from mvkernels.swap.swapped import Swapped
from mvkernels.swap.timm_parts import WINDOW_PARTS, declines, scale_of
from mvkernels.swap.windows import attend_in_windows, gathered, maps_of

CALLS_PARTS = True


def why_not(block: Any) -> str:
    """Why the fused form cannot replace this ``SwinTransformerBlock`` in its current state; empty if it can."""
    return (
        replaced(SwinTransformerBlock, "forward", "_attn", "get_attn_mask")
        or not_its_own(block, "_attn", "get_attn_mask")
        or not_plain_parts(block, {"attn": WindowAttention, **WINDOW_PARTS})
        or replaced(WindowAttention, "_get_rel_pos_bias")
        or not_its_own(block.attn, "_get_rel_pos_bias")
    )


class SwappedBlock(Swapped):
    """A ``SwinTransformerBlock`` that calls :func:`mvkernels.window_attention`: without roll, partition and mask."""

    def forward(self: Any, x: Tensor) -> Tensor:
        """x (B, H, W, C) -> (B, H, W, C)."""
        return SwinTransformerBlock.forward(self, x)

    def _attn(self: Any, x: Tensor) -> Tensor:
        if declines(self, why_not, x):
            return SwinTransformerBlock._attn(self, x)
        attention = self.attn
        return attend_in_windows(
            x,
            self.window_size,
            self.shift_size,
            lambda x: maps_of(attention.qkv(x), attention.num_heads),
            gathered(attention.relative_position_bias_table.t(), attention.relative_position_index),
            lambda x: attention.proj_drop(attention.proj(x)),
            scale=scale_of(attention),
            roll_first=True,
            backend=self.mvk_backend,
        )


SWAPPED = SwappedBlock
