"""What the ops share towards torch: registration of kernels as operators, and the limit of one derivative.

Each backend has a namespace: ``torch.ops.mvkernels_cpp`` and so on.

The schema and the fake (meta) implementation of an op are written once, in Python, for all of its
backends; the C++ extension only adds its CPU implementation.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# A Library removes its registrations when it is collected, so they live as long as the module.
_libraries: dict[str, torch.library.Library] = {}


def define(
    backend: str,
    name: str,
    schema: str,
    fake: Callable[..., Any],
    implementation: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Define ``mvkernels_<backend>::<name><schema>`` and return the callable overload.

    ``implementation`` is a Python kernel for every device; without it, the C++ extension has it.
    ``fake`` must return the kernel's exact sizes and strides.
    """
    namespace = f"mvkernels_{backend}"
    library = _libraries.get(namespace)
    if library is None:
        library = _libraries[namespace] = torch.library.Library(namespace, "FRAGMENT")
    library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    if implementation is not None:
        library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{namespace}::{name}", fake, lib=library)
    return getattr(getattr(torch.ops, namespace), name).default


def output(forward: Callable[..., tuple[Tensor, ...]]) -> Callable[..., Tensor]:
    """``forward`` without what it keeps for the backward."""
    return lambda *arguments: forward(*arguments)[0]


def at_once(operator: Callable[..., Any]) -> Callable[..., Any]:
    """The callable behind an overload, which takes arguments in order: less by a frame of Python."""
    return getattr(operator, "_op", operator)


def recorder(function: type[torch.autograd.Function]) -> Callable[..., Tensor]:
    """``function.apply`` for calls known to be outside of torch.func's transforms: its questions about them take as
    long as the rest of it."""
    return super(torch.autograd.Function, function).apply  # type: ignore[misc]


# torch.no_grad() costs a call some microseconds, and a backward runs without recording anyhow unless it is itself to be
# differentiated.
_NOTHING = contextlib.nullcontext()


def not_recording() -> contextlib.AbstractContextManager[None]:
    """``torch.no_grad()``, where it would change anything."""
    return torch.no_grad() if torch.is_grad_enabled() else _NOTHING


def differentiate(
    function: Callable[..., Tensor], grad: Tensor, inputs: Sequence[Tensor | None], wanted: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of ``function(*inputs)`` by autograd for the inputs wanted, None for the others."""
    with torch.enable_grad():
        leaves = [None if t is None else t.detach().requires_grad_(w) for t, w in zip(inputs, wanted)]
        asked = [t for t in leaves if t is not None and t.requires_grad]
        found = iter(torch.autograd.grad(function(*leaves), asked, grad))
    return [next(found) if t is not None and t.requires_grad else None for t in leaves]


class _Refuse(torch.autograd.Function):
    """Passes gradients through, tied to the inputs they came from; its own backward is the error."""

    @staticmethod
    def forward(ctx: Any, name: str, count: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        ctx.name = name
        return tuple(None if g is None else g.view_as(g) for g in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:  # type: ignore[override]
        raise RuntimeError(
            f"{ctx.name}: the fused kernels have no second derivative; "
            f"for one, call the function mvkernels.{ctx.name} with backend='reference'"
        )


def refuse_second_derivative(
    name: str, grads: Sequence[Tensor | None], inputs: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """``grads``, such that differentiating them again raises RuntimeError (instead of giving zeros).

    For a backward that runs with ``create_graph=True``; ``inputs`` are what the gradients depend on.
    """
    return list(_Refuse.apply(name, len(grads), *grads, *inputs))
