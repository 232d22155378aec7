"""Patch attention in plain PyTorch: the specification."""

from __future__ import annotations

import torch
from torch import Tensor

from mvkernels.checks import lay_as, without_autocast


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

    query, key (B, h, D, H, W), value (B, h, Dv, H, W), bias (h, N, N) -> (B, h, Dv, H, W). Half types
    are computed in float32 unless ``compute_dtype`` says otherwise. (MobileViT, arXiv 2110.02178,
    section 3.1: unfold, transformer, fold.)
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
            q, k, v = (_unfold(m, ph, pw) for m in maps)
            out = _fold(_attention(q, k, v, bias, scale), ph, pw, height, width)
        else:  # groups of different sizes: one after the other
            out = maps[2].new_empty(value.shape)
            for y in range(min(ph, height)):
                for x in range(min(pw, width)):
                    q, k, v = (m[..., y::ph, x::pw].flatten(-2).transpose(-2, -1).unsqueeze(2) for m in maps)
                    group = _attention(q, k, v, bias, scale).squeeze(2).transpose(-2, -1)
                    out[..., y::ph, x::pw] = group.reshape(out[..., y::ph, x::pw].shape)
    return lay_as(out.to(query.dtype), query)


def _attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """(B, h, groups, N, D) -> (B, h, groups, N, Dv)."""
    scores = query @ key.transpose(-2, -1) * scale
    if bias is not None:
        scores = scores + bias[:, None]
    return scores.softmax(-1) @ value


def _unfold(x: Tensor, ph: int, pw: int) -> Tensor:
    """(B, h, D, H, W) -> (B, h, ph * pw, N, D)."""
    b, h, d, height, width = x.shape
    x = x.reshape(b, h, d, height // ph, ph, width // pw, pw)
    return x.permute(0, 1, 4, 6, 3, 5, 2).reshape(b, h, ph * pw, (height // ph) * (width // pw), d)


def _fold(x: Tensor, ph: int, pw: int, height: int, width: int) -> Tensor:
    """(B, h, ph * pw, N, D) -> (B, h, D, H, W)."""
    b, h, _, _, d = x.shape
    x = x.reshape(b, h, ph, pw, height // ph, width // pw, d)
    return x.permute(0, 1, 6, 4, 2, 5, 3).reshape(b, h, d, height, width)
