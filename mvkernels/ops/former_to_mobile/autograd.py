"""Former to Mobile as torch operators and as an autograd Function."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

from mvkernels.dispatch import checks, library
from mvkernels.dispatch.backend import prepare
from mvkernels.ops.former_to_mobile.reference import former_to_mobile as reference

_NAME = "former_to_mobile"
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


def launcher() -> Any:
    """The module that launches the Triton kernels, imported only here."""
    from mvkernels.ops.former_to_mobile.triton import launcher

    return launcher


KERNELS = {
    backend: library.pair(
        backend, _NAME, (_FORWARD, _BACKWARD), (_fake_forward, _fake_backward), (_count, _count_backward), launcher
    )
    for backend in ("cpp", "triton")
}


class FormerToMobileFunction(torch.autograd.Function):
    """Autograd function of :func:`mvkernels.former_to_mobile`, with a backward of its own.

    Call ``apply(x, key, value, scale, residual, backend)``. Shapes, dtypes, result and errors are those of the op; the
    arguments after ``value`` may be left out. ``kernel`` is for internal use: the op passes the forward kernel that it
    has chosen. Only the inputs are saved; the backward recomputes the probabilities. A second derivative raises
    RuntimeError unless the backend is "reference".
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
            backend, arguments = prepare(_NAME, backend, x, key, value, scale, residual)
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
            grads = library.gradients(_NAME, KERNELS[backend][1], (grad, *saved, *settings), saved, wanted)
        return *grads, None, None, None, None
