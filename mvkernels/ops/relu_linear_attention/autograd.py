"""ReLU linear attention as torch operators and as an autograd Function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mvkernels.dispatch import checks, flops, library
from mvkernels.dispatch.backend import prepare
from mvkernels.ops.relu_linear_attention.reference import relu_linear_attention as reference

_NAME = "relu_linear_attention"
_INPUTS = "Tensor query, Tensor key, Tensor value"
_GRADS = "(Tensor dquery, Tensor dkey, Tensor dvalue)"


def _fake_forward_cpp(query, key, value, eps):  # type: ignore[no-untyped-def]
    # Sums over pixels: of value times relu(key), and of relu(key).
    b, heads, dim = query.shape[:3]
    dtype = torch.promote_types(query.dtype, torch.float32)
    kv, keys = query.new_empty((b, heads, dim, dim), dtype=dtype), query.new_empty((b, heads, dim), dtype=dtype)
    return checks.empty_map(query, dim), kv, keys


def _fake_forward_triton(query, key, value, eps):  # type: ignore[no-untyped-def]
    # The same in one: a row of D for each of D channels of the key, and one more.
    b, heads, dim = query.shape[:3]
    dtype = torch.promote_types(query.dtype, torch.float32)
    return checks.empty_map(query, dim), query.new_empty((b, heads, dim + 1, dim), dtype=dtype)


def _fake_backward(grad, query, key, value, *_):  # type: ignore[no-untyped-def]
    return tuple(checks.empty_map(each, each.shape[2]) for each in (query, key, value))


def _count(query, *_):  # type: ignore[no-untyped-def]
    b, heads, dim, height, width = query
    return flops.linear_attention(b * heads, dim, height * width)


def _count_backward(grad, query, *_):  # type: ignore[no-untyped-def]
    return 2 * _count(query)


def launcher() -> Any:
    """The module that launches the Triton kernels, imported only here."""
    from mvkernels.ops.relu_linear_attention.triton import launcher

    return launcher


_FORWARD = {
    "cpp": f"({_INPUTS}, float eps) -> (Tensor out, Tensor kv, Tensor keys)",
    "triton": f"({_INPUTS}, float eps) -> (Tensor out, Tensor sums)",
}
_BACKWARD = {
    "cpp": f"(Tensor grad, {_INPUTS}, Tensor kv, Tensor keys, float eps) -> {_GRADS}",
    "triton": f"(Tensor grad, {_INPUTS}, Tensor sums, float eps) -> {_GRADS}",
}
_FAKE_FORWARD = {"cpp": _fake_forward_cpp, "triton": _fake_forward_triton}
KERNELS = {
    backend: library.pair(
        backend, _NAME, (_FORWARD[backend], _BACKWARD[backend]), (_FAKE_FORWARD[backend], _fake_backward),
        (_count, _count_backward), launcher,
    )
    for backend in ("cpp", "triton")
}  # fmt: skip
"""By backend: ``forward(query, key, value, eps) -> (out, *sums)`` and
``backward(grad, query, key, value, *sums, eps) -> (dq, dk, dv)``."""

INFERENCE = {
    "cpp": library.define(
        "cpp",
        "relu_linear_attention",
        f"({_INPUTS}, float eps) -> Tensor",
        library.output(_fake_forward_cpp),
        count=_count,
    ),
    "triton": library.output(KERNELS["triton"][0]),
}
"""By backend: the forward of a call that records no gradient, and leaves nothing for a backward."""


class ReLULinearAttentionFunction(torch.autograd.Function):
    """Autograd function of :func:`mvkernels.relu_linear_attention`, with a backward of its own.

    Call ``apply(query, key, value, eps, backend)``. Shapes, dtypes, result and errors are those of the op; the
    arguments after ``value`` may be left out. ``kernel`` is for internal use: the op passes the forward kernel that it
    has chosen. For the backward, query, key, value and the sums over pixels (B, heads, head_dim + 1, head_dim) are
    saved. A second derivative raises RuntimeError unless the backend is "reference".
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        eps: float = 1e-15,
        backend: str | None = None,
        kernel: Any = None,
    ) -> Tensor:
        if kernel is None:
            backend, arguments = prepare(_NAME, backend, query, key, value, eps)
            query, key, value, eps = arguments
        ctx.settings = eps, backend
        if backend == "reference":
            ctx.save_for_backward(query, key, value)
            return reference(query, key, value, eps)
        out, *sums = (kernel or KERNELS[backend][0])(query, key, value, eps)  # type: ignore[index]
        ctx.save_for_backward(query, key, value, *sums)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        eps, backend = ctx.settings
        saved, wanted = ctx.saved_tensors, ctx.needs_input_grad[:3]
        if backend == "reference":
            grads = library.differentiate(lambda q, k, v: reference(q, k, v, eps), grad, saved, wanted)
        else:
            grads = library.gradients(_NAME, KERNELS[backend][1], (grad, *saved, eps), saved[:3], wanted)
        return *grads, None, None, None
