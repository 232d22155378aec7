"""ReLU linear attention as torch operators and as an autograd Function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mvkernels import checks, library
from mvkernels.backend import choose
from mvkernels.ops.relu_linear_attention.reference import relu_linear_attention as reference

_FORWARD = "(Tensor query, Tensor key, Tensor value, float eps) -> (Tensor out, Tensor sums)"
_BACKWARD = "(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor sums, float eps)"
_BACKWARD += " -> (Tensor dq, Tensor dk, Tensor dv)"


def _fake_forward_triton(query, key, value, eps):  # type: ignore[no-untyped-def]
    b, h, d = query.shape[:3]
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return checks.empty_map(query, d), query.new_empty((b, h, d + 1, d), dtype=dtype)


def _fake_backward(grad, query, key, value, sums, eps):  # type: ignore[no-untyped-def]
    return tuple(checks.empty_map(each, each.shape[2]) for each in (query, key, value))


def _triton_forward(query: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    from mvkernels.ops.relu_linear_attention import triton_kernels

    if query.shape[0] == 0:  # a grid of no blocks cannot be launched
        return _fake_forward_triton(query, *rest)
    return triton_kernels.forward(query, *rest)


def _triton_backward(grad: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    from mvkernels.ops.relu_linear_attention import triton_kernels

    if grad.shape[0] == 0:
        return _fake_backward(grad, *rest)
    return triton_kernels.backward(grad, *rest)


_NAME = "relu_linear_attention"
KERNELS = {
    "triton": (
        library.define("triton", _NAME + "_forward", _FORWARD, _fake_forward_triton, _triton_forward),
        library.define("triton", _NAME + "_backward", _BACKWARD, _fake_backward, _triton_backward),
    ),
}
"""By backend: ``forward(query, key, value, eps) -> (out, *sums)`` and
``backward(grad, query, key, value, *sums, eps) -> (dq, dk, dv)``."""


class ReLULinearAttentionFunction(torch.autograd.Function):
    """:func:`mvkernels.relu_linear_attention` with its own backward.

    ``apply(query, key, value, eps, backend)``, the op's arguments in order; those after ``value`` may be left out;
    ``checked`` is the public function's, which has checked them and chosen the backend. Saves query, key and value
    and the sums over pixels, (B, heads, D + 1, D), not the output. A second derivative raises
    RuntimeError.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        eps: float = 1e-15,
        backend: str | None = None,
        checked: bool = False,
    ) -> Tensor:
        if not checked:
            from mvkernels.ops.relu_linear_attention import OP

            arguments = OP.check(query, key, value, eps)
            backend = choose(OP, backend, arguments)
            query, key, value, eps = arguments
        ctx.eps, ctx.backend = eps, backend
        if backend == "reference":
            ctx.save_for_backward(query, key, value)
            return reference(query, key, value, eps)
        out, *sums = KERNELS[backend][0](query, key, value, eps)  # type: ignore[index]
        ctx.save_for_backward(query, key, value, *sums)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        saved, wanted = ctx.saved_tensors, ctx.needs_input_grad[:3]
        with torch.no_grad():
            if ctx.backend == "reference":
                grads = library.differentiate(lambda q, k, v: reference(q, k, v, ctx.eps), grad, saved, wanted)
            else:
                found = KERNELS[ctx.backend][1](grad, *saved, ctx.eps)
                grads = [g if w else None for g, w in zip(found, wanted)]
        if torch.is_grad_enabled():
            grads = library.refuse_second_derivative("relu_linear_attention", grads, (grad, *saved[:3]))
        return *grads, None, None, None
