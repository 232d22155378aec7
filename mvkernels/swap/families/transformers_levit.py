"""``LevitAttention`` and ``LevitAttentionSubsample`` of LeViT in transformers, between their projections."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.models.levit.modeling_levit import LevitAttention, LevitAttentionSubsample

from mvkernels.swap.position_biases import as_map, attend, declines, why_not
from mvkernels.swap.swapped import Swapped
from mvkernels.swap.windows import channels_last

__all__ = ["form", "why_not"]

CALLS_PARTS = True


def _attend(self: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return self.projection(self.activation(channels_last(attend(self, query, key, value))[:, 0]))


class SwappedAttention(Swapped):
    """A ``LevitAttention`` that calls :func:`mvkernels.patch_attention` with a patch of 1."""

    def forward(self: Any, hidden_state: Tensor) -> Tensor:
        """hidden_state (B, N, C) -> (B, N, C)."""
        if declines(self, hidden_state):
            return LevitAttention.forward(self, hidden_state)
        sizes = (self.key_dim, self.key_dim, self.attention_ratio * self.key_dim)
        packed = as_map(self.queries_keys_values(hidden_state), self.num_attention_heads)
        return _attend(self, *packed.split(sizes, dim=2))


class SwappedAttentionSubsample(Swapped):
    """A ``LevitAttentionSubsample`` that calls :func:`mvkernels.patch_attention` between two maps."""

    def forward(self: Any, hidden_state: Tensor) -> Tensor:
        """hidden_state (B, N, C) -> (B, M, C_out)."""
        if declines(self, hidden_state):
            return LevitAttentionSubsample.forward(self, hidden_state)
        heads, sizes = self.num_attention_heads, (self.key_dim, self.attention_ratio * self.key_dim)
        query = as_map(self.queries(self.queries_subsample(hidden_state)), heads)
        key, value = as_map(self.keys_values(hidden_state), heads).split(sizes, dim=2)
        return _attend(self, query, key, value)


_FORMS: dict[type, type[Swapped]] = {
    LevitAttention: SwappedAttention,
    LevitAttentionSubsample: SwappedAttentionSubsample,
}


def form(module: Any) -> type[Swapped]:
    """The fused form of a module of one of these classes."""
    return _FORMS[type(module)]
