"""Attention with position biases that are gathered, of LeViT (timm, transformers) and of both EfficientFormers.

Where they make the map smaller it is attention from the smaller map to the whole one. In eval mode the originals cache
the gathered biases, and a change of the parameter does not update the cache; here they are gathered in every call.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mvkernels.ops.patch_attention import patch_attention
from mvkernels.swap.eligibility import asked, log_once, not_its_own, replaced, unusual_call
from mvkernels.swap.swapped import Swapped
from mvkernels.swap.windows import gathered, map_of


def heads_of(module: Any) -> int:
    """The number of heads, by the name that the package has for it."""
    heads: int = module.num_heads if hasattr(module, "num_heads") else module.num_attention_heads
    return heads


def why_not(module: Any) -> str:
    """Why the fused form cannot replace this attention of LeViT in its current state; empty if it can."""
    kind = module.mvk_original if isinstance(module, Swapped) else type(module)
    reason = replaced(kind, "forward", "get_attention_biases") or not_its_own(module, "get_attention_biases")
    biases, index, heads = module.attention_biases, module.attention_bias_idxs, heads_of(module)
    if not reason and (biases.dim() != 2 or biases.shape[0] != heads or index.dim() != 2):
        reason = f"attention_biases is {tuple(biases.shape)}, want ({heads}, offsets)"
    return reason


def declines(module: Any, x: Tensor, axes: int = 3) -> str:
    """Why a call of LeViT on tokens (B, N, C), or with four axes on a map (B, C, H, W), needs the original forward."""
    reason = unusual_call(x, axes) or asked(why_not, module)
    if not reason:
        tokens = x.shape[1] if axes == 3 else x.shape[2] * x.shape[3]
        wanted = module.attention_bias_idxs.shape[1]
        if tokens != wanted:
            reason = f"its biases are for {wanted} tokens, but the input has {tokens}"
    if reason:
        log_once(module, reason)
    return reason


def as_map(projected: Tensor, heads: int) -> Tensor:
    """Tokens (B, N, C) as a map (B, heads, C / heads, 1, N): no pixel needs to know its place."""
    return map_of(projected[:, None], heads)


def attend(module: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The attention of maps, with the module's biases and scale."""
    bias = gathered(module.attention_biases, module.attention_bias_idxs).to(query.dtype)
    return patch_attention(query, key, value, 1, bias=bias, scale=module.scale, backend=module.mvk_backend)
