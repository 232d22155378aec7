"""``LevitAttention`` and ``LevitAttentionSubsample`` of LeViT in transformers, between their projections.

Downsampling is attention from a smaller map to the whole one. In eval mode the originals cache the gathered biases, and
a change of the parameter does not update the cache; here they are gathered in every call.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.models.levit.modeling_levit import LevitAttention, LevitAttentionSubsample

from mvkernels.ops.patch_attention import patch_attention
from mvkernels.swap.eligibility import asked, log_once, not_its_own, replaced, unusual_call
from mvkernels.swap.swapped import Swapped
from mvkernels.swap.windows import channels_last, gathered, map_of


def why_not(module: Any) -> str:
    """Why the fused form cannot replace this attention in its current state; empty if it can."""
    kind = module.mvk_original if isinstance(module, Swapped) else type(module)
    reason = replaced(kind, "forward", "get_attention_biases") or not_its_own(module, "get_attention_biases")
    biases, index = module.attention_biases, module.attention_bias_idxs
    if not reason and (biases.dim() != 2 or biases.shape[0] != module.num_attention_heads or index.dim() != 2):
        reason = f"attention_biases is {tuple(biases.shape)}, want ({module.num_attention_heads}, offsets)"
    return reason


def _declines(self: Any, hidden_state: Tensor) -> str:
    reason = unusual_call(hidden_state, axes=3) or asked(why_not, self)
    wanted = 0 if reason else self.attention_bias_idxs.shape[1]
    if not reason and hidden_state.shape[1] != wanted:
        reason = f"its biases are for {wanted} tokens, but the input has {hidden_state.shape[1]}"
    if reason:
        log_once(self, reason)
    return reason


def _maps(self: Any, projected: Tensor) -> Tensor:
    """Tokens (B, N, C) as a map (B, heads, C / heads, 1, N): no pixel needs to know its place."""
    return map_of(projected[:, None], self.num_attention_heads)


def _attend(self: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    bias = gathered(self.attention_biases, self.attention_bias_idxs).to(query.dtype)
    out = patch_attention(query, key, value, 1, bias=bias, scale=self.scale, backend=self.mvk_backend)
    return self.projection(self.activation(channels_last(out)[:, 0]))


class SwappedAttention(Swapped):
    """A ``LevitAttention`` that calls :func:`mvkernels.patch_attention` with a patch of 1."""

    def forward(self: Any, hidden_state: Tensor) -> Tensor:
        """hidden_state (B, N, C) -> (B, N, C)."""
        if _declines(self, hidden_state):
            return LevitAttention.forward(self, hidden_state)
        sizes = (self.key_dim, self.key_dim, self.attention_ratio * self.key_dim)
        return _attend(self, *_maps(self, self.queries_keys_values(hidden_state)).split(sizes, dim=2))


class SwappedAttentionSubsample(Swapped):
    """A ``LevitAttentionSubsample`` that calls :func:`mvkernels.patch_attention` between two maps."""

    def forward(self: Any, hidden_state: Tensor) -> Tensor:
        """hidden_state (B, N, C) -> (B, M, C_out)."""
        if _declines(self, hidden_state):
            return LevitAttentionSubsample.forward(self, hidden_state)
        key, value = _maps(self, self.keys_values(hidden_state)).split(
            (self.key_dim, self.attention_ratio * self.key_dim), dim=2
        )
        return _attend(self, _maps(self, self.queries(self.queries_subsample(hidden_state))), key, value)


_FORMS: dict[type, type[Swapped]] = {
    LevitAttention: SwappedAttention,
    LevitAttentionSubsample: SwappedAttentionSubsample,
}


def form(module: Any) -> type[Swapped]:
    """The fused form of a module of one of these classes."""
    return _FORMS[type(module)]
