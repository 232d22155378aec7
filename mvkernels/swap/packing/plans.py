"""Plans: what the call of a module on packed weights will do, found out once and kept while nothing has changed.

Examining a module and packing its weights takes from a tenth of a millisecond to several. So both are done once, and
before each call a few comparisons show whether the module, one of its parts or a tensor has changed since. Plans are
kept outside of the modules: neither a state_dict nor a copy or a pickle of a model has them.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._ops import _get_dispatch_mode_pre_dispatch

from mvkernels.dispatch import extension
from mvkernels.dispatch.backend import requested
from mvkernels.dispatch.exporting import exporting
from mvkernels.swap.eligibility import class_of, log_once, not_hooked, replaced, unusual_call

Run = Callable[..., Any]
"""The work of a module on packed weights, of the tensors of a call. It may refer to parts of the module, which the plan
looks after, and not to the module itself, which it would keep alive."""
Keep = Callable[[Tensor], Tensor]
"""Notes a packed tensor as one of the plan's, and returns it."""

_PLAIN = (Tensor, nn.Parameter)
_PROXY = torch._C._TorchDispatchModeKey.PROXY  # type: ignore[attr-defined]
_data_ptr, _version = Tensor.data_ptr, Tensor._version.__get__  # type: ignore[attr-defined]


class Plan:
    """What a module's calls do, with the weights packed for it and the state of the module that it is right for."""

    def __init__(self, module: Any) -> None:
        self.weights: list[Tensor] = []
        self._parts = tuple(part for part in module.modules() if part is not module)
        assert extension.module is not None
        # The objects are held, so that none of the addresses comes to be another's.
        self._objects, self._addresses, lines = extension.module.module_state(module, self._parts)
        # A batch norm's count of what it has seen is no number of the result.
        counts = {id(part._buffers.get("num_batches_tracked")) for part in (module, *self._parts)}
        self._tensors = [x for x in self._objects if isinstance(x, Tensor) and id(x) not in counts]
        forms: list[Any] = [part for part in (module, *self._parts) if getattr(part, "mvk_packs", False)]
        names = {"forward"}.union(*(part.mvk_methods for part in forms))
        kinds = {class_of(part) for part in (module, *self._parts)}.union(*(part.mvk_helpers for part in forms))
        self._methods = [(kind, name, getattr(kind, name)) for kind in kinds for name in names if hasattr(kind, name)]
        self._set = extension.instruction_set()
        self._marks = self._marks_now()
        # Held, so that no other tensor comes to lie at the same address.
        plain = [x for x in self._tensors if type(x) in _PLAIN and x.is_cpu and x.layout == torch.strided]
        self._memory = [x.detach() for x in plain]
        self._stretches = b"".join(map(_stretch, self._memory))
        self._samples = extension.module.sampled(self._stretches)
        self._lines = lines + b"".join(map(_lines, self._memory))
        # Without marks each call would pack anew.
        able = self._marks is not None and not replaced(module.mvk_original, "forward")
        # A partial and not a method of this plan, which would then hold itself.
        self.run: Run | None = attempted(module.mvk_plan, partial(note, self.weights)) if able else None

    def _marks_now(self) -> int | None:
        """What shows a change of a tensor that is the same object: other memory or strides (``.data``, ``.to``), its
        version counter (an optimizer's step, ``load_state_dict``, ``copy_``). None if one has no such counter.

        A number of 64 bits for all of them, since nobody has read the former marks meanwhile: they left the caches.
        """
        tensors = self._tensors
        try:
            return hash((*map(_data_ptr, tensors), *map(_version, tensors), *map(Tensor.stride, tensors)))
        except RuntimeError:  # made under torch.inference_mode
            return None

    def holds(self, module: Any) -> bool:
        """Whether nothing has changed since: no attribute, hook, tensor or method of the module and its parts.

        What leaves no mark (values written through ``.data``, a NumPy view, by a fused optimizer) shows in samples of
        up to eight places of each tensor. So a change of all values is seen, and one of few may not be: :func:`forget`
        is for these.
        """
        if extension.module is None:
            return False
        extension.module.prefetch(self._lines)
        marks = self._marks_now()
        return (
            marks is not None
            and marks == self._marks
            and self._samples == extension.module.sampled(self._stretches)
            and extension.module.has_module_state(module, self._parts, self._addresses)
            and all(getattr(kind, name) is method for kind, name, method in self._methods)
            and self._set == extension.instruction_set()
        )


def attempted(method: Callable[..., Any], *arguments: Any) -> Any:
    """What a method of a form gives; None where a part is not what the form knows: an adapter, say, in the place of a
    convolution, which has not its attributes."""
    try:
        return method(*arguments)
    except (AttributeError, TypeError, LookupError):
        return None


def note(weights: list[Tensor], packed: Tensor) -> Tensor:
    """Note a packed tensor as one of a plan's, and return it."""
    weights.append(packed)
    return packed


