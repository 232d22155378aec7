"""The classes of swapped modules, which are made of a fused form and the original class, and their removal.

Some tools find layers by the class name: FSDP policies, device maps, lists of modules that must not be split. So the
class has the name, the qualified name and the module of the original, and its forward has the original's signature.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from types import CellType, FunctionType
from typing import Any, cast

import torch
from torch import nn

from mvkernels.swap.packing import compiled
from mvkernels.swap.packing.plans import Keep, Run, called

_made: dict[tuple[type, type], type[nn.Module]] = {}


class Swapped:
    """Base class of the fused forms, which are never instantiated.

    :func:`mvkernels.swap` gives an existing module a class that derives from a fused form and from the module's own
    class. Restoring gives the module its own class back. Parameters, hooks and state are not moved.
    """

    mvk_original: type[nn.Module]
    mvk_form: type
    mvk_class: type[nn.Module]
    """The class that a swap made, also in classes derived from it."""
    mvk_backend: str | None = None
    mvk_packs: bool = False
    """Whether calls run on packed weights at inference, where ``mvk_plan`` can make a plan for them."""
    mvk_unpacked: type
    """The form of which it is the variant that packs weights."""
    mvk_axes: int | None = 4
    """Axes of the input of such calls; None for any number from two on."""
    mvk_beside: tuple[int, ...] = ()
    """Axes of the other tensors that such calls take, each with the batch in front."""
    mvk_any_layout: bool = True
    """Whether such calls take maps in any layout, or channels-last ones alone."""
    mvk_keeps_layout: bool = False
    """Whether maps come out laid out as they went in; they are channels-last if not."""
    mvk_in_tuple: bool = False
    """Whether the result is a tuple of the one tensor."""
    mvk_runs: str = "forward"
    """The method of the module that its plan does the work of."""
    mvk_calls: tuple[str, ...] | None = ()
    """The parts that such calls run as modules, None for all. They do the work of the others themselves."""
    mvk_methods: tuple[str, ...] = ("_conv_forward",)
    """Methods of the module's class and of its parts' that a plan does the work of, beside ``forward``."""
    mvk_helpers: tuple[type, ...] = ()
    """Other classes, whose objects the module calls, with methods of these names."""

    @staticmethod
    def mvk_tensors(*given: Any) -> Sequence[Any]:
        """The input of such a call and the tensors beside it, if they are not the arguments themselves."""
        return given

    def mvk_has_ops(self) -> bool:
        """Whether a plan may come to anything: asked before each attempt at one, since attempts take a while."""
        return True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the original's."""
        return self.mvk_original.forward(self, *args, **kwargs)  # type: ignore[arg-type]

    def mvk_plan(self, keep: Keep) -> Run | None:
        """What the calls of the module do on packed weights, in the state that it is in; None if they cannot."""
        return None

    def mvk_adding_plan(self, keep: Keep) -> Run | None:
        """The same plus the input, for a part of a block that adds it; None if it cannot."""
        return None

    def mvk_sizes(self) -> tuple[int, int] | None:
        """The channels of the result and the stride, by which the sides of a map are divided and rounded up, or down if
        it is negative.

        ``SAME`` in the place of the channels stands for the input's, ``ROWS`` in the place of the stride for a result
        that is no map. None if they are not known: graphs of torch.compile then have the module's own operations in
        them. Dynamo traces this method, and guards what it reads.
        """
        return None

    def __prepare_scriptable__(self) -> nn.Module:
        """For torch.jit.script: a shallow copy of the module with its original class."""
        original = copy.copy(self)
        original.__class__ = without_form(type(self))  # type: ignore[assignment]
        return original  # type: ignore[return-value]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        how, of, *rest = cast("tuple[Any, ...]", super().__reduce_ex__(max(int(protocol), 2)))
        if type(self) is _made.get((self.mvk_original, self.mvk_form)):
            # Found by its name it would be the original.
            form: Any = self.mvk_form
            how, of = _blank, (self.mvk_original, form.mvk_unpacked if self.mvk_packs else form, self.mvk_packs)
        return how, of, *rest


_packing: dict[type, type] = {}


