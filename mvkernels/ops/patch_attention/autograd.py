"""Patch attention as torch operators and as an autograd Function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mvkernels.dispatch import checks, flops, library
from mvkernels.dispatch.backend import prepare
from mvkernels.ops.patch_attention.reference import patch_attention as reference

_NAME = "patch_attention"
_SETTINGS = "int patch_h, int patch_w, Tensor? bias, float scale"
_FORWARD = f"(Tensor query, Tensor key, Tensor value, {_SETTINGS}) -> Tensor"
_BACKWARD = f"(Tensor grad, Tensor query, Tensor key, Tensor value, {_SETTINGS}, bool need_bias)"
_BACKWARD += " -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias)"


def _fake_forward(query, key, value, patch_h, patch_w, bias, scale):  # type: ignore[no-untyped-def]
    return checks.empty_map(query, value.shape[2])


def _fake_backward(grad, query, key, value, patch_h, patch_w, bias, scale, need_bias):  # type: ignore[no-untyped-def]
    maps = tuple(checks.empty_map(m, m.shape[2]) for m in (query, key, value))
    return *maps, bias.new_empty(bias.shape) if need_bias else query.new_empty(0)


def _count(query, key, value, patch_h, patch_w, *_):  # type: ignore[no-untyped-def]
    return flops.grouped_attention(query, value, patch_h, patch_w)


def _count_backward(grad, query, key, value, patch_h, patch_w, *_):  # type: ignore[no-untyped-def]
    return 2 * flops.grouped_attention(query, value, patch_h, patch_w)


def launcher() -> Any:
    """The module that launches the Triton kernels, imported only here."""
    from mvkernels.ops.patch_attention.triton import launcher

    return launcher


KERNELS = {
    backend: library.pair(
        backend, _NAME, (_FORWARD, _BACKWARD), (_fake_forward, _fake_backward), (_count, _count_backward), launcher
    )
    for backend in ("cpp", "triton")
}


class PatchAttentionFunction(torch.autograd.Function):
    """Autograd function of :func:`mvkernels.patch_attention`, with a backward of its own.

    Call ``apply(query, key, value, patch_size, bias, scale, backend)``. Shapes, dtypes, result and errors are those of
    the op; the arguments after ``value`` may be left out. ``kernel`` is for internal use: the op passes the forward
    kernel that it has chosen. For the backward, query, key, value and bias are saved, but no scores. A second
    derivative raises RuntimeError unless the backend is "reference".
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        patch_size: Any = (2, 2),
        bias: Tensor | None = None,
        scale: float | None = None,
        backend: str | None = None,
        kernel: Any = None,
    ) -> Tensor:
        if kernel is None:
            backend, arguments = prepare(_NAME, backend, query, key, value, patch_size, bias, scale)
            query, key, value, patch_size, bias, scale = arguments
        ph, pw = patch_size
        ctx.settings = ph, pw, scale, backend
        ctx.save_for_backward(query, key, value, bias)
        if backend == "reference":
            return reference(query, key, value, patch_size, bias, scale)
        return (kernel or KERNELS[backend][0])(query, key, value, ph, pw, bias, scale)  # type: ignore[index]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        ph, pw, scale, backend = ctx.settings
        saved = ctx.saved_tensors
        needs = (*ctx.needs_input_grad, False, False)  # as long as the arguments that were passed
        wanted = (*needs[:3], needs[4])
        if backend == "reference":
            grads = library.differentiate(
                lambda q, k, v, bias: reference(q, k, v, (ph, pw), bias, scale), grad, saved, wanted
            )
        else:
            *maps, bias = saved
            with library.not_recording():
                found = KERNELS[backend][1](grad, *maps, ph, pw, bias, scale, wanted[3])
            grads = [g if w else None for g, w in zip(found, wanted)]
            if torch.is_grad_enabled():
                grads = library.refuse_second_derivative(_NAME, grads, (grad, *saved))
        return grads[0], grads[1], grads[2], None, grads[3], None, None, None
