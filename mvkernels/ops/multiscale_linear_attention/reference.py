"""Multi-scale linear attention in plain PyTorch: the specification."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from mvkernels.dispatch.checks import lay_as, without_autocast
from mvkernels.ops.relu_linear_attention import OP as RELU_LINEAR_ATTENTION


def multiscale_linear_attention(
    qkv: Tensor,
    depthwise: Sequence[Tensor],
    pointwise: Sequence[Tensor],
    head_dim: int,
    depthwise_bias: Sequence[Tensor | None] | None = None,
    pointwise_bias: Sequence[Tensor | None] | None = None,
    eps: float = 1e-15,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    r"""ReLU linear attention on every head of qkv and of what convolutions make of it, one more scale each.

    .. math:: Z_0 = \mathrm{qkv},\quad Z_s = P_s * (D_s * Z_0),\quad
              O = \mathrm{concat}_{s, \mathrm{head}}\ \mathrm{attention}([q | k | v] = Z_s^{\mathrm{head}})

    with :math:`D_s` depthwise, k x k, padded by zeros to the same size, and :math:`P_s` pointwise in groups of
    head_dim channels: q, k and v of each head are mixed for themselves. qkv (B, 3C, H, W), per head [q | k | v] of
    head_dim channels each; depthwise[s] (3C, 1, k, k), pointwise[s] (3C, head_dim, 1, 1), biases (3C,) ->
    (B, (1 + S) C, H, W). The convolutions of half types are computed in float32 unless ``compute_dtype`` says
    otherwise. (LiteMLA between its 1 x 1 projections: EfficientViT, arXiv 2205.14756, section 3.1.)
    """
    half = qkv.dtype in (torch.float16, torch.bfloat16)
    dtype = compute_dtype or (torch.float32 if half else qkv.dtype)
    channels = qkv.shape[1]
    first, second = (b or [None] * len(depthwise) for b in (depthwise_bias, pointwise_bias))
    with without_autocast(qkv.device.type):
        scales = [qkv.to(dtype)]
        for wide, mixing, b, c in zip(depthwise, pointwise, first, second):
            b, c = (None if each is None else each.to(dtype) for each in (b, c))  # noqa: PLW2901
            each = conv2d(scales[0], wide.to(dtype), b, padding=wide.shape[-1] // 2, groups=channels)
            scales.append(conv2d(each, mixing.to(dtype), c, groups=channels // head_dim))
        q, k, v = torch.cat(scales, 1).unflatten(1, (-1, 3, head_dim)).unbind(2)
        out = RELU_LINEAR_ATTENTION.reference(q, k, v, eps)
    return lay_as(out.flatten(1, 2).to(qkv.dtype), qkv)