def packing(form: type) -> type:
    """The form that also packs weights. The same form gives the same class."""
    if form not in _packing:
        beside = form.mvk_beside  # type: ignore[attr-defined]
        unpacked = getattr(form, form.mvk_runs)  # type: ignore[attr-defined]

        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            given = args if kwargs else form.mvk_tensors(*args)  # type: ignore[attr-defined]
            if len(given) == 1 + len(beside) and not kwargs:
                if not torch.compiler.is_compiling():
                    return called(self, unpacked, given, args)
                out = compiled.call(self, *given)
                if out is not None:
                    return out
            return unpacked(self, *args, **kwargs)

        plans = form.mvk_plan is not Swapped.mvk_plan  # type: ignore[attr-defined]
        namespace = {
            "mvk_packs": True,
            "mvk_unpacked": form,
            "__doc__": form.__doc__,
            **({form.mvk_runs: call} if plans else {}),  # type: ignore[attr-defined]
        }
        _packing[form] = type(form.__name__, (form,), namespace)
    return _packing[form]


def swapped_class(original: type[nn.Module], form: type) -> type[nn.Module]:
    """The class made of a fused form and the class of a module. The same arguments give the same class."""
    made = _made.get((original, form))
    if made is not None:
        return made

    @functools.wraps(original.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        # Somebody may have kept the bound method, and the module may have been restored since.
        if not isinstance(self, Swapped):
            return original.forward(self, *args, **kwargs)
        return form.forward(self, *args, **kwargs)  # type: ignore[attr-defined]

    namespace = {
        "mvk_original": original,
        "mvk_form": form,
        "forward": forward,
        "__doc__": form.__doc__,
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
    }
    meta: Any = type(original)
    made = _made[original, form] = meta(original.__name__, (form, original), namespace)
    made.mvk_class = made
    return made


def _blank(original: type[nn.Module], form: type, packs: bool = False) -> nn.Module:
    """An instance without state, with which unpickling and copying begin."""
    kind = swapped_class(original, packing(form) if packs else form)
    return kind.__new__(kind)


def without_form(kind: type) -> type:
    """The class that a module of class ``kind`` would have if it had never been swapped.

    If other code (fully_shard, a parametrization) derived ``kind`` from the swapped class, ``kind`` is rebuilt on the
    original.
    """
    if "mvk_form" in kind.__dict__:
        return kind.mvk_original  # type: ignore[attr-defined, no-any-return]
    if not issubclass(kind, Swapped):
        return kind
    # Methods that say super(), and what decorators made of them, hold their class: they are made anew for the new one.
    cell = CellType()
    made: dict[FunctionType, FunctionType] = {}
    meta: Any = type(kind)
    namespace = {
        name: _for_class(value, kind, cell, made)
        for name, value in kind.__dict__.items()
        if name not in ("__dict__", "__weakref__")
    }
    new: type = meta(kind.__name__, tuple(without_form(base) for base in kind.__bases__), namespace)
    cell.cell_contents = new
    return new


def _for_class(value: Any, old: type, cell: CellType, made: dict[FunctionType, FunctionType]) -> Any:
    """An attribute of the class ``old`` whose functions hold the class in ``cell`` in its place."""
    if isinstance(value, (staticmethod, classmethod)):
        return type(value)(_for_class(value.__func__, old, cell, made))
    if type(value) is property:
        get, put, delete = (_for_class(f, old, cell, made) for f in (value.fget, value.fset, value.fdel))
        return property(get, put, delete, value.__doc__)
    if not isinstance(value, FunctionType) or not _holds(value, old, set()):
        return value
    if value in made:
        return made[value]
    cells = [c if not _holds(_content(c), old, set()) else CellType() for c in value.__closure__ or ()]
    cells = [cell if _content(c) is old else new for c, new in zip(value.__closure__ or (), cells)]
    new = FunctionType(value.__code__, value.__globals__, value.__name__, value.__defaults__, tuple(cells))
    for name in ("__kwdefaults__", "__qualname__", "__module__", "__doc__", "__annotations__", "__dict__"):
        setattr(new, name, getattr(value, name))
    made[value] = new
    for c, own in zip(value.__closure__ or (), cells):
        if own is not c and own is not cell:
            own.cell_contents = _for_class(_content(c), old, cell, made)
    return new


def _holds(value: Any, kind: type, seen: set[FunctionType]) -> bool:
    """Whether a value is the class, or a function that has it somewhere in its closure."""
    if value is kind:
        return True
    if not isinstance(value, FunctionType) or value in seen:
        return False
    seen.add(value)
    return any(_holds(_content(c), kind, seen) for c in value.__closure__ or ())


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # empty
        return None
