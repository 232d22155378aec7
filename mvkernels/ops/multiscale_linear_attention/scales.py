"""The scales of a call, one after the other, for the backends that compose the op of convolutions and of
relu_linear_attention: what makes a scale is theirs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from mvkernels.dispatch.checks import empty_map
from mvkernels.ops.relu_linear_attention import backward_into, forward_into
from mvkernels.triton.problem import sums_dtype

Biases = Sequence[Tensor | None]


class Convolutions(Protocol):
    """The two convolutions that make a scale. Maps are (B, 3C, H, W), readable by the backend's kernels."""

    def aggregate(self, x: Tensor) -> Tensor:
        """The scale of a map: a map of its size, channels last."""

    def weight_gradients(self, grad: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        """The gradients of the four weights, given that of the scale; empty for a bias that is not there."""

    def add_map_gradient(self, grad: Tensor, to: Tensor) -> None:
        """Add the gradient of x, given that of the scale, which may be written over."""


Make = Callable[[int, Tensor, Tensor, tuple[Tensor | None, Tensor | None]], Convolutions]
"""``make(head_dim, depthwise, pointwise, biases)``."""


def heads(map_: Tensor, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of a map (B, 3C, H, W): views (B, heads, head_dim, H, W)."""
    query, key, value = map_.unflatten(1, (-1, 3, head_dim)).unbind(2)
    return query, key, value


def forward(
    make: Make,
    readable: Callable[[Tensor], Tensor],
    qkv: Tensor,
    depthwise: Sequence[Tensor],
    pointwise: Sequence[Tensor],
    head_dim: int,
    depthwise_bias: Biases,
    pointwise_bias: Biases,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """qkv (B, 3C, H, W), any strides -> (out (B, (1 + S) C, H, W), dense in qkv's order; sums, contiguous).

    sums (1 + S, B, heads, D + 1, D) are relu_linear_attention's of each scale. ``readable`` gives a map as the kernels
    read it: itself, or a copy.
    """
    batch, channels = qkv.shape[0], qkv.shape[1] // 3
    scales = 1 + len(depthwise)
    out = empty_map(qkv, scales * channels)
    sums = qkv.new_empty((scales, batch, channels // head_dim, head_dim + 1, head_dim), dtype=sums_dtype(qkv.dtype))
    first, *others = out.unflatten(1, (scales, -1, head_dim)).unbind(1)
    forward_into(first, sums[0], *heads(qkv, head_dim), eps)
    x = readable(qkv) if depthwise else qkv
    for i, part in enumerate(others):
        convolutions = make(head_dim, depthwise[i], pointwise[i], (depthwise_bias[i], pointwise_bias[i]))
        forward_into(part, sums[1 + i], *heads(convolutions.aggregate(x), head_dim), eps)
    return out, sums


def backward(
    make: Make,
    readable: Callable[[Tensor], Tensor],
    dqkv: Tensor,
    grad: Tensor,
    qkv: Tensor,
    sums: Tensor,
    depthwise: Sequence[Tensor],
    pointwise: Sequence[Tensor],
    head_dim: int,
    depthwise_bias: Biases,
    pointwise_bias: Biases,
    eps: float,
    weights: bool,
) -> list[Tensor]:
    """Write dqkv, and return the gradients of the weights, list by list.

    Empty tensors for what is not there, and for all weights without ``weights``. No atomics: the same bits each time.
    """
    grads = grad.unflatten(1, (1 + len(depthwise), -1, head_dim)).unbind(1)
    backward_into(heads(dqkv, head_dim), grads[0], *heads(qkv, head_dim), sums[0], eps)
    x = readable(qkv) if depthwise else qkv
    found = []
    for i, (wide, mixing) in enumerate(zip(depthwise, pointwise)):
        convolutions = make(head_dim, wide, mixing, (depthwise_bias[i], pointwise_bias[i]))
        scale = convolutions.aggregate(x)
        of_scale = heads(scale, head_dim)
        backward_into(of_scale, grads[1 + i], *of_scale, sums[1 + i], eps)
        if weights:
            found.append(convolutions.weight_gradients(scale, x))
        else:
            found.append(tuple(qkv.new_empty(0) for _ in range(4)))
        convolutions.add_map_gradient(scale, dqkv)
    return [each for kind in zip(*found) for each in kind]
