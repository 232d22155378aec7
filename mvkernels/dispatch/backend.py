"""Which backend runs a call, and why a backend cannot.

The first of these that is set decides: the call's ``backend=``, :func:`use_backend`, the environment variable
``MVKERNELS_BACKEND``. If none is set, the choice is ``"auto"``: the fastest backend that can run the call. If a backend
was asked for and cannot run the call, :class:`BackendUnavailable` is raised with the reason.
"""

from __future__ import annotations

import inspect
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd import forward_ad

from mvkernels.cuda import choice
from mvkernels.dispatch import extension
from mvkernels.dispatch.checks import any_autocast
from mvkernels.dispatch.exporting import exports_operator, exports_reference
from mvkernels.dispatch.registry import OPS

if TYPE_CHECKING:
    from mvkernels.dispatch.registry import Op

BACKENDS = ("reference", "cpp", "triton", "cuda")

# Fastest first. A backend for which an op has no kernel is passed over in silence; one that has a
# kernel and cannot run is logged.
_PREFERENCE = {
    "cpu": ("cpp",),
    "cuda": ("cuda", "triton"),
    "xpu": ("triton",),
}

_log = logging.getLogger("mvkernels")
_logged: set[tuple[str, str, str]] = set()


class BackendUnavailable(RuntimeError):
    """The backend that was asked for cannot run this call. The message names the op, the backend and the reason."""


class _Chosen(threading.local):
    # Not a ContextVar: torch.compile traces and guards this. Each thread starts from None.
    def __init__(self) -> None:
        self.name: str | None = None


_chosen = _Chosen()


def _known(name: object, source: str) -> str:
    if name not in BACKENDS and name != "auto":
        raise ValueError(f"{source} is {name!r}, want one of auto, {', '.join(BACKENDS)}")
    return name  # type: ignore[return-value]


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Context manager that sets the backend of all ops that this thread calls inside it.

    Args:
        name: "auto", "reference", "cpp", "triton" or "cuda".

    A call's own ``backend=`` argument takes precedence, and an inner ``use_backend`` over an outer one. The ops raise
    :class:`BackendUnavailable` where the backend cannot run a call.

    Raises:
        ValueError: the name is unknown.
    """
    _known(name, "use_backend: name")
    before = _chosen.name
    _chosen.name = name
    try:
        yield
    finally:
        _chosen.name = before


# What os.environ wraps, where it does so in the known way: asked directly, a missing variable costs next to nothing.
_VARIABLE = b"MVKERNELS_BACKEND"
_raw_environment: dict[bytes, bytes] | None = getattr(os.environ, "_data", None) if os.name == "posix" else None


def requested(backend: str | None, op: str = "") -> str:
    """The backend that was asked for, or "auto". ``op`` is the op's name, for the error about an unknown backend."""
    if backend is not None:
        return backend if backend in BACKENDS else _known(backend, f"{op}: backend" if op else "backend")
    if _chosen.name is not None:
        return _chosen.name
    if _raw_environment is not None and not torch.compiler.is_compiling() and _VARIABLE not in _raw_environment:
        return "auto"
    name = os.environ.get("MVKERNELS_BACKEND")
    if name:
        return _known(name.strip().lower(), "MVKERNELS_BACKEND")
    return "auto"


# What the C++ operators raise for invalid arguments. Exceptions of other types are not caught: they may come from a
# saved-tensor hook, and are meant for the owner of that hook.
REFUSED = (RuntimeError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError)
_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))
_tracing, _transforms = torch._C._get_tracing_state, torch._C._are_functorch_transforms_active
_modes = torch._C._len_torch_dispatch_stack


def direct(backend: str | None, *tensors: Any) -> bool | None:
    """The short way to the C++ operator: whether the call records a gradient, or None if the short way is not open.

    It is open in the usual case: plain CPU tensors (or None), no mode, trace, transform or autocast, and no other
    backend asked for. This takes a microsecond to find out. The operator itself rejects the arguments that an op's
    check and its ``why_not`` reject. So the caller tries the operator, and after an exception in REFUSED goes through
    the checks and :func:`choose`, which say what is wrong.
    """
    if torch.compiler.is_dynamo_compiling() or extension.module is None:
        return None
    name = _chosen.name if backend is None else backend
    if name is None:
        if _raw_environment is None or _VARIABLE in _raw_environment:
            return None
    elif name != "cpp":
        return None
    recording = False
    for tensor in tensors:
        if tensor is not None:
            if type(tensor) not in _PLAIN or not tensor.is_cpu:
                return None
            if tensor.requires_grad:
                recording = True
    if _modes() or any_autocast() or _transforms() or forward_ad._current_level >= 0 or _tracing() is not None:
        return None
    return recording and torch.is_grad_enabled()


