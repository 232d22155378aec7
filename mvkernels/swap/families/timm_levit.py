"""``Attention`` and ``AttentionDownsample`` of LeViT in timm (``timm.models.levit``), between their projections.

Downsampling is attention from a smaller map to the whole one. In eval mode timm caches the gathered biases, and a
change of the parameter does not update the cache; here they are gathered in every call.
"""

from __future__ import annotations

from typing import Any

from timm.models.levit import Attention, AttentionDownsample
from torch import Tensor

from mvkernels.ops.patch_attention import patch_attention
from mvkernels.swap.eligibility import asked, log_once, not_its_own, replaced, unusual_call
from mvkernels.swap.swapped import Swapped
from mvkernels.swap.windows import gathered


def why_not(module: Any) -> str:
    """Why the fused form cannot replace this attention in its current state; empty if it can."""
    kind = module.mvk_original if isinstance(module, Swapped) else type(module)
    reason = replaced(kind, "forward", "get_attention_biases") or not_its_own(module, "get_attention_biases")
    biases, index = module.attention_biases, module.attention_bias_idxs
    if not reason and (biases.dim() != 2 or biases.shape[0] != module.num_heads or index.dim() != 2):
        reason = f"attention_biases is {tuple(biases.shape)}, want ({module.num_heads}, offsets)"
    return reason


def _maps(self: Any, packed: Tensor) -> Tensor:
    """A projection's result as maps (B, heads, size, 1, tokens), or (B, heads, size, H, W) of a convolution."""
    if self.use_conv:
        return packed.unflatten(1, (self.num_heads, -1))
    return packed.unflatten(-1, (self.num_heads, -1))[:, None].permute(0, 3, 4, 1, 2)


def _attend(self: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    bias = gathered(self.attention_biases, self.attention_bias_idxs).to(query.dtype)
    out = patch_attention(query, key, value, 1, bias=bias, scale=self.scale, backend=self.mvk_backend)
    return self.proj(out.flatten(1, 2) if self.use_conv else out.permute(0, 3, 4, 1, 2).flatten(-2)[:, 0])


def _declines(self: Any, x: Tensor) -> str:
    reason = unusual_call(x, axes=4 if self.use_conv else 3) or asked(why_not, self)
    if not reason:
        tokens = x.shape[2] * x.shape[3] if self.use_conv else x.shape[1]
        wanted = self.attention_bias_idxs.shape[1]
        if tokens != wanted:
            reason = f"its biases are for {wanted} tokens, but the input has {tokens}"
    if reason:
        log_once(self, reason)
    return reason


class SwappedAttention(Swapped):
    """LeViT's ``Attention`` that calls :func:`mvkernels.patch_attention` with a patch of 1."""

    def forward(self: Any, x: Tensor) -> Tensor:
        """x (B, N, C), or with ``use_conv`` (B, C, H, W), and the same out."""
        if _declines(self, x):
            return Attention.forward(self, x)
        return _attend(self, *_maps(self, self.qkv(x)).split((self.key_dim, self.key_dim, self.val_dim), dim=2))


class SwappedAttentionDownsample(Swapped):
    """LeViT's ``AttentionDownsample`` that calls :func:`mvkernels.patch_attention` between two maps."""

    def forward(self: Any, x: Tensor) -> Tensor:
        """x (B, N, C) -> (B, M, C_out), or with ``use_conv`` (B, C, H, W) -> (B, C_out, H / stride, W / stride)."""
        if _declines(self, x):
            return AttentionDownsample.forward(self, x)
        return _attend(
            self, _maps(self, self.q(x)), *_maps(self, self.kv(x)).split((self.key_dim, self.val_dim), dim=2)
        )


_FORMS: dict[type, type[Swapped]] = {Attention: SwappedAttention, AttentionDownsample: SwappedAttentionDownsample}


def form(module: Any) -> type[Swapped]:
    """The fused form of a module of one of these classes."""
    return _FORMS[type(module)]
