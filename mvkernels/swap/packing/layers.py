"""Convolutions with the norms after them, and linear layers with the norms before them, on packed weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mvkernels.ops import conv3x3, inverted_residual, pointwise
from mvkernels.swap.packing.weights import packed


def of_convolution(conv: Any) -> str:
    """The op that does the work of this convolution, "pointwise" or "conv3x3"; "depthwise" for a part of
    "inverted_residual"; empty if there is none."""
    if conv.dilation != (1, 1) or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return ""
    kernel, stride, padding = conv.kernel_size, conv.stride, conv.padding
    if stride[0] != stride[1] or stride[0] not in (1, 2) or padding != (kernel[0] // 2,) * 2 or kernel[0] != kernel[1]:
        return ""
    if conv.groups == 1 and kernel == (1, 1) and stride == (1, 1):
        return "pointwise"
    if conv.groups == 1 and kernel == (3, 3):
        return "conv3x3"
    if conv.groups == conv.in_channels == conv.out_channels and kernel[0] in (3, 5):
        return "depthwise"
    return ""


def tensors_of(conv: Any, norm: Any) -> list[Tensor | None]:
    """All that the weights of a convolution with the batch norm behind it are made of.

    A training step changes the running statistics without a trace on themselves, and counts in ``num_batches_tracked``.
    """
    of_norm: tuple[Tensor | None, ...] = ()
    if norm is not None:
        of_norm = (norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.num_batches_tracked)
    return [conv.weight, conv.bias, *of_norm]


def folded(conv: Any, norm: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the convolution that does the work of both, computed in float64."""
    weight, bias = conv.weight, conv.bias
    if norm is None:
        return weight, bias
    factor = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        factor = factor * norm.weight.double()
    shift = -norm.running_mean.double() if bias is None else bias.double() - norm.running_mean.double()
    shift = shift * factor
    if norm.bias is not None:
        shift = shift + norm.bias.double()
    return (weight.double() * factor.view(-1, 1, 1, 1)).to(weight.dtype), shift.to(weight.dtype)


def eps_of(norm: Any) -> float | None:
    """A setting that packed weights depend on."""
    return None if norm is None else norm.eps


def convolve(conv: Any, norm: Any, activation: int, x: Tensor, beside: Tensor | None = None) -> Tensor | None:
    """``activation(norm(conv(x)))``, or of x and ``beside`` as one map; None if there is no op for the convolution.

    All are plain modules at rest, and everything is float32 on a CPU.
    """
    op = of_convolution(conv)
    tensors = tensors_of(conv, norm)
    if op == "pointwise" and beside is None:
        weights = packed(
            *(conv, op, tensors, (eps_of(norm),)),
            lambda: pointwise.operators.pack(*folded(conv, norm), False, None, None),
        )
        return pointwise.operators.forward(x, weights, conv.out_channels, False, 0.0, activation, None)
    if op == "conv3x3":
        stride = conv.stride[0]
        tile = conv3x3.operators.tile_of(conv.in_channels, conv.out_channels, stride, *x.shape[-2:])
        weights = packed(
            *(conv, f"{op} {tile}", tensors, (eps_of(norm),)),
            lambda: conv3x3.operators.pack(*folded(conv, norm), tile),
        )
        return conv3x3.operators.forward(x, beside, weights, conv.out_channels, tile, stride, activation, None)
    return None


def invert(pairs: Sequence[tuple[Any, Any]], activation: int, x: Tensor, residual: bool) -> Tensor:
    """The inverted residual of three convolutions with their norms, or of two, without the expansion."""
    (depthwise, _), (project, _) = pairs[-2:]
    expands = len(pairs) == 3
    tensors = [t for pair in pairs for t in tensors_of(*pair)]

    def pack() -> Tensor:
        each = [] if expands else [None, None]
        return inverted_residual.operators.pack(*each, *(t for pair in pairs for t in folded(*pair)))

    weights = packed(project, "inverted_residual", tensors, tuple(eps_of(norm) for _, norm in pairs), pack)
    sizes = (depthwise.out_channels, project.out_channels, depthwise.kernel_size[0], expands)
    return inverted_residual.operators.forward(x, weights, *sizes, depthwise.stride[0], activation, residual)


def multiply(
    linear: Any,
    x: Tensor,
    norm: nn.LayerNorm | None = None,
    activation: int = 0,
    residual: Tensor | None = None,
    after: Any = None,
) -> Tensor:
    """``activation(linear(norm(x))) + residual`` of a map.

    ``linear`` is a Linear, or a 1 x 1 convolution with the batch norm ``after`` it.
    """
    before = (None, None) if norm is None else (norm.weight, norm.bias)
    weights = packed(
        *(linear, "pointwise", [*tensors_of(linear, after), *before], (eps_of(after), norm is None)),
        lambda: pointwise.operators.pack(*folded(linear, after), norm is not None, *before),
    )
    eps = 0.0 if norm is None else norm.eps
    return pointwise.operators.forward(x, weights, linear.weight.shape[0], norm is not None, eps, activation, residual)


def joined(linears: Any, x: Tensor, norm: nn.LayerNorm) -> Tensor:
    """The outputs of several Linears on ``norm(x)``, one behind the other in channels."""

    def pack() -> Tensor:
        biases = [torch.zeros_like(m.weight[:, 0]) if m.bias is None else m.bias for m in linears]
        return pointwise.operators.pack(
            torch.cat([m.weight for m in linears]), torch.cat(biases), True, norm.weight, norm.bias
        )

    tensors = [*(t for m in linears for t in (m.weight, m.bias)), norm.weight, norm.bias]
    weights = packed(linears[0], "joined", tensors, (), pack)
    outputs = sum(m.weight.shape[0] for m in linears)
    return pointwise.operators.forward(x, weights, outputs, True, norm.eps, 0, None)