def _stretch(x: Tensor) -> bytes:
    """The memory from the tensor's first element to its last one, for ``sampled`` of the extension."""
    elements = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride()))
    there = x.numel() and x.data_ptr()  # fully sharded training frees the memory of a parameter between calls
    return struct.pack("=qq", x.data_ptr(), elements * x.element_size() if there else 0)


def _lines(x: Tensor) -> bytes:
    """The cache lines in which a tensor's marks lie, for ``prefetch`` of the extension."""
    of_tensor, of_storage = x._cdata, x.untyped_storage()._cdata
    return struct.pack("=6Q", *(of_tensor + 64 * i for i in range(4)), *(of_storage + 64 * i for i in range(2)))


_plans: WeakKeyDictionary[nn.Module, Plan] = WeakKeyDictionary()


def run_of(module: Any, x: Any, *beside: Any) -> Run | None:
    """What does the work of ``module`` on packed weights for the input x and the tensors ``beside`` it; None if its own
    forward has to run."""
    axes = module.mvk_axes or max(2, x.dim() if isinstance(x, Tensor) else 2)
    if (
        not_now()
        or unusual_call(x, axes)
        or not fits(x)
        or torch.is_autocast_enabled("cpu")
        or any(_unusual(each, axes, x) for each, axes in zip(beside, module.mvk_beside))
    ):
        return None
    return run_for_now(module)


def called(module: Any, unpacked: Callable[..., Any], given: Sequence[Any], arguments: Sequence[Any]) -> Any:
    """The result of a call: on packed weights of the tensors ``given``, or by what the module does ``unpacked`` of the
    ``arguments`` themselves."""
    run = run_of(module, *given)
    if run is None:
        return unpacked(module, *arguments)
    try:
        return run(*given)
    except (RuntimeError, ValueError) as error:  # for what does not fit the original has the words
        out = unpacked(module, *arguments)
        log_once(module, f"on packed weights: {error}")
        return out


# Where Dynamo has given up the module's caller, it would trace this and all below it, frame by frame. So
# torch.compiler.disable() does it, but that imports the compiler: half a second of `import mvkernels`.
called._torchdynamo_disable = True  # type: ignore[attr-defined]
_frames = torch._C._dynamo.eval_frame
_skip = _frames._FrameAction.SKIP  # type: ignore[attr-defined]
_frames.set_code_exec_strategy(called.__code__, _frames._FrameExecStrategy(_skip, _skip))  # type: ignore[attr-defined]


def fits(x: Any) -> bool:
    """Whether the operators take such a tensor."""
    return type(x) in _PLAIN and x.dtype == torch.float32 and x.is_cpu and x.numel() > 0


def run_of_part(part: Any) -> Run | None:
    """What does the work of a part in a plan of the module that calls it; None if it has to be called as a module."""
    return run_for_now(part) if _as_swapped(part) else None


def adding_run_of_part(part: Any, keep: Keep) -> Run | None:
    """The same plus its input, in a plan whose weights ``keep`` notes; None if the part cannot add it."""
    return attempted(part.mvk_adding_plan, keep) if _as_swapped(part) else None  # type: ignore[no-any-return]


def _as_swapped(part: Any) -> bool:
    """Whether a part has a form that packs weights, and nothing was put around its forward."""
    packs = getattr(type(part), "mvk_packs", False) and class_of(part) is part.mvk_original
    return packs and not (part.mvk_beside or not_hooked(part, "it") or replaced(part.mvk_original, "forward"))


def _unusual(beside: Any, axes: int, x: Tensor) -> bool:
    """Whether a tensor beside the input x is not like it, and one for each picture of the batch."""
    return bool(unusual_call(beside, axes)) or not fits(beside) or beside.shape[0] != x.shape[0]


def run_for_now(module: Any) -> Run | None:
    """:func:`run_of` for an input that it takes."""
    plan = _plans.get(module)
    if plan is not None and plan.holds(module):
        return plan.run
    if not module.mvk_has_ops():
        return None
    with torch.no_grad():
        plan = Plan(module)
    # One without a run is not kept: whatever replaced a forward may refer to the module.
    if plan.run is None:
        _plans.pop(module, None)
    else:
        _plans[module] = plan
    return plan.run


def not_now() -> str:
    """Why the operators of the C++ extension are not to be used, whatever the input; empty if they are."""
    if torch.compiler.is_compiling() or exporting():
        return "the compiler fuses by itself"
    if torch.is_grad_enabled():
        return "a gradient may be needed"
    if extension.module is None or requested(None) not in ("auto", "cpp"):
        return "it is for the C++ backend"
    if torch._C._get_dispatch_mode(_PROXY) is not None or _get_dispatch_mode_pre_dispatch(_PROXY) is not None:
        return "make_fx would keep the packed weights as constants"
    return ""


def forget(model: nn.Module) -> None:
    """Drop the plans of all modules of ``model`` with their weights: they are made again in the next call."""
    for module in model.modules():
        _plans.pop(module, None)


def size(model: nn.Module) -> int:
    """Bytes of the packed weights of ``model``."""
    plans = [_plans[module] for module in model.modules() if module in _plans]
    return sum(w.numel() * w.element_size() for plan in plans for w in plan.weights)
