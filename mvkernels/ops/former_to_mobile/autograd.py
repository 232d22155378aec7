"""Former to Mobile as torch operators and as an autograd Function."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

from mvkernels import checks, library
from mvkernels.backend import choose
from mvkernels.ops.former_to_mobile.reference import former_to_mobile as reference

_FORWARD = "(Tensor x, Tensor key, Tensor value, float scale, bool residual) -> Tensor"
_BACKWARD = "(Tensor grad, Tensor x, Tensor key, Tensor value, float scale, bool residual)"
_BACKWARD += " -> (Tensor dx, Tensor dkey, Tensor dvalue)"


def _fake_forward(x, key, value, scale, residual):  # type: ignore[no-untyped-def]
    return checks.empty_map(x, x.shape[2])


def _fake_backward(grad, x, key, value, scale, residual):  # type: ignore[no-untyped-def]
    return checks.empty_map(x, x.shape[2]), key.new_empty(key.shape), value.new_empty(value.shape)


def _count(x, key, *_):  # type: ignore[no-untyped-def]
    return 4 * prod(key) * x[3] * x[4]


def _count_backward(grad, x, key, *_):  # type: ignore[no-untyped-def]
    return 8 * prod(key) * x[3] * x[4]


def _triton_forward(x: Tensor, *rest: Any) -> Tensor:
    from mvkernels.ops.former_to_mobile import triton_kernels

    if x.shape[0] == 0:  # a grid of no blocks cannot be launched
        return _fake_forward(x, *rest)
    return triton_kernels.forward(x, *rest)


def _triton_backward(grad: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    from mvkernels.ops.former_to_mobile import triton_kernels

    if grad.shape[0] == 0:
        return _fake_backward(grad, *rest)
    return triton_kernels.backward(grad, *rest)


KERNELS = {
    "cpp": (
        library.define("cpp", "former_to_mobile_forward", _FORWARD, _fake_forward, count=_count),
        library.define("cpp", "former_to_mobile_backward", _BACKWARD, _fake_backward, count=_count_backward),
    ),
    "triton": (
        library.define("triton", "former_to_mobile_forward", _FORWARD, _fake_forward, _triton_forward, count=_count),
        library.define(
            "triton", "former_to_mobile_backward", _BACKWARD, _fake_backward, _triton_backward, count=_count_backward
        ),
    ),
}


class FormerToMobileFunction(torch.autograd.Function):
    """:func:`mvkernels.former_to_mobile` with its own backward.

    ``apply(x, key, value, scale, residual, backend)``, the op's arguments in order; those after ``value``
    may be left out; ``kernel`` is the public function's, which has checked them and chosen the backend: its
    forward. Saves its inputs and nothing else: the backward recomputes the probabilities. A second derivative
    raises RuntimeError.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float | None = None,
        residual: bool = True,
        backend: str | None = None,
        kernel: Any = None,
    ) -> Tensor:
        if kernel is None:
            from mvkernels.ops.former_to_mobile import OP

            arguments = OP.check(x, key, value, scale, residual)
            backend = choose(OP, backend, arguments)
            x, key, value, scale, residual = arguments
        ctx.settings = scale, residual, backend
        ctx.save_for_backward(x, key, value)
        if backend == "reference":
            return reference(x, key, value, scale, residual)
        return (kernel or KERNELS[backend][0])(x, key, value, scale, residual)  # type: ignore[index]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        *settings, backend = ctx.settings
        saved, wanted = ctx.saved_tensors, ctx.needs_input_grad[:3]
        if backend == "reference":
            grads = library.differentiate(lambda x, k, v: reference(x, k, v, *settings), grad, saved, wanted)
        else:
            with library.not_recording():
                found = KERNELS[backend][1](grad, *saved, *settings)
            grads = [g if w else None for g, w in zip(found, wanted)]
            if torch.is_grad_enabled():
                grads = library.refuse_second_derivative("former_to_mobile", grads, (grad, *saved))
        return *grads, None, None, None, None
