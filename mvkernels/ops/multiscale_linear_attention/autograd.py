"""Multi-scale linear attention as torch operators and as an autograd Function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mvkernels import library
from mvkernels.backend import choose
from mvkernels.ops.multiscale_linear_attention.reference import multiscale_linear_attention as reference

KERNELS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {}
"""By backend: ``forward(qkv, depthwise, pointwise, head_dim, depthwise_bias, pointwise_bias, eps) -> (out, *saved)``
and ``backward(grad, qkv, *saved, …the same…, wanted) -> (dqkv, *ddepthwise, *dpointwise, *biases')``."""

Weights = Sequence[Tensor | None]


def flat(depthwise: Weights, pointwise: Weights, first: Weights | None, second: Weights | None) -> tuple[Any, ...]:
    """The weights one after the other: four for each scale, None for a bias that is not there."""
    none = (None,) * len(depthwise)
    return *depthwise, *pointwise, *(first or none), *(second or none)


def parts(weights: Weights) -> tuple[tuple[Any, ...], ...]:
    """What :func:`flat` was given, with a tuple for each."""
    n = len(weights) // 4
    return tuple(tuple(weights[i * n : (i + 1) * n]) for i in range(4))


def call_reference(qkv: Tensor, weights: Weights, head_dim: int, eps: float) -> Tensor:
    depthwise, pointwise, first, second = parts(weights)
    return reference(qkv, depthwise, pointwise, head_dim, first, second, eps)


class Flat(torch.autograd.Function):
    """What stands behind :class:`MultiscaleLinearAttentionFunction`: checked, and with tensors in no lists.

    ``apply(qkv, head_dim, eps, backend, *flat(weights))``.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, qkv: Tensor, head_dim: int, eps: float, backend: str, *weights: Tensor | None
    ) -> Tensor:
        ctx.settings, ctx.backend = (head_dim, eps), backend
        if backend == "reference":
            ctx.save_for_backward(qkv, *weights)
            return call_reference(qkv, weights, head_dim, eps)
        raise NotImplementedError(backend)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        needs = ctx.needs_input_grad
        wanted = (needs[0], *needs[4:])
        saved = ctx.saved_tensors
        with torch.no_grad():
            grads = library.differentiate(
                lambda qkv, *weights: call_reference(qkv, weights, *ctx.settings), grad, saved, wanted
            )
        if torch.is_grad_enabled():
            grads = library.refuse_second_derivative("multiscale_linear_attention", grads, (grad, *saved))
        return grads[0], None, None, None, *grads[1:]


class MultiscaleLinearAttentionFunction(Flat):
    """:func:`mvkernels.multiscale_linear_attention` with its own backward.

    ``apply(qkv, depthwise, pointwise, head_dim, depthwise_bias, pointwise_bias, eps, backend)``, the op's arguments in
    order; those after ``head_dim`` may be left out. All tensors of the lists get their gradients. Inside
    ``torch.compile`` call the op instead: there, ``apply`` cannot take lists. A second derivative raises RuntimeError.
    """

    @classmethod
    def apply(  # type: ignore[override]
        cls,
        qkv: Tensor,
        depthwise: Sequence[Tensor],
        pointwise: Sequence[Tensor],
        head_dim: int,
        depthwise_bias: Weights | None = None,
        pointwise_bias: Weights | None = None,
        eps: float = 1e-15,
        backend: str | None = None,
    ) -> Tensor:
        from mvkernels.ops.multiscale_linear_attention import OP

        arguments = OP.check(qkv, depthwise, pointwise, head_dim, depthwise_bias, pointwise_bias, eps)
        backend = choose(OP, backend, arguments)
        qkv, depthwise, pointwise, head_dim, depthwise_bias, pointwise_bias, eps = arguments
        weights = flat(depthwise, pointwise, depthwise_bias, pointwise_bias)
        return Flat.apply(qkv, head_dim, eps, backend, *weights)
