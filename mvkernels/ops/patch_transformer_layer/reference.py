"""MobileViT's transformer layer on a map in plain PyTorch: the specification."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from mvkernels.dispatch.checks import lay_as, without_autocast
from mvkernels.ops.common.norms import normalised
from mvkernels.ops.patch_attention import OP as PATCH_ATTENTION


def patch_transformer_layer(
    x: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor,
    norm2_weight: Tensor,
    norm2_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    heads: int,
    patch_size: tuple[int, int] = (2, 2),
    eps: float = 1e-5,
    scale: float | None = None,
    activation: str = "silu",
    packed: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    r"""Pre-norm attention among the pixels with the same place in their patch, then a feed-forward network by pixel.

    With every pixel a row of C channels, and A the attention of :func:`mvkernels.patch_attention`,

    .. math::
        x' = x + A(\mathrm{LN}_1(x) W_{qkv}^T + b_{qkv})\, W_p^T + b_p, \qquad
        y = x' + \mathrm{silu}(\mathrm{LN}_2(x') W_1^T + b_1)\, W_2^T + b_2 .

    x (B, C, H, W), qkv_weight (3C, C) with rows [q | k | v], the heads contiguous inside each, proj_weight (C, C),
    fc1_weight (F, C), fc2_weight (C, F) -> (B, C, H, W). Half types are computed in float32 unless ``compute_dtype``
    says otherwise. ``packed`` plays no part in what is computed. (MobileViT, arXiv 2110.02178, section 3.1: one layer
    between its unfold and its fold.)
    """
    if activation != "silu":
        raise ValueError(f"patch_transformer_layer: activation is {activation!r}, want 'silu'")
    half = x.dtype in (torch.float16, torch.bfloat16)
    dtype = compute_dtype or (torch.float32 if half else x.dtype)

    def cast(value: Tensor | None) -> Tensor | None:
        return None if value is None else value.to(dtype)

    with without_autocast(x.device.type):
        rows = x.to(dtype).permute(0, 2, 3, 1)
        normed = _norm(rows, norm1_weight, norm1_bias, eps)
        packed = linear(normed, qkv_weight.to(dtype), cast(qkv_bias))
        query, key, value = (part.unflatten(-1, (heads, -1)).permute(0, 3, 4, 1, 2) for part in packed.chunk(3, dim=-1))
        out = PATCH_ATTENTION.reference(query, key, value, patch_size, scale=scale, compute_dtype=dtype)
        rows = rows + linear(out.permute(0, 3, 4, 1, 2).flatten(-2), proj_weight.to(dtype), cast(proj_bias))
        normed = _norm(rows, norm2_weight, norm2_bias, eps)
        hidden = silu(linear(normed, fc1_weight.to(dtype), cast(fc1_bias)))
        rows = rows + linear(hidden, fc2_weight.to(dtype), cast(fc2_bias))
    return lay_as(rows.permute(0, 3, 1, 2).to(x.dtype), x)


def _norm(rows: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm in float32 at least, in the dtype of the rows."""
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    return (normalised(wide, eps) * weight.to(wide.dtype) + bias.to(wide.dtype)).to(rows.dtype)
