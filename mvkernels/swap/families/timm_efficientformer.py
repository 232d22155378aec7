"""``Attention`` of EfficientFormer in timm (``timm.models.efficientformer``), between its two Linears.

In eval mode timm caches the gathered biases, and a change of the parameter does not update the cache. The fused form
gathers the biases in every call. timm's ``Attention.train()`` and ``eval()`` return None.
"""

from __future__ import annotations

from typing import Any

from timm.models.efficientformer import Attention
from torch import Tensor

from mvkernels.ops.patch_attention import patch_attention
from mvkernels.swap.eligibility import asked, log_once, replaced, unusual_call
from mvkernels.swap.swapped import Swapped


def why_not(module: Any) -> str:
    """Why the fused form cannot replace this ``Attention`` in its current state; empty if it can."""
    reason = replaced(Attention, "forward", "get_attention_biases")
    if not reason and "get_attention_biases" in module.__dict__:
        reason = "it has a replaced get_attention_biases"
    if reason:
        return reason
    heads, biases = module.num_heads, module.attention_biases
    index = module.attention_bias_idxs
    if biases.dim() != 2 or biases.shape[0] != heads or index.dim() != 2 or index.shape[0] != index.shape[1]:
        return (
            f"attention_biases is {tuple(biases.shape)} and attention_bias_idxs is {tuple(index.shape)}, "
            f"want ({heads}, offsets) and (N, N)"
        )
    return ""


class SwappedAttention(Swapped):
    """An ``Attention`` that calls :func:`mvkernels.patch_attention` with a patch of 1."""

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x (B, N, C) -> (B, N, C)."""
        reason = "the call has other arguments than the tokens" if args or kwargs else unusual_call(x, axes=3)
        reason = reason or asked(why_not, self)
        index: Any = self.attention_bias_idxs
        if not reason and x.shape[1] != index.shape[0]:
            reason = f"its biases are for {index.shape[0]} tokens, but the input has {x.shape[1]}"
        if reason:
            log_once(self, reason)
            return Attention.forward(self, x, *args, **kwargs)
        # (B, N, heads * (q | k | v)) as maps (B, heads, size, 1, N): the position of a pixel does not matter here.
        packed = self.qkv(x).unflatten(-1, (self.num_heads, -1))[:, None].permute(0, 3, 4, 1, 2)
        query, key, value = packed.split((self.key_dim, self.key_dim, self.val_dim), dim=2)
        bias = self.attention_biases[:, index].to(query.dtype)
        out = patch_attention(query, key, value, 1, bias=bias, scale=self.scale, backend=self.mvk_backend)
        return self.proj(out.permute(0, 3, 4, 1, 2).flatten(-2)[:, 0])


SWAPPED = SwappedAttention
