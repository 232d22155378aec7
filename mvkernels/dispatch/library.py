"""Registration of the kernels as torch operators, and the error for a second derivative.

Each backend has a namespace: ``torch.ops.mvkernels_cpp`` and so on.

The schema and the fake (meta) implementation of an op are written once, in Python, for all of its
backends; the C++ extension only adds its CPU implementation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mvkernels.dispatch import batching, flops

# A Library removes its registrations when it is collected, so they live as long as the module.
_libraries: dict[str, torch.library.Library] = {}

OPERATOR = "mvkernels_{backend}::{name}"
"""Where torch knows an operator. A copy of the package, as `release/hub.py` makes one, has another name here."""


def define(
    backend: str,
    name: str,
    schema: str,
    fake: Callable[..., Any],
    implementation: Callable[..., Any] | None = None,
    *,
    count: flops.Formula | None = None,
) -> Callable[..., Any]:
    """Define ``mvkernels_<backend>::<name><schema>`` and return the callable overload.

    ``implementation`` is a Python kernel for every device; without it, the C++ extension has it.
    ``fake`` must return the kernel's exact sizes and strides, ``count`` its FLOPs (:mod:`mvkernels.dispatch.flops`).
    """
    namespace, name = OPERATOR.format(backend=backend, name=name).split("::")
    library = _libraries.get(namespace)
    if library is None:
        library = _libraries[namespace] = torch.library.Library(namespace, "FRAGMENT")
    library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    if implementation is not None:
        library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{namespace}::{name}", fake, lib=library)
    packet = getattr(getattr(torch.ops, namespace), name)
    if not packet.default._schema.is_mutable:
        batching.register(packet.default, library)
    if count is not None:
        flops.register(packet, count)
    return packet.default


def pair(
    backend: str,
    name: str,
    schemas: tuple[str, str],
    fakes: tuple[Callable[..., Any], Callable[..., Any]],
    counts: tuple[flops.Formula, flops.Formula],
    launcher: Callable[[], Any],
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """An op's forward and backward on a backend: ``mvkernels_<backend>::<name>_forward`` and ``..._backward``.

    ``launcher`` imports the module that has the ``forward`` and ``backward`` of a GPU's backend. On a CPU the C++
    extension has them.
    """
    found = []
    for which, schema, fake, count in zip(("forward", "backward"), schemas, fakes, counts):
        kernel = launched(launcher, which, fake) if backend != "cpp" else None
        found.append(define(backend, f"{name}_{which}", schema, fake, kernel, count=count))
    return found[0], found[1]


def launched(launcher: Callable[[], Any], which: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    """A function of an op's launcher, which is imported by the first call."""

    def implementation(first: Tensor, *rest: Any) -> Any:
        if first.shape[0] == 0:  # a grid of no blocks cannot be launched
            found = fake(first, *rest)
            return found.zero_() if isinstance(found, Tensor) else type(found)(each.zero_() for each in found)
        function = getattr(launcher(), which)
        if torch.is_autocast_enabled(first.device.type):
            # Arguments were cast before, or are those of a forward outside: products in here keep their dtype.
            with torch.autocast(first.device.type, enabled=False):
                return function(first, *rest)
        return function(first, *rest)

    return implementation


def why_not(launcher: Callable[[], Any], needs: str = "") -> Callable[..., str | None]:
    """An op's ``why_not`` for a GPU's backend: its launcher's, if that can be imported.

    ``needs`` says what a backend needs Triton for if it is called otherwise.
    """

    def of_launcher(*arguments: Any) -> str | None:
        try:
            found = launcher()
        except ImportError as error:
            return f"{needs}Triton cannot be imported: {error}"
        reason: str | None = found.why_not(*arguments)
        return reason

    return of_launcher


def output(forward: Callable[..., tuple[Tensor, ...]]) -> Callable[..., Tensor]:
    """``forward`` without what it keeps for the backward."""
    return lambda *arguments: forward(*arguments)[0]


def at_once(operator: Callable[..., Any]) -> Callable[..., Any]:
    """The callable behind an overload, which takes arguments in order: less by a frame of Python."""
    return getattr(operator, "_op", operator)


def recorder(function: type[torch.autograd.Function]) -> Callable[..., Tensor]:
    """``function.apply`` for calls that are known to be outside of torch.func's transforms.

    It leaves out the checks for these transforms, which take as long as the rest of ``apply``.
    """
    return super(torch.autograd.Function, function).apply  # type: ignore[misc]


def gradients(
    name: str,
    kernel: Callable[..., Sequence[Tensor]],
    arguments: Sequence[Any],
    inputs: Sequence[Tensor | None],
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """What an op's backward kernel gives for the inputs wanted, None for the others. A kernel may give more: gradients
    of biases that are not there.

    ``inputs``, with the gradient that is the first of the arguments, are what the gradients depend on: where a gradient
    is recorded, differentiating them again raises RuntimeError.
    """
    # A backward runs without recording unless it is itself to be differentiated; torch.no_grad() would cost it some
    # microseconds.
    if not torch.is_grad_enabled():
        return [g if w else None for g, w in zip(kernel(*arguments), wanted)]
    with torch.no_grad():
        found = kernel(*arguments)
    grads = [g if w else None for g, w in zip(found, wanted)]
    return refuse_second_derivative(name, grads, (arguments[0], *inputs))


def differentiate(
    function: Callable[..., Tensor], grad: Tensor, inputs: Sequence[Tensor | None], wanted: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of ``function(*inputs)`` by autograd for the inputs wanted, None for the others.

    Where a gradient is recorded they can be differentiated again.
    """
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views, for one tensor may be two of the inputs. They keep what a further derivative goes back along.
        views = [t.view_as(t) if t is not None and w else t for t, w in zip(inputs, wanted)]
        asked = [t for t, w in zip(views, wanted) if t is not None and w]
        found = iter(torch.autograd.grad(function(*views), asked, grad, create_graph=again))
    return [next(found) if t is not None and w else None for t, w in zip(views, wanted)]


class _Refuse(torch.autograd.Function):
    """Passes gradients through, tied to the inputs they came from; its own backward is the error."""

    generate_vmap_rule = True

    @staticmethod
    def forward(name: str, count: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return tuple(None if g is None else g.view_as(g) for g in tensors[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # type: ignore[override]
        ctx.name = inputs[0]

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:  # type: ignore[override]
        raise RuntimeError(
            f"{ctx.name}: the fused kernels have no second derivative, only the reference backend has one: "
            f"call mvkernels.{ctx.name} with backend='reference', "
            "or for a swapped model mvkernels.swap(model, backend='reference')"
        )


def refuse_second_derivative(
    name: str, grads: Sequence[Tensor | None], inputs: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """``grads``, such that differentiating them again raises RuntimeError (instead of giving zeros).

    For a backward that runs with ``create_graph=True``; ``inputs`` are what the gradients depend on.
    """
    return batching.as_a_whole(lambda *tensors: _Refuse.apply(name, len(grads), *tensors), *grads, *inputs)