def reason_against(op: Op, backend: str, arguments: tuple[Any, ...], backward: bool = False) -> str:
    """Why ``backend`` cannot run ``op`` on these (checked) arguments; empty if it can.

    ``backward``: whether a backward may follow, though nothing is recorded now."""
    if backend == "reference":
        return ""
    why_not = op.why_not.get(backend)
    if why_not is None:
        return f"{op.name} has no {backend} kernel"
    if backward and not op.has_backward(backend):
        return "its kernel has no backward"
    if not torch.compiler.is_compiling() and (
        forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()
    ):
        return "torch.func transforms and forward-mode derivatives need backend 'reference'"
    return why_not(*arguments) or ""


def choose(op: Op, backend: str | None, arguments: tuple[Any, ...], backward: bool = False) -> str:
    """The backend that runs this call: a name of BACKENDS, never "auto".

    ``arguments`` are the op's own, checked and in order; ``backward`` as for :func:`reason_against`. Raises
    BackendUnavailable if a backend was asked for and cannot run the call. During export and tracing the reference runs,
    whatever was asked for, but for ops that an export keeps (:mod:`mvkernels.dispatch.exporting`).
    """
    name = requested(backend, op.name)
    # An exported or traced graph is to run where this library is not installed, unless it was asked to keep the op.
    if name == "reference" or exports_reference(op.name) or torch.jit.is_tracing():
        return "reference"
    if exports_operator(op.name):
        return "reference" if reason_against(op, "cpp", arguments, backward) else "cpp"
    if name != "auto":
        reason = reason_against(op, name, arguments, backward)
        if reason:
            raise BackendUnavailable(f"{op.name}: backend {name} cannot run this: {reason}")
        return name
    first = arguments[0]
    found = "reference"
    for name in _PREFERENCE.get("cpu" if first.is_cpu else first.device.type, ()):
        if name not in op.why_not:
            continue
        reason = reason_against(op, name, arguments, backward)
        if not reason:
            if name != "cuda" or op.choice is None or choice.is_faster(op, arguments, backward or _records(arguments)):
                return name
            found = name  # unless Triton can run it too
        elif not torch.compiler.is_compiling():
            _log_once(op.name, name, reason)
    return found


def _records(arguments: tuple[Any, ...]) -> bool:
    """Whether a call with these arguments records a gradient."""
    if not torch.is_grad_enabled():
        return False
    each = (x for given in arguments for x in (given if isinstance(given, (list, tuple)) else (given,)))
    return any(isinstance(x, torch.Tensor) and x.requires_grad for x in each)


def prepare(name: str, backend: str | None, *arguments: Any) -> tuple[str, tuple[Any, ...]]:
    """For an autograd Function: check the arguments of the op called ``name``.

    Returns (the backend that runs it and has a backward, the checked arguments)."""
    op = OPS[name]
    checked = op.check(*arguments)
    return choose(op, backend, checked, backward=True), checked


def _log_once(op: str, backend: str, reason: str) -> None:
    key = (op, backend, reason)
    if key not in _logged:
        _logged.add(key)
        _log.warning("%s: backend %s cannot run this: %s", op, backend, reason)


def can_run(op: str = "", *args: Any, **kwargs: Any) -> tuple[bool, str]:
    """Whether a backend can run an op on these arguments, and if not, why. Nothing is computed.

    Call ``can_run(op, backend, *args, **kwargs)``.

    Args:
        op: name of the op, such as "patch_attention".
        backend: "reference", "cpp", "triton" or "cuda".
        args, kwargs: the arguments of the op.

    Returns:
        (True, "") if the backend can run the call, else (False, the reason in one line). Invalid arguments and unknown
        names are reasons too: this function never raises.

    >>> can_run("patch_attention", "cpp", q, k, v, 2)       # doctest: +SKIP
    (False, 'the C++ extension is not built: ...')
    """
    try:
        # Not parameters of their own: the op's arguments may include a ``backend`` as well.
        backend, *args = args or [kwargs.pop("backend", None)]  # type: ignore[assignment]
        known = OPS.get(op)
        if known is None:
            return False, f"unknown op {op!r}, want one of {', '.join(OPS)}"
        if backend not in BACKENDS:
            return False, f"unknown backend {backend!r}, want one of {', '.join(BACKENDS)}"
        bound = inspect.signature(known.function).bind(*args, **kwargs)
        bound.apply_defaults()
        bound.arguments.pop("backend", None)
        if bound.arguments.pop("process_group", None) is not None and backend != "reference":
            return False, "with a process_group only backend 'reference' can"
        arguments = known.check(*bound.arguments.values())
        reason = reason_against(known, backend, arguments)
    except Exception as error:  # the contract: an answer for every input
        return False, " ".join(str(error).split()) or type(error).__name__
    return not reason, reason
