"""Mobile to Former as torch operators and as an autograd Function."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

from mvkernels.dispatch import checks, library
from mvkernels.dispatch.backend import prepare
from mvkernels.ops.mobile_to_former.reference import mobile_to_former as reference

_NAME = "mobile_to_former"
_FORWARD = "(Tensor query, Tensor x, float scale) -> Tensor"
_BACKWARD = "(Tensor grad, Tensor query, Tensor x, float scale) -> (Tensor dquery, Tensor dx)"


def _fake_forward(query, x, scale):  # type: ignore[no-untyped-def]
    return query.new_empty(query.shape)


def _fake_backward(grad, query, x, scale):  # type: ignore[no-untyped-def]
    return query.new_empty(query.shape), checks.empty_map(x, x.shape[2])


def _count(query, x, scale):  # type: ignore[no-untyped-def]
    return 4 * prod(query) * x[3] * x[4]


def _count_backward(grad, query, x, *_):  # type: ignore[no-untyped-def]
    return 8 * prod(query) * x[3] * x[4]


def launcher() -> Any:
    """The module that launches the Triton kernels, imported only here."""
    from mvkernels.ops.mobile_to_former.triton import launcher

    return launcher


KERNELS = {
    backend: library.pair(
        backend, _NAME, (_FORWARD, _BACKWARD), (_fake_forward, _fake_backward), (_count, _count_backward), launcher
    )
    for backend in ("cpp", "triton")
}


class MobileToFormerFunction(torch.autograd.Function):
    """Autograd function of :func:`mvkernels.mobile_to_former`, with a backward of its own.

    Call ``apply(query, x, scale, backend)``. Shapes, dtypes, result and errors are those of the op; the arguments after
    ``x`` may be left out. ``kernel`` is for internal use: the op passes the forward kernel that it has chosen. Only the
    inputs are saved; the backward recomputes the probabilities. A second derivative raises RuntimeError unless the
    backend is "reference".
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        query: Tensor,
        x: Tensor,
        scale: float | None = None,
        backend: str | None = None,
        kernel: Any = None,
    ) -> Tensor:
        if kernel is None:
            backend, arguments = prepare(_NAME, backend, query, x, scale)
            query, x, scale = arguments
        ctx.settings = scale, backend
        ctx.save_for_backward(query, x)
        if backend == "reference":
            return reference(query, x, scale)
        return (kernel or KERNELS[backend][0])(query, x, scale)  # type: ignore[index]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        scale, backend = ctx.settings
        saved, wanted = ctx.saved_tensors, ctx.needs_input_grad[:2]
        if backend == "reference":
            grads = library.differentiate(lambda q, x: reference(q, x, scale), grad, saved, wanted)
        else:
            grads = library.gradients(_NAME, KERNELS[backend][1], (grad, *saved, scale), saved, wanted)
        return *grads, None, None, None
