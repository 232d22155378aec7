"""The linear self-attention of Sana's transformer in diffusers, exchanged through ``Attention.set_processor``.

Everything around the attention (projections, norms of queries and keys, dropout) is called as before. Sana's video
model is not covered: it rotates queries and keys after the ReLU, which is another formula and another processor.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, SanaLinearAttnProcessor2_0
from torch import Tensor, nn

from mvkernels.ops.relu_linear_attention import relu_linear_attention
from mvkernels.swap.eligibility import (
    asked,
    class_name,
    log_once,
    not_exactly,
    not_linear,
    not_plain,
    replaced,
    unusual_call,
)

CALLS_PARTS = True


def why_not(module: Any) -> str:
    """Why the fused processor cannot replace the processor of this ``Attention``; empty if it can."""
    reason = not_exactly(module, Attention)
    if reason:
        return reason
    processor = module.processor
    if type(processor) is not SanaLinearAttnProcessor2_0:
        return f"its processor is a {class_name(type(processor))}, want a SanaLinearAttnProcessor2_0"
    return replaced(SanaLinearAttnProcessor2_0, "__call__") or _why_not_now(module) or _asked()[1]


def _why_not_now(attn: Any) -> str:
    """Why the fused processor cannot run now. It can change after a swap, so it is checked in every call."""
    q, k, v, like = attn.to_q, attn.to_k, attn.to_v, attn.to_q.weight
    reason = (
        not_linear(q, like, "to_q")
        or not_linear(k, like, "to_k")
        or not_linear(v, like, "to_v")
        or not_linear(attn.to_out[0], like, "to_out.0")
        or not_plain(attn.to_out[1], nn.Dropout, "to_out.1")
    )
    if reason:
        return reason
    if not q.out_features == k.out_features == v.out_features or q.out_features % attn.heads:
        return f"to_q, to_k and to_v do not have equal outputs that split into {attn.heads} heads"
    return ""


class FusedSanaLinearAttnProcessor(SanaLinearAttnProcessor2_0):  # type: ignore[misc]
    """A ``SanaLinearAttnProcessor2_0`` that calls :func:`mvkernels.relu_linear_attention`.

    The class has the name of the original, because tools look for it.

    Args:
        original: the processor that is replaced. It still runs in calls that the fused one does not support: with a
            mask, with encoder_hidden_states, or with changed projections.
        eps: added to the divisor; None for the value of the original.
    """

    mvk_backend: str | None = None

    def __init__(self, original: SanaLinearAttnProcessor2_0, eps: float | None = None) -> None:
        self.mvk_original = original
        self.eps = _asked()[0] if eps is None else eps

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _blank, (), self.__dict__  # found by its name it would be the original

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """(B, pixels, C) -> (B, pixels, C_out)."""
        reason = unusual_call(hidden_states, axes=3)
        if encoder_hidden_states is not None:
            reason = "the call has encoder_hidden_states (cross-attention)"
        elif attention_mask is not None:
            reason = "the call has an attention_mask"
        reason = reason or replaced(SanaLinearAttnProcessor2_0, "__call__") or asked(_why_not_now, attn)
        if reason:
            log_once(self, reason)
            return self.mvk_original(attn, hidden_states, encoder_hidden_states, attention_mask)
        return self.fused(attn, hidden_states)

    def fused(self, attn: Any, hidden_states: Tensor) -> Tensor:
        """(B, pixels, C) -> (B, pixels, C_out)."""
        dtype = hidden_states.dtype
        query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        if attn.norm_k is not None:
            key = attn.norm_k(key)
        if not query.dtype == key.dtype == value.dtype:  # a norm may return float32
            query, key, value = query.float(), key.float(), value.float()
        maps = [_map(t, attn.heads) for t in (query, key, value)]
        out = relu_linear_attention(*maps, eps=self.eps, backend=self.mvk_backend)
        out = out.permute(0, 3, 4, 1, 2).flatten(3).squeeze(1).to(dtype)
        out = attn.to_out[1](attn.to_out[0](out))
        return out.clip(-65504, 65504) if dtype == torch.float16 else out


def _blank() -> FusedSanaLinearAttnProcessor:
    """An instance without state, with which unpickling and copying begin."""
    return FusedSanaLinearAttnProcessor.__new__(FusedSanaLinearAttnProcessor)


for _name in ("__name__", "__qualname__", "__module__"):
    setattr(FusedSanaLinearAttnProcessor, _name, getattr(SanaLinearAttnProcessor2_0, _name))


def _map(tokens: Tensor, heads: int) -> Tensor:
    """(B, pixels, C) -> (B, heads, C / heads, 1, pixels), a view: a channels-last map of one row."""
    return tokens.unflatten(-1, (heads, -1)).permute(0, 2, 3, 1).unsqueeze(3)


@functools.cache
def _asked() -> tuple[float, str]:
    """(eps of this diffusers version's processor, the reason against swapping it or an empty string).

    eps is not an attribute, so it is measured: for one pixel with q = k = v = c the result is c³ / (c² + eps). With
    this eps the fused form has to give the same result as the processor.
    """
    original = SanaLinearAttnProcessor2_0()

    def attention(heads: int) -> Any:
        parts = {name: nn.Identity() for name in ("to_q", "to_k", "to_v")}
        return SimpleNamespace(**parts, norm_q=None, norm_k=None, heads=heads, to_out=[nn.Identity(), nn.Identity()])

    try:
        with torch.no_grad():
            c = 3e-8
            seen = float(original(attention(1), torch.full((1, 1, 1), c, dtype=torch.float32, device="cpu")))
            eps = float(f"{max(0.0, c * c * (c / seen - 1.0)):.3g}")  # the constant, without rounding errors
            generator = torch.Generator().manual_seed(0)
            x = torch.randn(2, 7, 6, generator=generator, dtype=torch.float32, device="cpu")
            processor = FusedSanaLinearAttnProcessor(original, eps)
            processor.mvk_backend = "reference"
            difference = float((processor.fused(attention(2), x) - original(attention(2), x)).abs().max())
    except Exception as error:  # whatever another version may raise
        lines = str(error).splitlines() or [type(error).__name__]
        return 0.0, f"the processor of this diffusers version cannot be compared with the known formula: {lines[0]}"
    if not difference <= 1e-5:
        return 0.0, "the processor of this diffusers version computes something other than the known formula"
    return eps, ""


FUSED = FusedSanaLinearAttnProcessor
