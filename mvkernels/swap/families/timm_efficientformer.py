"""timm's EfficientFormer: ``Attention`` of ``timm.models.efficientformer``, between its two Linears.

timm keeps the gathered biases from one call in eval mode to the next; after an edit of the parameter they are stale.
The fused form gathers them in every call. timm's ``Attention.train()`` and ``eval()`` return None.
"""

from __future__ import annotations

from typing import Any

from timm.models.efficientformer import Attention
from torch import Tensor

from mvkernels.ops.patch_attention import patch_attention
from mvkernels.swap.eligibility import asked, log_once, replaced, unusual_call
from mvkernels.swap.swapped import Swapped


def why_not(module: Any) -> str:
    """Why the fused form cannot stand for this ``Attention`` as it is now; empty if it can."""
    reason = replaced(Attention, "forward", "get_attention_biases")
    if not reason and "get_attention_biases" in module.__dict__:
        reason = "it has had its get_attention_biases replaced"
    if reason:
        return reason
    heads, biases = module.num_heads, module.attention_biases
    index = module.attention_bias_idxs
    if biases.dim() != 2 or biases.shape[0] != heads or index.dim() != 2 or index.shape[0] != index.shape[1]:
        return f"its biases are {tuple(biases.shape)} and their index {tuple(index.shape)}"
    return ""


class SwappedAttention(Swapped):
    """An ``Attention`` whose scores, softmax and sums are :func:`mvkernels.patch_attention` with a patch of 1."""

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x (B, N, C) -> (B, N, C)."""
        reason = "it was called with more than tokens" if args or kwargs else unusual_call(x, axes=3)
        reason = reason or asked(why_not, self)
        index: Any = self.attention_bias_idxs
        if not reason and x.shape[1] != index.shape[0]:
            reason = f"it has biases for {index.shape[0]} tokens and got {x.shape[1]}"
        if reason:
            log_once(self, reason)
            return Attention.forward(self, x, *args, **kwargs)
        # (B, N, heads * (q | k | v)) as maps (B, heads, size, 1, N): which pixel is where does not matter here.
        packed = self.qkv(x).unflatten(-1, (self.num_heads, -1))[:, None].permute(0, 3, 4, 1, 2)
        query, key, value = packed.split((self.key_dim, self.key_dim, self.val_dim), dim=2)
        bias = self.attention_biases[:, index].to(query.dtype)
        out = patch_attention(query, key, value, 1, bias=bias, scale=self.scale, backend=self.mvk_backend)
        return self.proj(out.permute(0, 3, 4, 1, 2).flatten(-2)[:, 0])


SWAPPED = SwappedAttention
