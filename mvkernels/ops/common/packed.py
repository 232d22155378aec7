"""Packed weights, as the C++ kernels lay them: their sizes, and what an op asks of those that it is given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mvkernels.dispatch import checks, extension
from mvkernels.dispatch.backend import BackendUnavailable

HEADER = 16
"""Elements before the weights, which say what they were packed for."""
_WIDEST = 32
"""Columns of the widest panel of an instruction set: packed weights have one size on all of them."""


def wide(channels: int) -> int:
    """Channels in whole panels."""
    return (channels + _WIDEST - 1) // _WIDEST * _WIDEST


def check(op: str, packed: Any, x: Tensor, size: int) -> None:
    """``packed`` may be ``pack_<op>`` of weights that have this size packed; the kernel compares what is written in it.

    Raises TypeError or ValueError.
    """
    checks.tensors(op, packed=packed)
    if packed.dtype != torch.float32:
        raise TypeError(f"{op}: packed has dtype {checks.short(packed.dtype)}, want float32")
    if packed.device != x.device:
        raise ValueError(f"{op}: packed is on {packed.device} and x on {x.device}")
    if packed.shape != (size,) or packed.stride(0) != 1:
        found = f"{checks.shape(packed)}" if packed.shape != (size,) else "strided"
        raise ValueError(f"{op}: packed is {found}, want what pack_{op} makes of these weights")


def why_not_recorded(*tensors: Any, kernel: str = "C++") -> str:
    """Why a kernel without a backward cannot run on these tensors now; empty if it can."""
    if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in tensors):
        return f"a gradient is recorded, and the {kernel} kernel has no backward"
    return ""


def why_not(weight: Tensor) -> str | None:
    """Why there are no kernels on packed weights for this one, or None if there are."""
    if weight.dtype != torch.float32:
        return f"the C++ kernel is for float32, but these tensors are {checks.short(weight.dtype)}"
    return extension.why_not(weight)


def pack(op: str, reason: str | None, operator: Callable[..., Tensor], *given: Any) -> Tensor:
    """What the operator makes of weights. Raises BackendUnavailable if there is a reason against it."""
    if reason:
        raise BackendUnavailable(f"{op}: weights cannot be packed: {reason}")
    with torch.no_grad():
        return operator(*given)
