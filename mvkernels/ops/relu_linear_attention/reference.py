"""ReLU linear attention in plain PyTorch: the specification."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mvkernels.dispatch.checks import lay_as, without_autocast
from mvkernels.dispatch.exporting import exporting

_SMALLEST = 2.0**-24


def relu_linear_attention(
    query: Tensor, key: Tensor, value: Tensor, eps: float = 1e-15, compute_dtype: torch.dtype | None = None
) -> Tensor:
    r"""Attention whose weights are products of rectified queries and keys, normalised by their sum.

    .. math:: O_i = \frac{\sum_j (\mathrm{relu}(q_i) \cdot \mathrm{relu}(k_j))\, v_j}
                         {\sum_j \mathrm{relu}(q_i) \cdot \mathrm{relu}(k_j) + \epsilon}

    over all pixels j; summed over j first, the cost is linear in the pixels. query, key, value (B, h, D, H, W) ->
    (B, h, D, H, W). The inputs are taken in ``compute_dtype`` (their own by default); sums and division are float32
    at least, for in float16 they pass its range, and eps is 0 there. (EfficientViT, arXiv 2205.14756, section 3.1.)
    """
    dtype = compute_dtype or query.dtype
    sums = torch.promote_types(dtype, torch.float32)
    with without_autocast(query.device.type):
        q, k, v = (m.flatten(3).to(dtype).to(sums) for m in (query, key, value))
        q, k = q.relu(), k.relu()
        weights, keys = v @ k.transpose(-2, -1), k.sum(-1).unsqueeze(-2)
        if exporting():
            weights, keys, eps = _scaled(weights, keys, eps)
        out = weights @ q / (keys @ q + eps)
    return lay_as(out.to(query.dtype).unflatten(3, query.shape[3:]), query)


def _scaled(weights: Tensor, keys: Tensor, eps: float) -> tuple[Tensor, Tensor, float]:
    """Both sums over pixels and eps times the same power of two, so that eps is not small: the quotient stays.

    ONNX's optimizer takes a number below 1e-8 for 0 and leaves its addition out, and a pixel whose query has nothing
    above 0 would become NaN. float32 holds sums up to 2^68 still.
    """
    if not 0 < eps < _SMALLEST:
        return weights, keys, eps
    scale = 2.0 ** min(math.ceil(math.log2(_SMALLEST) - math.log2(eps)), 60)
    return weights * scale, keys * scale, eps * scale
