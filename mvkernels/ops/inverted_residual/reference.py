"""The inverted residual in plain PyTorch: the specification."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from mvkernels.dispatch.checks import lay_as, without_autocast
from mvkernels.ops.common.activations import ACTIVATIONS

Weights = tuple[Tensor, Tensor | None]


def inverted_residual(
    x: Tensor,
    expand: Weights | None,
    depthwise: Weights,
    project: Weights,
    stride: int = 1,
    activation: str | None = "silu",
    residual: bool = False,
    packed: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    r"""A 1 x 1 convolution to more channels, a depthwise one of them, a 1 x 1 convolution to few.

    .. math::
        y = W_p * f(W_d \circledast f(W_e * x + b_e) + b_d) + b_p \quad (+\, x),

    with f the activation and :math:`\circledast` the depthwise convolution, padded with zeros by half of its kernel.
    x (B, C, H, W) -> (B, C_out, ceil(H / stride), ceil(W / stride)). Half types are computed in float32 unless
    ``compute_dtype`` says otherwise. ``packed`` plays no part in what is computed. (MobileNetV2, arXiv 1801.04381,
    section 3.3, with the norms folded into the convolutions.)
    """
    half = x.dtype in (torch.float16, torch.bfloat16)
    dtype = compute_dtype or (torch.float32 if half else x.dtype)
    f = ACTIVATIONS[activation]

    def convolve(x: Tensor, weights: Weights, **settings: int) -> Tensor:
        weight, bias = weights
        return conv2d(x, weight.to(dtype), None if bias is None else bias.to(dtype), **settings)

    with without_autocast(x.device.type):
        hidden = x.to(dtype)
        if expand is not None:
            hidden = f(convolve(hidden, expand))
        channels, kernel = depthwise[0].shape[0], depthwise[0].shape[-1]
        hidden = f(convolve(hidden, depthwise, stride=stride, padding=kernel // 2, groups=channels))
        out = convolve(hidden, project)
        if residual:
            out = out + x.to(dtype)
    return lay_as(out.to(x.dtype), x)
