"""Choosing a backend for a call, and saying why.

Precedence: the call's ``backend=``, else :func:`use_backend`, else the environment variable
``MVKERNELS_BACKEND``, else ``"auto"``. A backend that was named and cannot run raises
:class:`BackendUnavailable` with its reasons; ``auto`` takes the fastest that can run.
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

from mvkernels.dispatch import extension
from mvkernels.dispatch.checks import any_autocast
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
    """A backend was named that cannot run this call. The message gives every reason."""


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
    """Run the ops of this thread on ``name`` ("auto", "reference", "cpp", "triton", "cuda").

    Nests; a call's own ``backend=`` still wins. Raises ValueError for an unknown name.
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
    """The backend asked for, by precedence, possibly "auto". The op's name is for the message about an unknown one."""
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


# What arguments in disorder end in. Not any exception: one of a kind of its own comes from a hook that a tensor is
# saved through, and is meant for the hook's owner.
REFUSED = (RuntimeError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError)
_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))
_tracing, _transforms = torch._C._get_tracing_state, torch._C._are_functorch_transforms_active
_modes = torch._C._len_torch_dispatch_stack


def direct(backend: str | None, *tensors: Any) -> bool | None:
    """Whether a call on these is to record a gradient, if it can go to its C++ operator at once; else None.

    The usual case, asked in a microsecond: plain CPU tensors (or None), no mode, trace, transform or autocast, no
    other backend asked for. The operator refuses by itself what an op's check and its ``why_not`` would: so the caller
    tries, and on an exception of REFUSED takes the long way of checks and :func:`choose`, which say what is wrong.
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


def reason_against(op: Op, backend: str, arguments: tuple[Any, ...]) -> str:
    """Why ``backend`` cannot run ``op`` on these (checked) arguments; empty if it can."""
    if backend == "reference":
        return ""
    why_not = op.why_not.get(backend)
    if why_not is None:
        return f"{op.name} has no {backend} kernel"
    if not torch.compiler.is_compiling() and (
        forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()
    ):
        return "torch.func transforms and forward-mode derivatives need the reference"
    return why_not(*arguments) or ""


def choose(op: Op, backend: str | None, arguments: tuple[Any, ...]) -> str:
    """The backend that runs this call: a name of BACKENDS, never "auto".

    ``arguments`` are the op's own, checked and in order. Raises BackendUnavailable if a backend
    was named and cannot run. During export and tracing it is the reference, whatever was named.
    """
    name = requested(backend, op.name)
    # An exported or traced graph is to run where this library is not installed.
    if name == "reference" or torch.compiler.is_exporting() or torch.jit.is_tracing():
        return "reference"
    if name != "auto":
        reason = reason_against(op, name, arguments)
        if reason:
            raise BackendUnavailable(f"{op.name}: backend {name} cannot run this: {reason}")
        return name
    first = arguments[0]
    for name in _PREFERENCE.get("cpu" if first.is_cpu else first.device.type, ()):
        if name not in op.why_not:
            continue
        reason = reason_against(op, name, arguments)
        if not reason:
            return name
        if not torch.compiler.is_compiling():
            _log_once(op.name, name, reason)
    return "reference"


def prepare(name: str, backend: str | None, *arguments: Any) -> tuple[str, tuple[Any, ...]]:
    """(the backend that runs this call of the op of that name, its arguments, checked)."""
    op = OPS[name]
    checked = op.check(*arguments)
    return choose(op, backend, checked), checked


def _log_once(op: str, backend: str, reason: str) -> None:
    key = (op, backend, reason)
    if key not in _logged:
        _logged.add(key)
        _log.warning("%s: not on %s: %s", op, backend, reason)


def can_run(op: str = "", *args: Any, **kwargs: Any) -> tuple[bool, str]:
    """Whether ``backend`` can run the op of that name on these arguments, and if not, why.

    ``can_run(op, backend, *args, **kwargs)``: the op's name, a backend's, and the op's own arguments. Never raises.
    The reason is empty when it can.

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
            return False, "pixels divided among processes need the reference"
        arguments = known.check(*bound.arguments.values())
        reason = reason_against(known, backend, arguments)
    except Exception as error:  # the contract: an answer for any input whatever
        return False, " ".join(str(error).split()) or type(error).__name__
    return not reason, reason
