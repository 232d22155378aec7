"""The dense 3 x 3 convolution in plain PyTorch: the specification."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from mvkernels.dispatch.checks import lay_as, without_autocast
from mvkernels.ops.common.activations import ACTIVATIONS


def conv3x3(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    beside: Tensor | None = None,
    stride: int = 1,
    packed: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    r"""A 3 x 3 convolution padded by 1, an activation, and a map that is added.

    .. math::
        y = f(W \circledast [x \mid \mathrm{beside}] + b) \; (+\, \mathrm{residual}),

    x (B, C, H, W) -> (B, C_out, ceil(H / stride), ceil(W / stride)). Half types are computed in float32 unless
    ``compute_dtype`` says otherwise. ``packed`` plays no part in what is computed.
    """
    half = x.dtype in (torch.float16, torch.bfloat16)
    dtype = compute_dtype or (torch.float32 if half else x.dtype)
    with without_autocast(x.device.type):
        whole = x if beside is None else torch.cat([x, beside], dim=1)
        out = conv2d(
            whole.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype), stride=stride, padding=1
        )
        out = ACTIVATIONS[activation](out)
        if residual is not None:
            out = out + residual.to(dtype)
    return lay_as(out.to(x.dtype), x)
