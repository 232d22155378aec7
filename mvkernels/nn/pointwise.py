"""1×1 convolutions as matrix products that also change the memory layout.

A matrix product can read a transposed operand at no extra cost. So a 1×1 convolution can go from NCHW to channels-last
memory, or back, without a permute copy.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def pointwise_to_channels_last(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """1×1 convolution from a map (B, C, H, W) to channels-last.

    Args:
        x: (B, C, H, W), any strides.
        weight: (D, C, 1, 1), the weight of an ``nn.Conv2d``.
        bias: (D,), or None.

    Returns:
        (B, H, W, D), contiguous. All tensors have one floating dtype.
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
    """1×1 convolution from a channels-last map (B, H, W, D) to (B, C, H, W).

    Args:
        x: (B, H, W, D), contiguous.
        weight: (C, D, 1, 1), the weight of an ``nn.Conv2d``.
        bias: (C,), or None.

    Returns:
        (B, C, H, W). It is contiguous, or in channels-last memory if the weight is channels-last: the layout that
        ``nn.Conv2d`` gives for a contiguous input. All tensors have one floating dtype.
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
    """A contiguous map x (B, C, H, W) unchanged, but with a gradient that is made contiguous too.

    PyTorch's batch norm returns wrong gradients on the CPU where its input is contiguous and the gradient of its output
    is dense in another order with an axis of 1 whose stride does not go with it (seen in 2.13): a batch of one under
    vmap, say. Maps that are not contiguous, and compiled ones, are returned as they are.
    """
    if not x.requires_grad or torch.compiler.is_compiling() or not torch.is_grad_enabled() or not x.is_contiguous():
        return x
    return _LaidAsInput.apply(x)  # type: ignore[no-any-return]
