"""The scales of a call, one after the other, for the backends that compose the op of convolutions and of
relu_linear_attention: what makes a scale is theirs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from mvkernels.dispatch.checks import empty_map
from mvkernels.ops.multiscale_linear_attention.triton.plan import ScaleProblem
from mvkernels.ops.relu_linear_attention import backward_into, forward_into
from mvkernels.triton.launch import INTERPRETED
from mvkernels.triton.problem import sums_dtype

Biases = Sequence[Tensor | None]


@dataclass(frozen=True)
class Convolutions(ABC):
    """The two convolutions that make a scale. Maps are (B, 3C, H, W), readable by the backend's kernels."""

    head_dim: int
    wide: Tensor
    mixing: Tensor
    biases: tuple[Tensor | None, Tensor | None]

    @abstractmethod
    def aggregate(self, x: Tensor, to: Tensor) -> None:
        """Write the scale of a map to a map of its size, channels last."""

    @abstractmethod
    def weight_gradients(self, grad: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        """The gradients of the four weights, given that of the scale; empty for a bias that is not there."""

    @abstractmethod
    def add_map_gradient(self, grad: Tensor, to: Tensor) -> None:
        """Add the gradient of x, given that of the scale, which may be written over."""

    def named(self, **maps: Tensor) -> tuple[ScaleProblem, dict[str, Tensor]]:
        """The description of a launch on these maps, and the maps as (B, groups, D, H, W)."""
        named = {name: each.unflatten(1, (-1, self.head_dim)) for name, each in maps.items()}
        given = (self.biases[0] is not None, self.biases[1] is not None)
        first = next(iter(named.values()))
        kernel = self.wide.shape[-1]
        return ScaleProblem.of(first, list(named.items()), INTERPRETED, kernel=kernel, biases=given), named

    def empty_gradients(self) -> dict[str, Tensor]:
        """For those of the weights, by the names that launches have for them; empty for a bias that is not there."""
        wanted = dict(zip(("dw", "dm", "dwb", "dmb"), (self.wide, self.mixing, *self.biases)))
        return {name: self.wide.new_empty(0 if w is None else w.shape) for name, w in wanted.items()}


Make = Callable[[int, Tensor, Tensor, tuple[Tensor | None, Tensor | None]], Convolutions]
"""``make(head_dim, depthwise, pointwise, biases)``."""
Readable = Callable[[Tensor], Tensor]
"""A map as the kernels read it: itself, or a copy."""


def heads(map_: Tensor, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of a map (B, 3C, H, W): views (B, heads, head_dim, H, W)."""
    query, key, value = map_.unflatten(1, (-1, 3, head_dim)).unbind(2)
    return query, key, value


def empty_scale(like: Tensor) -> Tensor:
    """An uninitialised map of these sizes (B, C, H, W), channels last."""
    batch, channels, height, width = like.shape
    return like.new_empty((batch, height, width, channels)).permute(0, 3, 1, 2)


def _each(
    make: Make,
    readable: Readable,
    qkv: Tensor,
    depthwise: Sequence[Tensor],
    pointwise: Sequence[Tensor],
    head_dim: int,
    depthwise_bias: Biases,
    pointwise_bias: Biases,
) -> tuple[Tensor, list[Convolutions]]:
    # qkv as the kernels read it, and what makes each scale of it.
    weights = zip(depthwise, pointwise, zip(depthwise_bias, pointwise_bias))
    return readable(qkv) if depthwise else qkv, [make(head_dim, *each) for each in weights]


def forward(
    make: Make,
    readable: Readable,
    qkv: Tensor,
    depthwise: Sequence[Tensor],
    pointwise: Sequence[Tensor],
    head_dim: int,
    depthwise_bias: Biases,
    pointwise_bias: Biases,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """qkv (B, 3C, H, W), any strides -> (out (B, (1 + S) C, H, W), dense in qkv's order; sums, contiguous).

    sums (1 + S, B, heads, D + 1, D) are relu_linear_attention's of each scale.
    """
    batch, channels = qkv.shape[0], qkv.shape[1] // 3
    scales = 1 + len(depthwise)
    out = empty_map(qkv, scales * channels)
    sums = qkv.new_empty((scales, batch, channels // head_dim, head_dim + 1, head_dim), dtype=sums_dtype(qkv.dtype))
    first, *others = out.unflatten(1, (scales, -1, head_dim)).unbind(1)
    forward_into(first, sums[0], *heads(qkv, head_dim), eps)
    x, each = _each(make, readable, qkv, depthwise, pointwise, head_dim, depthwise_bias, pointwise_bias)
    for i, convolutions in enumerate(each):
        scale = empty_scale(qkv)
        convolutions.aggregate(x, scale)
        forward_into(others[i], sums[1 + i], *heads(scale, head_dim), eps)
    return out, sums


def backward(
    make: Make,
    readable: Readable,
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
    wanted: bool,
) -> list[Tensor]:
    """Write dqkv, and return the gradients of the weights, list by list.

    Empty tensors for what is not there, and for all weights unless ``wanted``. No atomics: the same bits each time.
    """
    grads = grad.unflatten(1, (1 + len(depthwise), -1, head_dim)).unbind(1)
    backward_into(heads(dqkv, head_dim), grads[0], *heads(qkv, head_dim), sums[0], eps)
    x, each = _each(make, readable, qkv, depthwise, pointwise, head_dim, depthwise_bias, pointwise_bias)
    found = []
    for i, convolutions in enumerate(each):
        scale = empty_scale(qkv)
        convolutions.aggregate(x, scale)
        of_scale = heads(scale, head_dim)
        backward_into(of_scale, grads[1 + i], *of_scale, sums[1 + i], eps)
        if wanted:
            found.append(convolutions.weight_gradients(scale, x))
        else:
            found.append(tuple(qkv.new_empty(0) for _ in range(4)))
        convolutions.add_map_gradient(scale, dqkv)
    return [gradient for kind in zip(*found) for gradient in kind]
