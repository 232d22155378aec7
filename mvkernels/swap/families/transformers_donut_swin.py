"""``DonutSwinLayer``, the Swin of Donut in transformers: its windows, in place.

Its call on a map that is not larger than the window sets shift and window for good.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.models.donut.modeling_donut_swin import (
    DonutSwinAttention,
    DonutSwinLayer,
    DonutSwinSelfAttention,
    DonutSwinSelfOutput,
)

from mvkernels.swap.eligibility import not_its_own, replaced
from mvkernels.swap.swapped import Swapped
from mvkernels.swap.transformers_windows import before_norm, declines, not_attention

_KINDS = (DonutSwinAttention, DonutSwinSelfAttention, DonutSwinSelfOutput)
_METHODS = ("set_shift_and_window_size", "get_attn_mask", "maybe_pad")

CALLS_PARTS = True


def why_not(layer: Any) -> str:
    """Why the fused form cannot replace this ``DonutSwinLayer`` in its current state; empty if it can."""
    return (
        replaced(DonutSwinLayer, "forward", *_METHODS)
        or not_its_own(layer, *_METHODS)
        or not_attention(layer.attention, _KINDS)
    )


class SwappedLayer(Swapped):
    """A ``DonutSwinLayer`` that calls :func:`mvkernels.window_attention`: without roll, partition and mask."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        input_dimensions: tuple[int, int],
        output_attentions: Any = False,
        always_partition: Any = False,
    ) -> Any:
        """hidden_states (B, H * W, C) -> a tuple of the same."""
        given = "output_attentions" if output_attentions else ""
        if declines(self, why_not, hidden_states, input_dimensions, given=given, resize=not always_partition):
            return DonutSwinLayer.forward(self, hidden_states, input_dimensions, output_attentions, always_partition)
        return before_norm(self, hidden_states, input_dimensions)


SWAPPED = SwappedLayer
