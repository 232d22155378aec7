"""Convolutions with the norms after them, and linear layers with the norms before them, on packed weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from mvkernels.ops import conv3x3, inverted_residual, pointwise
from mvkernels.swap.eligibility import class_of, not_dense, not_plain
from mvkernels.swap.folding import elementwise
from mvkernels.swap.folding.forms import not_plain_convolution, not_plain_norm, why_not
from mvkernels.swap.packing.kinds import of_convolution
from mvkernels.swap.packing.plans import Keep

Part = tuple[Any, Any, tuple[Any, ...]]
"""A convolution, its norm or None, and what is called after them."""
Convolve = Callable[..., Tensor]
"""Of a map, or of two maps whose channels follow each other, and perhaps another that is added to the result."""
Multiply = Callable[..., Tensor]
"""Of a map, and perhaps another that is added to the result. Of a map (not of tokens) also with the operator's gate."""
_LARGE = 2**20
"""Weights of an expansion from which a kernel of its own makes the wide map: the one that does not store it reads them
again for every few rows, which costs more once a cache does not hold them."""


def folded(layer: Any, norm: Any, scale: Tensor | None = None, before: Any = None) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the convolution or Linear that does the work of both, and of a factor of each channel after
    them, computed in float64. ``before``: a batch norm before a 1 x 1 convolution, whose work it does as well."""
    weight, bias = layer.weight, layer.bias
    if norm is None and scale is None and before is None:
        return weight, bias
    exact = weight.double()
    shift = exact.new_zeros(weight.shape[0]) if bias is None else bias.double()
    if before is not None:
        into, offset = _factors(before)
        shift = shift + exact.flatten(1) @ offset
        exact = exact * into.view(1, -1, 1, 1)
    factor = torch.ones_like(shift)
    if norm is not None:
        factor, offset = _factors(norm)
        shift = shift * factor + offset
    if scale is not None:
        factor, shift = factor * scale.double(), shift * scale.double()
    return (exact * factor.view(-1, *(1,) * (weight.dim() - 1))).to(weight.dtype), shift.to(weight.dtype)


def _factors(norm: Any) -> tuple[Tensor, Tensor]:
    """What a batch norm multiplies each channel by, and what it adds then."""
    factor = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        factor = factor * norm.weight.double()
    offset = -norm.running_mean.double() * factor
    return factor, offset if norm.bias is None else offset + norm.bias.double()


def resting(conv: Any, norm: Any, after: Iterable[Any]) -> int | None:
    """The number of the activation of a convolution that may run on packed weights, with the norm if there is one; None
    if it may not."""
    reason = not_plain_convolution(conv) if norm is None else why_not(conv, norm) or norm.training
    if reason or not _is_single(conv.weight, conv.bias) or not (norm is None or _is_single(*_tensors(norm))):
        return None
    return elementwise.activation_of(after)


def resting_norm(norm: Any, channels: int) -> bool:
    """Whether a batch norm of these channels, without an activation, is one that a convolution can do the work of."""
    return not not_plain_norm(norm, channels) and not norm.training and _is_single(*_tensors(norm))


def _tensors(norm: Any) -> tuple[Tensor | None, ...]:
    return norm.running_mean, norm.running_var, norm.weight, norm.bias


def not_single(*tensors: Tensor | None) -> str:
    """Why one of the tensors is not a dense one in float32; empty if each is, or is not there."""
    for tensor in tensors:
        reason = "" if tensor is None else not_dense(tensor, "a parameter")
        if not reason and not _is_single(tensor):
            reason = "it is not float32"
        if reason:
            return reason
    return ""


def _is_single(*tensors: Tensor | None) -> bool:
    return all(t is None or t.dtype == torch.float32 for t in tensors)


def convolution(part: Part, keep: Keep) -> Convolve | None:
    """``activation(norm(conv(x)))`` on packed weights; None if there is no op for it, or not for its present state."""
    conv, norm, after = part
    op = of_convolution(conv) if isinstance(conv, nn.Conv2d) else ""
    activation = resting(conv, norm, after) if op in ("pointwise", "conv3x3") else None
    if activation is None:
        return None
    inputs, outputs, stride = conv.in_channels, conv.out_channels, conv.stride[0]
    # Not the convolution, which may be the module with this plan itself.
    held = SimpleNamespace(weight=conv.weight, bias=conv.bias)
    products: list[Multiply] = []
    of_tile: dict[int, Tensor] = {}

    def multiply(x: Tensor, beside: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        if not products:
            products.append(linear(held, keep, activation, after=norm))
        return products[0](x if beside is None else torch.cat((x, beside), dim=1), residual)

    def run(x: Tensor, beside: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        tile = conv3x3.operators.tile_of(inputs, outputs, stride, *x.shape[-2:])
        weights = of_tile.get(tile)
        if weights is None:
            weights = of_tile[tile] = keep(conv3x3.operators.pack(*folded(held, norm), tile))
        return conv3x3.operators.forward(x, beside, weights, outputs, tile, stride, activation, residual)

    return multiply if op == "pointwise" else run


def inverted_residual_of(parts: Sequence[Part], adds: bool, keep: Keep) -> Convolve | None:
    """The inverted residual of three convolutions with their norms, or of two, without the expansion; None if they are
    none, or cannot run on packed weights now. ``adds``: whether the input is added. Its calls may be given the slopes
    of dynamic ReLUs beside the map."""
    if not parts or not inverted(parts):
        return None
    *first, last = (resting(*part) for part in parts)
    if last != 0 or None in first:
        return None
    before, activation, expands = first[0], first[-1], len(parts) == 3
    (depthwise, _, _), (project, _, _) = parts[-2:]
    each = [] if expands else [None, None]
    weights = keep(inverted_residual.operators.pack(*each, *(t for part in parts for t in folded(*part[:2]))))
    sizes = (depthwise.out_channels, project.out_channels, depthwise.kernel_size[0], expands)
    settings = (*sizes, depthwise.stride[0], activation, adds, before)
    return lambda x, *slopes: inverted_residual.operators.forward(x, weights, *settings, *slopes)


def hidden_map(widen: Part, depthwise: Part, keep: Keep, norm: Any = None) -> Convolve | None:
    """An inverted residual without its projection, and perhaps with a batch norm before it; None if the parts are not
    that, or cannot run on packed weights now."""
    if [of_convolution(part[0]) for part in (widen, depthwise)] != ["pointwise", "depthwise"]:
        return None
    before, activation = resting(*widen), resting(*depthwise)
    if before is None or activation is None or (norm is not None and not resting_norm(norm, widen[0].in_channels)):
        return None
    conv, expansion = depthwise[0], folded(*widen[:2], before=norm)
    expands = expansion[0].numel() < _LARGE
    product = None if expands else _product(*expansion, keep, before, None)
    tensors = (*(expansion if expands else (None, None)), *folded(*depthwise[:2]), None, None)
    weights = keep(inverted_residual.operators.pack(*tensors))
    settings = (conv.out_channels, 0, conv.kernel_size[0], expands, conv.stride[0], activation, False, before)
    return lambda x: inverted_residual.operators.forward(x if product is None else product(x), weights, *settings)


def inverted(parts: Sequence[Part]) -> bool:
    """Whether the convolutions are those of an inverted residual, with or without the first one."""
    kinds = [of_convolution(conv) for conv, _, _ in parts]
    return kinds[-2:] == ["depthwise", "pointwise"] and kinds[:-2] in ([], ["pointwise"])


def linear(
    layer: Any,
    keep: Keep,
    activation: int = 0,
    norm: nn.LayerNorm | None = None,
    after: Any = None,
    scale: Tensor | None = None,
) -> Multiply:
    """``activation(scale * after(layer(norm(x)))) + residual`` of a map x and, if it is given, a residual.

    ``layer`` is a Linear or a 1 x 1 convolution, with the batch norm ``after`` it and then the factors ``scale``.
    """
    return _product(*folded(layer, after, scale), keep, activation, norm)


def multiplication(
    layer: Any,
    keep: Keep,
    after: Iterable[Any] = (),
    norm: nn.LayerNorm | None = None,
    batch_norm: Any = None,
    scale: Tensor | None = None,
) -> Multiply | None:
    """:func:`linear` with the modules ``after`` in its activation's place: of tokens (..., C) for a Linear,
    of a map for a 1 x 1 convolution; None if there is no op for it, or not for its present state."""
    if class_of(layer) is nn.Linear:
        activation = None if not_linear(layer, batch_norm) else elementwise.activation_of(after)
    elif class_of(layer) is nn.Conv2d and of_convolution(layer) == "pointwise":
        activation = resting(layer, batch_norm, after)
    else:
        return None
    if activation is None or (scale is not None and (activation or scale.dtype != torch.float32)):
        return None
    product = linear(layer, keep, activation, norm, batch_norm, scale)
    return of_tokens(product) if class_of(layer) is nn.Linear else product


def not_linear(layer: Any, norm: Any = None) -> str:
    """A plain Linear in float32 on a CPU, and perhaps a plain batch norm at rest after it."""
    reason = not_plain(layer, nn.Linear, "the Linear")
    if not reason and norm is not None:
        reason = not_plain(norm, nn.BatchNorm1d, "the norm")
        if not reason and (norm.training or norm.running_mean is None or norm.num_features != layer.weight.shape[0]):
            reason = "the norm is not at rest, or not for the Linear's channels"
    tensors = [layer.weight, layer.bias] if not reason else []
    if not reason and norm is not None:
        tensors += [norm.running_mean, norm.running_var, norm.weight, norm.bias]
    for tensor in tensors:
        if tensor is not None and not reason:
            reason = not_dense(tensor, "the Linear")
            if tensor.dtype != torch.float32 or not tensor.is_cpu or not tensor.numel():
                reason = "it is for float32 on a CPU"
    return reason


def of_tokens(product: Multiply) -> Multiply:
    """The product of tokens (..., C), which are the pixels of a map."""

    def as_map(x: Tensor) -> Tensor:
        axes = x.dim()
        x = x[None, None] if axes == 2 else x[:, None] if axes == 3 else x.flatten(0, -4) if axes > 4 else x
        return x.permute(0, 3, 1, 2)

    def run(x: Tensor, residual: Tensor | None = None) -> Tensor:
        out = product(as_map(x), None if residual is None else as_map(residual))
        return out.permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)

    return run


def joined(linears: Sequence[Any], keep: Keep, norm: nn.LayerNorm | None = None) -> Multiply:
    """The outputs of several Linears on ``norm(x)``, one behind the other in channels."""
    biases = [torch.zeros_like(m.weight[:, 0]) if m.bias is None else m.bias for m in linears]
    return _product(torch.cat([m.weight for m in linears]), torch.cat(biases), keep, 0, norm)


def _product(weight: Tensor, bias: Tensor | None, keep: Keep, activation: int, norm: nn.LayerNorm | None) -> Multiply:
    normed = norm is not None
    of_norm = (norm.weight, norm.bias) if norm is not None else (None, None)
    weights = keep(pointwise.operators.pack(weight, bias, normed, *of_norm))
    settings = (weight.shape[0], normed, 0.0 if norm is None else norm.eps, activation)
    return lambda x, residual=None, gate=None: pointwise.operators.forward(x, weights, *settings, residual, gate)
