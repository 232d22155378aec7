"""Patch attention in plain PyTorch: the specification."""

from __future__ import annotations

from operator import index

import torch
from torch import Tensor
from torch.nn.functional import pad

from mvkernels.dispatch.checks import lay_as, without_autocast
from mvkernels.ops.common.groups import attention, fold, unfold


def patch_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    patch_size: tuple[int, int] = (2, 2),
    bias: Tensor | None = None,
    scale: float | None = None,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    r"""Self-attention among the pixels that have the same place in their patch.

    Pixel :math:`(y, x)` belongs to group :math:`g = (y \bmod p_h,\ x \bmod p_w)`. Inside a group, over
    its pixels in row-major order,

    .. math:: O_i = \sum_j \mathrm{softmax}_j(s\, q_i \cdot k_j + b_{ij})\, v_j .

    query, key (B, h, D, H, W), value (B, h, Dv, H, W), bias (h, N, N) -> (B, h, Dv, H, W). With patches of one pixel
    the key and value maps may have other sizes, M pixels; the bias is then (h, N, M). Half types are computed in
    float32 unless ``compute_dtype`` says otherwise. (MobileViT, arXiv 2110.02178, section 3.1: unfold, transformer,
    fold.)
    """
    ph, pw = patch_size
    height, width = query.shape[-2:]
    scale = query.shape[2] ** -0.5 if scale is None else scale
    half = query.dtype in (torch.float16, torch.bfloat16)
    dtype = compute_dtype or (torch.float32 if half else query.dtype)
    maps = [m.to(dtype) for m in (query, key, value)]
    bias = None if bias is None else bias.to(dtype)

    with without_autocast(query.device.type):
        if height % ph == 0 and width % pw == 0:
            if torch.compiler.is_dynamo_compiling():  # to whom sizes left open are multiples of the patch only so
                height, width = height // ph * ph, width // pw * pw
                maps = [m[..., : m.shape[-2] // ph * ph, : m.shape[-1] // pw * pw] for m in maps]
            q, k, v = (unfold(m, ph, pw) for m in maps)
            out = fold(attention(q, k, v, bias, scale), ph, pw, height, width)
        else:
            q, k, v = maps
            out = _unequal(q, k, v, index(min(ph, height)), index(min(pw, width)), bias, scale)
    return lay_as(out.to(query.dtype), query)


def _unequal(q: Tensor, k: Tensor, v: Tensor, ph: int, pw: int, bias: Tensor | None, scale: float) -> Tensor:
    """Groups of different sizes, those of one size together, cut out of a map that is padded to whole patches."""
    (d, height, width), dv = q.shape[2:], v.shape[2]
    ny, nx = -(-height // ph), -(-width // pw)
    padded = pad(torch.cat((q, k, v), 2), (0, nx * pw - width, 0, ny * ph - height))
    patches = padded.unflatten(-1, (nx, pw)).unflatten(-3, (ny, ph)).permute(0, 1, 4, 6, 3, 5, 2)
    rows = []  # patches is (B, h, ph, pw, ny, nx, 2 D + Dv)
    for y, ys in _sizes(height, ph):
        row = []
        for x, xs in _sizes(width, pw):
            groups = patches[:, :, ys, xs, :y, :x]
            query, key, value = groups.flatten(4, 5).flatten(2, 3).split((d, d, dv), -1)
            out = attention(query, key, value, bias, scale)
            row.append(pad(out.reshape(*groups.shape[:-1], dv), (0, 0, 0, nx - x, 0, ny - y)))
        rows.append(torch.cat(row, 3))
    return fold(torch.cat(rows, 2).flatten(4, 5).flatten(2, 3), ph, pw, ny * ph, nx * pw)[..., :height, :width]


def _sizes(size: int, patch: int) -> list[tuple[int, slice]]:
    """Along one axis: how many pixels a group has, and which groups they are that have so many."""
    count, larger = size // patch, index(size % patch)
    return [(count + 1, slice(0, larger)), (count, slice(larger, patch))][0 if larger else 1 :]
