"""``Attention`` and ``AttentionDownsample`` of LeViT in timm (``timm.models.levit``), between their projections."""

from __future__ import annotations

from typing import Any

from timm.models.levit import Attention, AttentionDownsample
from torch import Tensor

from mvkernels.swap.position_biases import as_map, attend, declines, why_not
from mvkernels.swap.swapped import Swapped
from mvkernels.swap.windows import channels_last

__all__ = ["form", "why_not"]

CALLS_PARTS = True


def _maps(self: Any, projected: Tensor) -> Tensor:
    return projected.unflatten(1, (self.num_heads, -1)) if self.use_conv else as_map(projected, self.num_heads)


def _attend(self: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    out = attend(self, query, key, value)
    return self.proj(out.flatten(1, 2) if self.use_conv else channels_last(out)[:, 0])


class SwappedAttention(Swapped):
    """LeViT's ``Attention`` that calls :func:`mvkernels.patch_attention` with a patch of 1."""

    def forward(self: Any, x: Tensor) -> Tensor:
        """x (B, N, C), or with ``use_conv`` (B, C, H, W), and the same out."""
        if declines(self, x, 4 if self.use_conv else 3):
            return Attention.forward(self, x)
        return _attend(self, *_maps(self, self.qkv(x)).split((self.key_dim, self.key_dim, self.val_dim), dim=2))


class SwappedAttentionDownsample(Swapped):
    """LeViT's ``AttentionDownsample`` that calls :func:`mvkernels.patch_attention` between two maps."""

    def forward(self: Any, x: Tensor) -> Tensor:
        """x (B, N, C) -> (B, M, C_out), or with ``use_conv`` (B, C, H, W) -> (B, C_out, H / stride, W / stride)."""
        if declines(self, x, 4 if self.use_conv else 3):
            return AttentionDownsample.forward(self, x)
        key, value = _maps(self, self.kv(x)).split((self.key_dim, self.val_dim), dim=2)
        return _attend(self, _maps(self, self.q(x)), key, value)


_FORMS: dict[type, type[Swapped]] = {Attention: SwappedAttention, AttentionDownsample: SwappedAttentionDownsample}


def form(module: Any) -> type[Swapped]:
    """The fused form of a module of one of these classes."""
    return _FORMS[type(module)]
