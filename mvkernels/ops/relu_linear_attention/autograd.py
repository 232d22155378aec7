"""ReLU linear attention as torch operators and as an autograd Function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mvkernels import library
from mvkernels.backend import choose
from mvkernels.ops.relu_linear_attention.reference import relu_linear_attention as reference

KERNELS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {}


class ReLULinearAttentionFunction(torch.autograd.Function):
    """:func:`mvkernels.relu_linear_attention` with its own backward.

    ``apply(query, key, value, eps, backend)``, the op's arguments in order; those after ``value`` may be left out;
    ``checked`` is the public function's, which has checked them and chosen the backend. Saves query, key and value
    and the sums over pixels (B, heads, D, D) and (B, heads, D), not the output. A second derivative raises
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
        out, kv, keys = KERNELS[backend][0](query, key, value, eps)  # type: ignore[index]
        ctx.save_for_backward(query, key, value, kv, keys)
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
