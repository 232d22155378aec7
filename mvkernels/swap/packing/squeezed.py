"""Inverted residuals with squeeze and excitation before the projection, on packed weights.

The gate needs the whole hidden map before the projection can use any of it. So there are two kernels: one makes the
hidden map, the other multiplies it by the gate while it projects.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn.functional import linear

from mvkernels.swap.packing import layers
from mvkernels.swap.packing.layers import Multiply, Part
from mvkernels.swap.packing.plans import Keep

Squeeze = tuple[Any, Callable[[Tensor], Tensor], Any, Callable[[Tensor], Tensor]]
"""A 1 x 1 convolution, an activation, another one, and what makes factors of its result."""


def squeezed(
    widen: Part, depthwise: Part, squeeze: Squeeze | None, project: Part, keep: Keep, norm: Any
) -> Multiply | None:
    """``project(gated(depthwise(widen(norm(x))))) + residual`` of a map x and a residual; None if there is no op for a
    part, or not for its present state."""
    hidden = layers.hidden_map(widen, depthwise, keep, norm)
    narrow = None if hidden is None else layers.multiplication(project[0], keep, project[2], None, project[1])
    gate = None if squeeze is None else _gate(*squeeze)
    if hidden is None or narrow is None or (gate is None and squeeze is not None):
        return None

    def run(x: Tensor, residual: Tensor) -> Tensor:
        y = hidden(x)
        return narrow(y, residual, None if gate is None else gate(y))

    return run


def _gate(
    fc1: Any, activation: Callable[[Tensor], Tensor], fc2: Any, factors: Callable[[Tensor], Tensor]
) -> Callable[[Tensor], Tensor] | None:
    """The factors (B, C) of a map."""
    for conv in (fc1, fc2):
        if layers.of_convolution(conv) != "pointwise" or layers.resting(conv, None, ()) is None:
            return None
    # For a vector the products of PyTorch are as good as any.
    first, last = ((conv.weight.flatten(1), conv.bias) for conv in (fc1, fc2))
    return lambda x: factors(linear(activation(linear(x.mean((2, 3)), *first)), *last))
