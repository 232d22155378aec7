"""Patch attention as torch operators and as an autograd Function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mvkernels import checks, flops, library
from mvkernels.backend import choose
from mvkernels.ops.patch_attention.reference import patch_attention as reference

_INPUTS = "(Tensor query, Tensor key, Tensor value, int patch_h, int patch_w, Tensor? bias, float scale)"
_SETTINGS = "int patch_h, int patch_w, Tensor? bias, float scale, bool need_bias)"
_GRADIENTS = " -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias)"
_FORWARD = _INPUTS + " -> Tensor"
_BACKWARD = "(Tensor grad, Tensor query, Tensor key, Tensor value, " + _SETTINGS + _GRADIENTS
# Triton's backward takes the output and the log-sum-exp of each row of scores.
_FORWARD_TRITON = _INPUTS + " -> (Tensor out, Tensor lse)"
_BACKWARD_TRITON = "(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, "
_BACKWARD_TRITON += _SETTINGS + _GRADIENTS


def _fake_forward_cpp(query, key, value, patch_h, patch_w, bias, scale):  # type: ignore[no-untyped-def]
    return checks.empty_map(query, value.shape[2])


def _fake_forward_triton(query, key, value, patch_h, patch_w, bias, scale):  # type: ignore[no-untyped-def]
    b, h, _, height, width = query.shape
    return checks.empty_map(query, value.shape[2]), query.new_empty((b, h, height, width), dtype=torch.float32)


def _fake_backward(grad, query, key, value, *rest):  # type: ignore[no-untyped-def]
    bias, need_bias = rest[-3], rest[-1]
    maps = tuple(checks.empty_map(m, m.shape[2]) for m in (query, key, value))
    return *maps, bias.new_empty(bias.shape) if need_bias else query.new_empty(0)


def _count(query, key, value, patch_h, patch_w, *_):  # type: ignore[no-untyped-def]
    return flops.grouped_attention(query, value, patch_h, patch_w)


def _count_backward(grad, query, key, value, *rest):  # type: ignore[no-untyped-def]
    patch_h, patch_w = rest[-5:-3]
    return 2 * flops.grouped_attention(query, value, patch_h, patch_w)


def _triton_forward(query: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    from mvkernels.ops.patch_attention import triton_kernels

    if query.shape[0] == 0:  # a grid of no blocks cannot be launched
        return _fake_forward_triton(query, *rest)
    return triton_kernels.forward(query, *rest)


def _triton_backward(grad: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    from mvkernels.ops.patch_attention import triton_kernels

    if grad.shape[0] == 0:
        *maps, dbias = _fake_backward(grad, *rest)
        return *maps, dbias.zero_()
    return triton_kernels.backward(grad, *rest)


KERNELS = {
    "cpp": (
        library.define("cpp", "patch_attention_forward", _FORWARD, _fake_forward_cpp, count=_count),
        library.define("cpp", "patch_attention_backward", _BACKWARD, _fake_backward, count=_count_backward),
    ),
    "triton": (
        library.define(
            "triton", "patch_attention_forward", _FORWARD_TRITON, _fake_forward_triton, _triton_forward, count=_count
        ),
        library.define(
            "triton",
            "patch_attention_backward",
            _BACKWARD_TRITON,
            _fake_backward,
            _triton_backward,
            count=_count_backward,
        ),
    ),
}
INFERENCE = {"cpp": KERNELS["cpp"][0], "triton": library.output(KERNELS["triton"][0])}
"""By backend: the forward of a call that records no gradient, and leaves nothing for a backward."""


class PatchAttentionFunction(torch.autograd.Function):
    """:func:`mvkernels.patch_attention` with its own backward.

    ``apply(query, key, value, patch_size, bias, scale, backend)``, the op's arguments in order; those
    after ``value`` may be left out; ``kernel`` is the public function's, which has checked them and chosen the
    backend: its forward. Saves query, key, value and bias; on Triton also the output and the log-sum-exp of each row of
    scores (B, heads, H, W): nothing unfolded, no scores. A second derivative raises RuntimeError.
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
            from mvkernels.ops.patch_attention import OP

            arguments = OP.check(query, key, value, patch_size, bias, scale)
            backend = choose(OP, backend, arguments)
            query, key, value, patch_size, bias, scale = arguments
        ph, pw = patch_size
        ctx.settings = ph, pw, scale, backend
        if backend == "reference":
            ctx.save_for_backward(query, key, value, bias)
            return reference(query, key, value, patch_size, bias, scale)
        found = (kernel or KERNELS[backend][0])(query, key, value, ph, pw, bias, scale)  # type: ignore[index]
        if backend == "cpp":
            ctx.save_for_backward(query, key, value, bias)
            return found
        ctx.save_for_backward(query, key, value, bias, *found)
        return found[0]

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
            query, key, value, bias, *kept = saved
            with library.not_recording():
                kernel = KERNELS[backend][1]
                found = kernel(grad, query, key, value, *kept, ph, pw, bias, scale, wanted[3])
            grads = [g if w else None for g, w in zip(found, wanted)]
            if torch.is_grad_enabled():
                grads = library.refuse_second_derivative("patch_attention", grads, (grad, *saved[:4]))
        return grads[0], grads[1], grads[2], None, grads[3], None, None, None
