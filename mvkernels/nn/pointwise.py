"""1×1 convolutions as matrix products that change the memory layout on their way.

A transposed operand costs a matrix product nothing, so going from NCHW to channels-last memory (or
back) through a 1×1 convolution needs no permute copy.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def pointwise_to_channels_last(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """1×1 convolution of x (B, C, H, W), any strides, into a dense (B, H, W, D).

    weight (D, C, 1, 1) and bias (D,) are those of an ``nn.Conv2d``; one floating dtype.
    """
    batch, channels, height, width = x.shape
    matrix = weight.flatten(1)
    if x.stride(1) == 1:
        return F.linear(x.permute(0, 2, 3, 1), matrix, bias)
    # bmm and not matmul: matmul would first copy x, to fold the batch into the rows.
    # Permuted before it is flattened, so that the gradient comes back with the batch stride of a channels-last
    # map: with a batch of 1 and any other, PyTorch's batch norm returns wrong gradients on the CPU (seen in 2.13).
    tokens = x.permute(0, 2, 3, 1).flatten(1, 2)
    out = torch.bmm(tokens, matrix.t().expand(batch, channels, matrix.shape[0]))
    if bias is not None:
        out = out + bias.to(out.dtype)
    return out.view(batch, height, width, matrix.shape[0])


def pointwise_to_channels_first(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """1×1 convolution of x, a dense (B, H, W, D), into (B, C, H, W).

    weight (C, D, 1, 1) and bias (C,) are those of an ``nn.Conv2d``; one floating dtype. The result is
    contiguous, or in channels-last memory if the weight is: the layout that the convolution itself
    gives for a contiguous input.
    """
    batch, height, width, channels = x.shape
    matrix = weight.flatten(1)
    if weight.stride(-1) != 1:
        return F.linear(x, matrix, bias).permute(0, 3, 1, 2)
    out = torch.bmm(matrix.expand(batch, matrix.shape[0], channels), x.flatten(1, 2).transpose(1, 2))
    if bias is not None:
        out = out + bias.to(out.dtype)[:, None]
    return out.view(batch, matrix.shape[0], height, width)
