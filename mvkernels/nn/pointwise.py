"""1×1 convolutions as matrix products that change the memory layout on their way.

A transposed operand costs a matrix product nothing, so going from NCHW to channels-last memory (or
back) through a 1×1 convolution needs no permute copy.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def pointwise_to_channels_last(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """1×1 convolution of x (B, C, H, W), any strides, into a dense (B, H, W, D).

    weight (D, C, 1, 1) and bias (D,) are those of an ``nn.Conv2d``; one floating dtype.
    """
    batch, channels, height, width = x.shape
    matrix = weight.flatten(1)
    x = gradient_laid_as_input(x)
    if x.stride(1) == 1:
        return F.linear(x.permute(0, 2, 3, 1), matrix, bias)
    # bmm and not matmul: matmul would first copy x, to fold the batch into the rows.
    # Permuted before it is flattened: compiled, this alone gives the gradient the batch stride of a channels-last map.
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


class _LaidAsInput(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:  # type: ignore[override]
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        # Not is_contiguous(), which does not ask for the strides of axes of 1. Under vmap, stride() leaves the batched
        # axis out, and clone lays out all of it.
        stride = 1
        for axis in (3, 2, 1, 0):
            if grad.stride(axis) != stride:
                return grad.clone(memory_format=torch.contiguous_format)
            stride *= grad.shape[axis]
        return grad

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:  # type: ignore[override]
        return tangent.view_as(tangent)


def gradient_laid_as_input(x: Tensor) -> Tensor:
    """x, a map (B, C, H, W), such that its gradient lies in memory as a contiguous x does.

    PyTorch's batch norm returns wrong gradients on the CPU where its input is contiguous and the gradient of its output
    is dense in another order with an axis of 1 whose stride does not go with it (seen in 2.13): a batch of one under
    vmap, say. Maps that are not contiguous, and compiled ones, are returned as they are.
    """
    if not x.requires_grad or torch.compiler.is_compiling() or not torch.is_grad_enabled() or not x.is_contiguous():
        return x
    return _LaidAsInput.apply(x)  # type: ignore[no-any-return]
