"""``SwinTransformerV2Block`` of Swin V2 in timm (``timm.models.swin_transformer_v2``): its windows, in place.

Queries and keys are normalized, and biases come from an MLP of the offsets; both stay in PyTorch.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.models.swin_transformer_v2 import SwinTransformerV2Block, WindowAttention
from torch import Tensor
from torch.nn.functional import linear

from mvkernels.swap.eligibility import not_its_own, not_plain_parts, replaced
from mvkernels.swap.swapped import Swapped
from mvkernels.swap.timm_parts import WINDOW_PARTS, declines
from mvkernels.swap.windows import attend_in_windows, gathered, maps_of

CALLS_PARTS = True


def why_not(block: Any) -> str:
    """Why the fused form cannot replace this ``SwinTransformerV2Block`` in its current state; empty if it can."""
    return (
        replaced(SwinTransformerV2Block, "forward", "_attn", "get_attn_mask")
        or not_its_own(block, "_attn", "get_attn_mask")
        or not_plain_parts(block, {"attn": WindowAttention, **WINDOW_PARTS})
    )


class SwappedBlock(Swapped):
    """A ``SwinTransformerV2Block`` that calls :func:`mvkernels.window_attention`: without roll, partition and mask."""

    def forward(self: Any, x: Tensor) -> Tensor:
        """x (B, H, W, C) -> (B, H, W, C)."""
        return SwinTransformerV2Block.forward(self, x)

    def _attn(self: Any, x: Tensor) -> Tensor:
        if declines(self, why_not, x):
            return SwinTransformerV2Block._attn(self, x)
        attention = self.attn
        parts = (attention.q_bias, attention.k_bias, attention.v_bias)
        projections = None if parts[0] is None else torch.cat(parts)
        table = attention.cpb_mlp(attention.relative_coords_table).view(-1, attention.num_heads).t()
        return attend_in_windows(
            x,
            self.window_size,
            self.shift_size,
            lambda x: maps_of(linear(x, attention.qkv.weight, projections), attention.num_heads),
            gathered(16 * torch.sigmoid(table), attention.relative_position_index),
            lambda x: attention.proj_drop(attention.proj(x)),
            logit_scale=attention.logit_scale,
            roll_first=True,
            backend=self.mvk_backend,
        )


SWAPPED = SwappedBlock
