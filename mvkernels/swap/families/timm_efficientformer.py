"""``Attention`` of EfficientFormer in timm (``timm.models.efficientformer``), between its two Linears.

In eval mode timm caches the gathered biases, and a change of the parameter does not update the cache. The fused form
gathers the biases in every call. timm's ``Attention.train()`` and ``eval()`` return None.
"""

from __future__ import annotations

from typing import Any

from timm.models.efficientformer import Attention
from torch import Tensor

from mvkernels.swap.eligibility import asked, log_once, not_its_own, replaced, unusual_call
from mvkernels.swap.position_biases import as_map, attend
from mvkernels.swap.swapped import Swapped
from mvkernels.swap.windows import channels_last

CALLS_PARTS = True


def why_not(module: Any) -> str:
    """Why the fused form cannot replace this ``Attention`` in its current state; empty if it can."""
    reason = replaced(Attention, "forward", "get_attention_biases") or not_its_own(module, "get_attention_biases")
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
        packed = as_map(self.qkv(x), self.num_heads)
        out = attend(self, *packed.split((self.key_dim, self.key_dim, self.val_dim), dim=2))
        return self.proj(channels_last(out)[:, 0])


SWAPPED = SwappedAttention
