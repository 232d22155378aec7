"""Groups of pixels that attend to each other: by their place in a patch, or by their window."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mvkernels.dispatch.registry import Cost

Sizes = tuple[int, int]


def attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float, inside: Tensor | None = None
) -> Tensor:
    """(B, h, groups, N, D), key and value with M tokens, bias (h, N, M) -> (B, h, groups, N, Dv).

    ``inside`` (1, 1, groups, N), for M = N, says which tokens there are: others get no weight, and results of no sense.
    """
    scores = query @ key.transpose(-2, -1) * scale
    if bias is not None:
        scores = scores + bias[:, None]
    if inside is not None:
        there = inside[..., None] & inside[..., None, :]
        scores = torch.where(there, scores, torch.where(inside[..., None], -math.inf, 0.0).to(scores.dtype))
    return scores.softmax(-1) @ value


# The channels are brought last before the axes are split and back after they are joined: exported graphs have the
# permutations as nodes, and runtimes join two of them but not across a reshape.


def unfold(x: Tensor, ph: int, pw: int) -> Tensor:
    """Pixels by their place in the patch: (B, h, D, H, W) -> (B, h, ph * pw, N, D)."""
    if ph == pw == 1:
        return x.flatten(3).transpose(2, 3).unsqueeze(2)
    b, h, d, height, width = x.shape
    x = x.permute(0, 1, 3, 4, 2).reshape(b, h, height // ph, ph, width // pw, pw, d)
    return x.permute(0, 1, 3, 5, 2, 4, 6).reshape(b, h, ph * pw, (height // ph) * (width // pw), d)


def fold(x: Tensor, ph: int, pw: int, height: int, width: int) -> Tensor:
    """(B, h, ph * pw, N, D) -> (B, h, D, H, W)."""
    if ph == pw == 1:
        return x.squeeze(2).transpose(2, 3).unflatten(3, (height, width))
    b, h, _, _, d = x.shape
    x = x.reshape(b, h, ph, pw, height // ph, width // pw, d)
    return x.permute(0, 1, 4, 2, 5, 3, 6).reshape(b, h, height, width, d).permute(0, 1, 4, 2, 3)


def partition(x: Tensor, wh: int, ww: int) -> Tensor:
    """Pixels by their window: (B, h, D, H, W) -> (B, h, windows, wh * ww, D)."""
    b, h, d, height, width = x.shape
    x = x.permute(0, 1, 3, 4, 2).reshape(b, h, height // wh, wh, width // ww, ww, d)
    return x.transpose(3, 4).reshape(b, h, (height // wh) * (width // ww), wh * ww, d)


def reverse(x: Tensor, wh: int, ww: int, height: int, width: int) -> Tensor:
    """(B, h, windows, wh * ww, D) -> (B, h, D, H, W)."""
    b, h, _, _, d = x.shape
    x = x.reshape(b, h, height // wh, width // ww, wh, ww, d)
    return x.transpose(3, 4).reshape(b, h, height, width, d).permute(0, 1, 4, 2, 3)


def patch_pairs(sizes: Sizes, partners: Sizes, patch: Sizes) -> int:
    """How many pairs of a pixel and one that it attends to a map of ``sizes`` has, and ``partners``, by patches."""
    count = 1
    for size, partner, step in zip(sizes, partners, patch):
        (few, larger), (partner_few, partner_larger) = divmod(size, step), divmod(partner, step)
        count *= step * few * partner_few + larger * partner_few + few * partner_larger + min(larger, partner_larger)
    return count


def window_pairs(sizes: Sizes, window: Sizes, shift: Sizes) -> int:
    """How many pairs of a pixel and one that it attends to a map has, by windows."""
    count = 1
    for size, extent, begin in zip(sizes, window, shift):
        first = min(begin, size)
        whole, last = divmod(size - first, extent)
        count *= first**2 + whole * extent**2 + last**2
    return count


def attention_cost(arguments: Mapping[str, Any], pairs: int, backward: bool) -> Cost:
    """Floor of an op on ``query``, ``key``, ``value`` and maybe ``bias``, with so many pairs in a map.

    The backward alone reads q, k, v, out and dout, and writes dq, dk and dv. What heads share is moved once.
    """
    query, value, bias = arguments["query"], arguments["value"], arguments.get("bias")
    (b, h, d, *size), (dv, *partner) = query.shape, value.shape[2:]
    shared = value.stride(1) == 0
    pixels = h * math.prod(size) + (1 if shared else h) * math.prod(partner)
    bias_bytes = 0 if bias is None else bias.numel() * bias.element_size()
    moved = b * (d + dv) * pixels * query.element_size() + bias_bytes
    if backward:
        return Cost(2 * moved, b * h * pairs * (6 * d + 4 * dv), b * h * pairs)
    return Cost(moved, b * h * pairs * 2 * (d + dv), b * h * pairs)
