"""Window attention as torch operators and as an autograd Function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mvkernels.ops.common import grouped
from mvkernels.ops.common.groups import window_pairs
from mvkernels.ops.window_attention.reference import window_attention as reference

_NAME = "window_attention"


def launcher() -> Any:
    """The module that launches the Triton kernels, imported only here."""
    from mvkernels.ops.window_attention.triton import launcher

    return launcher


def cuda_launcher() -> Any:
    """The module that launches the kernels in CUDA C++, imported only here."""
    from mvkernels.ops.window_attention.cuda import launcher

    return launcher


def _pairs(sizes: Any, _: Any, *numbers: int) -> int:
    return window_pairs(sizes, numbers[:2], numbers[2:])  # type: ignore[arg-type]


KERNELS = grouped.operators(
    _NAME, "int window_h, int window_w, int shift_h, int shift_w", _pairs, launcher, cuda_launcher
)
_DERIVATIVE = grouped.Derivative(_NAME, reference, KERNELS)


class WindowAttentionFunction(torch.autograd.Function):
    """Autograd function of :func:`mvkernels.window_attention`, with a backward of its own.

    Call ``apply(query, key, value, window_size, shift, bias, scale, backend)``. Shapes, dtypes, result and errors are
    those of the op; the arguments after ``window_size`` may be left out. ``kernel`` is for internal use: the op passes
    the forward kernel that it has chosen. For the backward, query, key, value and bias are saved, but no scores. A
    second derivative raises RuntimeError unless the backend is "reference".
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        window_size: Any,
        shift: Any = (0, 0),
        bias: Tensor | None = None,
        scale: float | None = None,
        backend: str | None = None,
        kernel: Any = None,
    ) -> Tensor:
        return _DERIVATIVE.forward(ctx, (query, key, value), (window_size, shift), bias, scale, backend, kernel)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return _DERIVATIVE.backward(ctx, grad)
