"""Multi-scale linear attention as torch operators and as an autograd Function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mvkernels import checks, library
from mvkernels.backend import choose
from mvkernels.ops.multiscale_linear_attention.reference import multiscale_linear_attention as reference

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


_WEIGHTS = "Tensor[] depthwise, Tensor[] pointwise, int head_dim, Tensor?[] depthwise_bias, Tensor?[] pointwise_bias"
_FORWARD = f"(Tensor qkv, {_WEIGHTS}, float eps) -> (Tensor out, Tensor sums)"
_BACKWARD = f"(Tensor grad, Tensor qkv, Tensor sums, {_WEIGHTS}, float eps, bool weights) -> Tensor[]"


def _fake_forward_triton(qkv, depthwise, pointwise, head_dim, depthwise_bias, pointwise_bias, eps):  # type: ignore[no-untyped-def]
    # For each scale, as relu_linear_attention's sums: a row of D for each of D channels of the key, and one more.
    scales, channels = 1 + len(depthwise), qkv.shape[1] // 3
    dtype = torch.promote_types(qkv.dtype, torch.float32)
    sums = qkv.new_empty((scales, qkv.shape[0], channels // head_dim, head_dim + 1, head_dim), dtype=dtype)
    return checks.empty_map(qkv, scales * channels), sums


def _fake_backward_triton(grad, qkv, sums, depthwise, pointwise, head_dim, first, second, eps, weights):  # type: ignore[no-untyped-def]
    # Of what is not there, and of all weights where none is wanted, an empty tensor.
    given = flat(depthwise, pointwise, first, second)
    dweights = [qkv.new_empty(0) if w is None or not weights else qkv.new_empty(w.shape) for w in given]
    return [checks.empty_map(qkv, qkv.shape[1]), *dweights]


def _triton_forward(qkv: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    from mvkernels.ops.multiscale_linear_attention import triton_kernels

    if qkv.shape[0] == 0:  # a grid of no blocks cannot be launched
        return _fake_forward_triton(qkv, *rest)
    return triton_kernels.forward(qkv, *rest)


def _triton_backward(grad: Tensor, *rest: Any) -> list[Tensor]:
    from mvkernels.ops.multiscale_linear_attention import triton_kernels

    if grad.shape[0] == 0:
        return [g.zero_() for g in _fake_backward_triton(grad, *rest)]
    return triton_kernels.backward(grad, *rest)


_NAMES = ("multiscale_linear_attention_forward", "multiscale_linear_attention_backward")
KERNELS = {
    "triton": (
        library.define("triton", _NAMES[0], _FORWARD, _fake_forward_triton, _triton_forward),
        library.define("triton", _NAMES[1], _BACKWARD, _fake_backward_triton, _triton_backward),
    ),
}
"""By backend: ``forward(qkv, depthwise, pointwise, head_dim, depthwise_bias, pointwise_bias, eps) -> (out, *saved)``
and ``backward(grad, qkv, *saved, depthwise, …, eps, weights) -> [dqkv, *dweights]``, the weights' in the order of
:func:`flat` and only if ``weights``. The lists of biases are as long as the others."""


def call(backend: str, qkv: Tensor, head_dim: int, eps: float, weights: Weights) -> tuple[Tensor, ...]:
    """The output, and what the backward needs, of a backend that has kernels."""
    depthwise, pointwise, first, second = parts(weights)
    return KERNELS[backend][0](qkv, depthwise, pointwise, head_dim, first, second, eps)


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
        out, *saved = call(backend, qkv, head_dim, eps, weights)
        ctx.save_for_backward(qkv, *weights, *saved)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        needs = ctx.needs_input_grad
        wanted = (needs[0], *needs[4:])
        inputs, saved = ctx.saved_tensors[: len(wanted)], ctx.saved_tensors[len(wanted) :]
        head_dim, eps = ctx.settings
        with torch.no_grad():
            if ctx.backend == "reference":
                grads = library.differentiate(
                    lambda qkv, *weights: call_reference(qkv, weights, head_dim, eps), grad, inputs, wanted
                )
            else:
                depthwise, pointwise, first, second = parts(inputs[1:])
                found = KERNELS[ctx.backend][1](
                    grad, inputs[0], *saved, depthwise, pointwise, head_dim, first, second, eps, any(wanted[1:])
                )
                grads = [g if w else None for g, w in zip(found, wanted)]
        if torch.is_grad_enabled():
            grads = library.refuse_second_derivative("multiscale_linear_attention", grads, (grad, *inputs))
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
