"""What timm's attention modules have in common: packed projections, scales, and position biases of MaxViT's kind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.layers import RelPosBias, RelPosBiasTf, RelPosMlp
from torch import Tensor, nn

from mvkernels.swap.eligibility import asked, drops_attention, log_once, not_hooked, not_plain, replaced, unusual_call
from mvkernels.swap.windows import other_windows

WINDOW_PARTS = {
    "attn.qkv": nn.Linear,
    "attn.softmax": nn.Softmax,
    "attn.attn_drop": nn.Dropout,
    "attn.proj": nn.Linear,
    "attn.proj_drop": nn.Dropout,
}
"""What a Swin block's attention calls in windows, and its fused form on the whole map, or not at all."""


def masked(block: Any) -> tuple[int, ...] | None:
    """The size of the maps that the block's mask is for; None if it has none, or makes one for each."""
    return tuple(block.input_resolution) if any(block.shift_size) and not block.dynamic_mask else None


def other_mask(x: Tensor, size: tuple[int, ...] | None) -> str:
    """A mask made for maps of ``size`` says of a map x (B, H, W, C) of another nothing that windows could say."""
    found = tuple(x.shape[1:3])
    return "" if size in (None, found) else f"its mask is for maps of {size}, but the map is {found}"


def _other_windows(block: Any) -> str:
    return other_windows(tuple(block.window_size), tuple(block.shift_size), block.attn.relative_position_index)


def declines(block: Any, why_not: Callable[[Any], str], x: Tensor) -> str:
    """Why a Swin block's call on x (B, H, W, C) needs its original attention; empty if it does not."""
    reason = unusual_call(x) or asked(why_not, block) or other_mask(x, masked(block)) or _other_windows(block)
    reason = reason or drops_attention(block.attn, block.attn.attn_drop)
    if reason:
        log_once(block, reason)
    return reason


def qkv_of(packed: Tensor, heads: int, head_first: bool) -> Sequence[Tensor]:
    """query, key and value of a packed map (B, C, H, W), whose channels have the heads first or the three parts."""
    if head_first:
        return packed.unflatten(1, (heads, -1)).chunk(3, dim=2)
    return packed.unflatten(1, (3, heads, -1)).unbind(1)


def scale_of(attention: Any) -> float | None:
    """Where timm calls scaled_dot_product_attention it does not use its own scale."""
    scale: float | None = None if attention.fused_attn else attention.scale
    return scale


def not_position(position: Any, what: str) -> str:
    """It must be None, or a module of biases for pixels only, whose ``get_bias`` is called."""
    if position is None:
        return ""
    kind = type(position)
    if kind not in (RelPosBias, RelPosBiasTf, RelPosMlp):
        return not_plain(position, RelPosBias, what)
    reason = replaced(kind, "forward", "get_bias") or not_hooked(position, what)
    if not reason and "get_bias" in position.__dict__:
        reason = f"{what} has a replaced get_bias"
    if not reason and vars(position).get("prefix_tokens"):
        reason = f"{what} has biases for {position.prefix_tokens} prefix tokens, want biases for pixels only"
    return reason


def bias_of(position: Any, dtype: torch.dtype) -> Tensor | None:
    """(heads, N, N); some classes have a first axis of 1 besides."""
    if position is None:
        return None
    bias: Tensor = position.get_bias()
    return bias.flatten(0, -3).to(dtype)
