"""``MaskFormerSwinLayer``, the Swin of MaskFormer in transformers. Its window never shrinks, and its shift stays."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.models.maskformer.modeling_maskformer_swin import (
    MaskFormerSwinAttention,
    MaskFormerSwinLayer,
    MaskFormerSwinSelfAttention,
    MaskFormerSwinSelfOutput,
)

from mvkernels.swap.eligibility import not_its_own, replaced
from mvkernels.swap.swapped import Swapped
from mvkernels.swap.transformers_windows import before_norm, declines, not_attention

_KINDS = (MaskFormerSwinAttention, MaskFormerSwinSelfAttention, MaskFormerSwinSelfOutput)

CALLS_PARTS = True


def why_not(layer: Any) -> str:
    """Why the fused form cannot replace this ``MaskFormerSwinLayer`` in its current state; empty if it can."""
    return (
        replaced(MaskFormerSwinLayer, "forward", "get_attn_mask", "maybe_pad")
        or not_its_own(layer, "get_attn_mask", "maybe_pad")
        or not_attention(layer.attention, _KINDS)
    )


class SwappedLayer(Swapped):
    """A ``MaskFormerSwinLayer`` that calls :func:`mvkernels.window_attention`: without roll, partition and mask."""

    def forward(
        self: Any, hidden_states: Tensor, input_dimensions: tuple[int, int], output_attentions: Any = False
    ) -> Any:
        """hidden_states (B, H * W, C) -> a tuple of the same."""
        given = "output_attentions" if output_attentions else ""
        if declines(self, why_not, hidden_states, input_dimensions, given=given):
            return MaskFormerSwinLayer.forward(self, hidden_states, input_dimensions, output_attentions)
        return before_norm(self, hidden_states, input_dimensions)


SWAPPED = SwappedLayer
