"""Block and grid attention of MaxViT in timm (``timm.models.maxxvit``), in place: ``PartitionAttentionCl``,
``PartitionAttention2d`` and ``ParallelPartitionAttention``.

A block is a window; a grid of n x n is attention within patches of H / n x W / n. Tables are read in every call, for
``set_input_size`` changes them.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.models.maxxvit import (
    Attention2d,
    AttentionCl,
    ParallelPartitionAttention,
    PartitionAttention2d,
    PartitionAttentionCl,
)
from torch import Tensor, nn

from mvkernels.ops.patch_attention import patch_attention
from mvkernels.ops.window_attention import window_attention
from mvkernels.swap.eligibility import (
    asked,
    drops_attention,
    log_once,
    not_its_own,
    not_plain_parts,
    replaced,
    unusual_call,
)
from mvkernels.swap.swapped import Swapped
from mvkernels.swap.timm_parts import bias_of, not_position, qkv_of, scale_of
from mvkernels.swap.windows import channels_last

CALLS_PARTS = True


def why_not(block: Any) -> str:
    """Why the fused form cannot replace this block in its current state; empty if it can."""
    kind = block.mvk_original if isinstance(block, Swapped) else type(block)
    attention_kind, projection = (Attention2d, nn.Conv2d) if kind is PartitionAttention2d else (AttentionCl, nn.Linear)
    reason = replaced(kind, "forward", "_partition_attn") or not_its_own(block, "_partition_attn")
    for name in ("attn_block", "attn_grid") if kind is ParallelPartitionAttention else ("attn",):
        parts = {"qkv": projection, "attn_drop": nn.Dropout, "proj": projection, "proj_drop": nn.Dropout}
        kinds = {name: attention_kind, **{f"{name}.{part}": each for part, each in parts.items()}}
        reason = reason or not_plain_parts(block, kinds)
        reason = reason or not_position(getattr(block, name).rel_pos, f"{name}.rel_pos")
    return reason


def _attend(attention: Any, x: Tensor, size: tuple[int, int], block: bool, last: bool, backend: str | None) -> Tensor:
    """One attention on a whole map, (B, H, W, C) if ``last``, else (B, C, H, W)."""
    packed = attention.qkv(x)
    packed = packed.permute(0, 3, 1, 2) if last else packed
    query, key, value = qkv_of(packed, attention.num_heads, attention.head_first)
    settings: dict[str, Any] = {"scale": scale_of(attention), "backend": backend}
    bias = bias_of(attention.rel_pos, query.dtype)
    if block:
        out = window_attention(query, key, value, size, bias=bias, **settings)
    else:
        patch = (query.shape[3] // size[0], query.shape[4] // size[1])
        out = patch_attention(query, key, value, patch, bias=bias, **settings)
    return attention.proj_drop(attention.proj(channels_last(out) if last else out.flatten(1, 2)))


def _declines(self: Any, x: Tensor, sides: slice, *attentions: Any) -> str:
    """Why this call is the original's: where the partition does not divide the map, the error is its own."""
    reason = unusual_call(x) or asked(why_not, self)
    size = self.partition_size
    if not reason and any(side % by for side, by in zip(x.shape[sides], size)):
        reason = f"partitions of {tuple(size)} do not divide the map {tuple(x.shape[sides])}"
    for attention in attentions:
        reason = reason or drops_attention(attention, attention.attn_drop)
    if reason:
        log_once(self, reason)
    return reason


class SwappedPartitionAttentionCl(Swapped):
    """A ``PartitionAttentionCl`` that calls :func:`mvkernels.window_attention` or :func:`mvkernels.patch_attention`."""

    def forward(self: Any, x: Tensor) -> Tensor:
        """x (B, H, W, C) -> (B, H, W, C)."""
        return PartitionAttentionCl.forward(self, x)

    def _partition_attn(self: Any, x: Tensor) -> Tensor:
        if _declines(self, x, slice(1, 3), self.attn):
            return PartitionAttentionCl._partition_attn(self, x)
        return _attend(self.attn, x, tuple(self.partition_size), self.partition_block, True, self.mvk_backend)


class SwappedPartitionAttention2d(Swapped):
    """A ``PartitionAttention2d`` that calls :func:`mvkernels.window_attention` or :func:`mvkernels.patch_attention`."""

    def forward(self: Any, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> (B, C, H, W)."""
        return PartitionAttention2d.forward(self, x)

    def _partition_attn(self: Any, x: Tensor) -> Tensor:
        if _declines(self, x, slice(2, 4), self.attn):
            return PartitionAttention2d._partition_attn(self, x)
        return _attend(self.attn, x, tuple(self.partition_size), self.partition_block, False, self.mvk_backend)


class SwappedParallelPartitionAttention(Swapped):
    """A ``ParallelPartitionAttention``: windows and grid beside each other, each in place."""

    def forward(self: Any, x: Tensor) -> Tensor:
        """x (B, H, W, C) -> (B, H, W, C)."""
        return ParallelPartitionAttention.forward(self, x)

    def _partition_attn(self: Any, x: Tensor) -> Tensor:
        if _declines(self, x, slice(1, 3), self.attn_block, self.attn_grid):
            return ParallelPartitionAttention._partition_attn(self, x)
        size = tuple(self.partition_size)
        parts = ((self.attn_block, True), (self.attn_grid, False))
        return torch.cat([_attend(attn, x, size, block, True, self.mvk_backend) for attn, block in parts], dim=-1)


_FORMS: dict[type, type[Swapped]] = {
    PartitionAttentionCl: SwappedPartitionAttentionCl,
    PartitionAttention2d: SwappedPartitionAttention2d,
    ParallelPartitionAttention: SwappedParallelPartitionAttention,
}


def form(module: Any) -> type[Swapped]:
    """The fused form of a module of one of these classes."""
    return _FORMS[type(module)]
