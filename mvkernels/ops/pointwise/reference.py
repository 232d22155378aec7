"""The 1 x 1 convolution, or linear layer, in plain PyTorch: the specification."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from mvkernels.dispatch.checks import lay_as, without_autocast
from mvkernels.ops.common.activations import ACTIVATIONS
from mvkernels.ops.common.norms import normalised

Norm = tuple[Tensor | None, Tensor | None]


def pointwise(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm: Norm | None = None,
    eps: float = 1e-5,
    activation: str | None = None,
    residual: Tensor | None = None,
    packed: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    r"""The product of every pixel's channels with a matrix, a LayerNorm before it, an activation and a sum after it.

    .. math::
        y = f(W\, \mathrm{LN}(x) + b) \; (+\, \mathrm{residual}), \qquad
        \mathrm{LN}(x) = g \frac{x - \bar x}{\sqrt{\mathrm{var}(x) + \epsilon}} + h

    x (B, C, H, W), weight (C_out, C) or (C_out, C, 1, 1) -> (B, C_out, H, W). Half types are computed in float32 unless
    ``compute_dtype`` says otherwise. ``packed`` plays no part in what is computed.
    """
    half = x.dtype in (torch.float16, torch.bfloat16)
    dtype = compute_dtype or (torch.float32 if half else x.dtype)

    def cast(value: Tensor | None) -> Tensor | None:
        return None if value is None else value.to(dtype)

    with without_autocast(x.device.type):
        rows = x.to(dtype).permute(0, 2, 3, 1)
        if norm is not None:
            rows = normalised(rows, eps)
            factor, shift = map(cast, norm)
            rows = rows if factor is None else rows * factor
            rows = rows if shift is None else rows + shift
        rows = ACTIVATIONS[activation](linear(rows, weight.to(dtype).flatten(1), cast(bias)))
        if residual is not None:
            rows = rows + residual.to(dtype).permute(0, 2, 3, 1)
    return lay_as(rows.permute(0, 3, 1, 2).to(x.dtype), x)
