"""``SwinLayer`` of Swin in transformers: its windows, in place.

Its call on a map that is not larger than the window sets shift and window for good. Its second result is None with
sdpa attention; eager attention returns the probabilities, which the fused form does not make.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.models.swin import modeling_swin
from transformers.models.swin.modeling_swin import SwinLayer

from mvkernels.swap.eligibility import not_its_own, not_plain, replaced
from mvkernels.swap.swapped import Swapped
from mvkernels.swap.transformers_windows import attend, declines
from mvkernels.swap.windows import gathered

_METHODS = ("set_shift_and_window_size", "get_attn_mask", "maybe_pad", "cyclic_shift")

CALLS_PARTS = True


def why_not(layer: Any) -> str:
    """Why the fused form cannot replace this ``SwinLayer`` in its current state; empty if it can."""
    attention = layer.attention
    # Other versions have other classes under the same names, or none.
    reason = (
        replaced(SwinLayer, "forward", *_METHODS)
        or not_its_own(layer, *_METHODS)
        or not_plain(attention, modeling_swin.SwinAttention, "attention")
        or not_plain(
            attention.relative_position_bias,
            modeling_swin.SwinRelativePositionBias,
            "attention.relative_position_bias",
        )
        or not_plain(layer.dropout, nn.Dropout, "dropout")
    )
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        reason = reason or not_plain(getattr(attention, name), nn.Linear, f"attention.{name}")
    chosen = attention.config._attn_implementation
    if not reason and chosen != "sdpa":
        reason = f"its attention implementation is {chosen or 'eager'}, want sdpa, which returns no probabilities"
    return reason


def _parts(layer: Any) -> tuple[Any, Any, Tensor]:
    attention = layer.attention
    return attention, attention.attention_dropout, attention.relative_position_bias.relative_position_index


class SwappedLayer(Swapped):
    """A ``SwinLayer`` that calls :func:`mvkernels.window_attention`: without roll, partition and mask."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        input_dimensions: tuple[int, int],
        always_partition: Any = False,
        **kwargs: Any,
    ) -> Any:
        """hidden_states (B, H * W, C) -> (the same, None)."""
        asked_for = [name for name, value in kwargs.items() if value is not None and value is not False]
        given = asked_for[0] if asked_for else ""
        resize = not always_partition
        if declines(self, why_not, hidden_states, input_dimensions, given=given, resize=resize, parts=_parts):
            return SwinLayer.forward(self, hidden_states, input_dimensions, always_partition, **kwargs)
        attention = self.attention
        biases = attention.relative_position_bias
        area = self.window_size**2
        bias = gathered(
            biases.relative_position_bias_table.t(), biases.relative_position_index.unflatten(0, (area, area))
        )
        attended = attend(
            self,
            self.layernorm_before(hidden_states),
            input_dimensions,
            (attention.q_proj, attention.k_proj, attention.v_proj),
            bias,
            lambda x: self.dropout(attention.o_proj(x)),
            scale=attention.scaling,
        )
        hidden_states = hidden_states + self.drop_path(attended)
        return hidden_states + self.dropout(self.mlp(self.layernorm_after(hidden_states))), None


SWAPPED = SwappedLayer
