"""``Swinv2Layer`` of Swin V2 in transformers: its windows, in place.

Queries and keys are normalized, and biases come from an MLP of the offsets; both stay in PyTorch. The norms follow
attention and MLP. Window and shift are those of construction, whatever the map.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.models.swinv2.modeling_swinv2 import (
    Swinv2Attention,
    Swinv2Layer,
    Swinv2SelfAttention,
    Swinv2SelfOutput,
)

from mvkernels.swap.eligibility import not_its_own, replaced
from mvkernels.swap.swapped import Swapped
from mvkernels.swap.transformers_windows import attend_with_parts, declines, not_attention
from mvkernels.swap.windows import gathered

_KINDS = (Swinv2Attention, Swinv2SelfAttention, Swinv2SelfOutput)

CALLS_PARTS = True


def why_not(layer: Any) -> str:
    """Why the fused form cannot replace this ``Swinv2Layer`` in its current state; empty if it can."""
    return (
        replaced(Swinv2Layer, "forward", "get_attn_mask", "maybe_pad")
        or not_its_own(layer, "get_attn_mask", "maybe_pad")
        or not_attention(layer.attention, _KINDS)
    )


class SwappedLayer(Swapped):
    """A ``Swinv2Layer`` that calls :func:`mvkernels.window_attention`: without roll, partition and mask."""

    def forward(
        self: Any, hidden_states: Tensor, input_dimensions: tuple[int, int], output_attentions: Any = False
    ) -> Any:
        """hidden_states (B, H * W, C) -> a tuple of the same."""
        given = "output_attentions" if output_attentions else ""
        if declines(self, why_not, hidden_states, input_dimensions, given=given):
            return Swinv2Layer.forward(self, hidden_states, input_dimensions, output_attentions)
        inner = self.attention.self
        table = inner.continuous_position_bias_mlp(inner.relative_coords_table).flatten(0, 2).t()
        bias = gathered(16 * torch.sigmoid(table), inner.relative_position_index)
        attended = attend_with_parts(self, hidden_states, input_dimensions, bias, inner.logit_scale)
        hidden_states = hidden_states + self.drop_path(self.layernorm_before(attended))
        out = self.layernorm_after(self.output(self.intermediate(hidden_states)))
        return (hidden_states + self.drop_path(out),)


SWAPPED = SwappedLayer
