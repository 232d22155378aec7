"""``SwinTransformerV2Block`` of Swin V2 in timm (``timm.models.swin_transformer_v2``): its windows, in place.

Queries and keys are normalized, and biases come from an MLP of the offsets; both stay in PyTorch.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.models.swin_transformer_v2 import SwinTransformerV2Block, WindowAttention
from torch import Tensor
from torch.nn.functional import linear

from mvkernels.swap.eligibility import asked, drops_attention, not_its_own, not_plain_parts, replaced
from mvkernels.swap.packing.kinds import sizes_of
from mvkernels.swap.packing.plans import Keep, Run
from mvkernels.swap.packing.windows import not_continuous, projections
from mvkernels.swap.swapped import Swapped
from mvkernels.swap.timm_parts import WINDOW_PARTS, declines, masked, other_mask
from mvkernels.swap.windows import attend_in_windows, gathered, maps_of, other_windows

CALLS_PARTS = True


def why_not(block: Any) -> str:
    """Why the fused form cannot replace this ``SwinTransformerV2Block`` in its current state; empty if it can."""
    return (
        replaced(SwinTransformerV2Block, "forward", "_attn", "get_attn_mask")
        or not_its_own(block, "_attn", "get_attn_mask")
        or not_plain_parts(block, {"attn": WindowAttention, **WINDOW_PARTS})
    )


def _bias(attention: Any) -> Tensor | None:
    """That of query, key and value."""
    parts = (attention.q_bias, attention.k_bias, attention.v_bias)
    return None if parts[0] is None else torch.cat(parts)


def _biases(attention: Any) -> Tensor:
    """Those of the positions."""
    table = attention.cpb_mlp(attention.relative_coords_table).view(-1, attention.num_heads).t()
    return gathered(16 * torch.sigmoid(table), attention.relative_position_index)


class SwappedBlock(Swapped):
    """A ``SwinTransformerV2Block`` that calls :func:`mvkernels.window_attention`: without roll, partition and mask."""

    mvk_runs = "_attn"
    mvk_calls = ("norm1", "drop_path1", "mlp", "norm2", "drop_path2")
    mvk_methods = ("_conv_forward", "_attn", "get_attn_mask")

    def mvk_sizes(self: Any) -> tuple[int, int]:
        """Of the attention alone: rows of its projection's features."""
        return sizes_of(self.attn.proj)

    def mvk_plan(self: Any, keep: Keep) -> Run | None:
        """The attention alone; norms, MLP and sums are as they were."""
        attention = self.attn
        reason = asked(why_not, self) or drops_attention(attention, attention.attn_drop)
        if reason or not_continuous(attention.cpb_mlp):
            return None
        products = projections(attention, _bias(attention), (attention.proj_drop,), keep)
        if products is None:
            return None
        project, out = products
        heads, index, biases = attention.num_heads, attention.relative_position_index, keep(_biases(attention))
        window, shift = tuple(self.window_size), tuple(self.shift_size)
        resolution = masked(self)
        settings = {"logit_scale": attention.logit_scale, "roll_first": True, "backend": self.mvk_backend}

        def run(x: Tensor) -> Tensor:
            reason = other_mask(x, resolution) or other_windows(window, shift, index)
            if reason:
                raise RuntimeError(reason)
            return attend_in_windows(x, window, shift, lambda x: maps_of(project(x), heads), biases, out, **settings)

        return run

    def forward(self: Any, x: Tensor) -> Tensor:
        """x (B, H, W, C) -> (B, H, W, C)."""
        return SwinTransformerV2Block.forward(self, x)

    def _attn(self: Any, x: Tensor) -> Tensor:
        if declines(self, why_not, x):
            return SwinTransformerV2Block._attn(self, x)
        attention, bias = self.attn, _bias(self.attn)
        return attend_in_windows(
            x,
            self.window_size,
            self.shift_size,
            lambda x: maps_of(linear(x, attention.qkv.weight, bias), attention.num_heads),
            _biases(attention),
            lambda x: attention.proj_drop(attention.proj(x)),
            logit_scale=attention.logit_scale,
            roll_first=True,
            backend=self.mvk_backend,
        )


SWAPPED = SwappedBlock
