"""The report of a swap, and how a swap is undone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from mvkernels.swap.packing import plans
from mvkernels.swap.swapped import Swapped, without_form


@dataclass(frozen=True)
class SwapEntry:
    """One row of the report: an attention module that was found in the model."""

    name: str
    """The module's name in the model; empty if it is the model itself."""
    module_class: str
    """The name of the module's class before the swap."""
    swapped: bool
    """Whether the module is swapped now."""
    reason: str = ""
    """Why the module was not swapped, or "already swapped", or "restored". Empty if this call swapped it."""


@dataclass
class SwapReport:
    """What :func:`mvkernels.swap` returns: one entry for each attention module that was found. Prints as a table.

    ``count`` is the number of modules that the call swapped, and ``restore()`` undoes the call.
    """

    entries: list[SwapEntry] = field(default_factory=list)
    _call: object = field(default_factory=object, repr=False, compare=False)
    """Identifies the call of swap."""
    _changed: dict[str, nn.Module] = field(default_factory=dict, repr=False)
    _before: dict[str, nn.Module] = field(default_factory=dict, repr=False)
    """Modules that were swapped before this call, by name."""
    _folded: list[tuple[nn.Module, Any]] = field(default_factory=list, repr=False)
    _packed: list[tuple[nn.Module, type, type]] = field(default_factory=list, repr=False)
    """Modules swapped before that this call gave a class that packs weights: with the class before, and that class."""

    @property
    def count(self) -> int:
        """Number of modules that this call swapped, without those swapped before; 0 after ``restore()``."""
        return len(self._changed)

    @property
    def folded(self) -> int:
        """Number of modules, without those of :attr:`count`, in which this call folded batch norms
        (``fold_norms=True``) or which it lets run on packed weights (``inference=True``)."""
        return len(self._folded)

    @property
    def packed_bytes(self) -> int:
        """Memory of the weights that calls have packed so far (``inference=True``), beside the model's own."""
        return sum(plans.size(module) for module in self._of_this_call())

    def refresh(self) -> None:
        """Have the weights of the modules of this call packed again by the next call of each.

        It is needed after a change of few values of a parameter that leaves no mark on it: one written through
        ``.data`` in place, or through a NumPy array that shares its memory.
        """
        for module in self._of_this_call():
            plans.forget(module)

    def _of_this_call(self) -> list[nn.Module]:
        """The modules that this call has changed and that are in no other one."""
        changed = [*self._changed.values(), *(m for m, _ in self._folded), *(m for m, *_ in self._packed)]
        inside = {id(part) for module in changed for part in module.modules() if part is not module}
        return [*{id(m): m for m in changed if id(m) not in inside}.values()]

    def restore(self) -> None:
        """Undo the swap: the modules get their original class or processor back. A second ``restore()`` does nothing.

        Later changes to a module stay. If other code derived a class from the swapped class (``fully_shard``, a
        parametrization), this class is rebuilt on the original one. The modules' entries get the reason "restored".
        """
        self.refresh()
        for module in self._before.values():
            _forget_choice(module, self._call)
        for module, before, after in self._packed:
            if type(module) is after:
                module.__class__ = before
        for module in self._changed.values():
            if _calls.get(module, [(None, None)])[0][0] is self._call:
                restore_module(module)
        for module, original in self._folded:
            if original_of(module) is original:
                restore_module(module)
        self.entries = [self._restored(entry) for entry in self.entries]
        self._changed.clear()
        self._before.clear()
        self._folded.clear()
        self._packed.clear()

    def _restored(self, entry: SwapEntry) -> SwapEntry:
        module = (self._changed | self._before).get(entry.name)
        if module is None:
            return entry
        if entry.name in self._changed or original_of(module) is None:
            return replace(entry, swapped=False, reason="restored")
        return replace(entry, reason="already swapped")

    def __str__(self) -> str:
        packs = any(type(module).mvk_packs for module, _ in self._folded if isinstance(module, Swapped))
        what = "norms folded or weights packed" if packs else "norms folded"
        folded = f"; {what} in {self.folded} modules" if self._folded else ""
        if self.packed_bytes:
            folded += f"; {self.packed_bytes / 2**20:.1f} MiB of packed weights"
        if not self.entries:
            return "nothing to swap: no attention module was found in the model" + folded
        rows = [(e.name or "(the model)", e.module_class, "yes" if e.swapped else "no", e.reason) for e in self.entries]
        total = f"{sum(e.swapped for e in self.entries)} of {len(rows)} swapped"
        if not any(e.swapped for e in self.entries):
            total += ": the attention modules are unchanged" if folded else ": the model is unchanged"
        return table(("name", "class", "swapped", "reason"), rows) + "\n" + total + folded


def original_of(module: nn.Module) -> Any:
    """The original class or processor of a swapped module; None if the module is not swapped."""
    kind = getattr(type(module), "mvk_original", None)
    return kind if kind is not None else getattr(module.__dict__.get("processor"), "mvk_original", None)


def set_backend(module: nn.Module, backend: str | None) -> str | None:
    """Set the backend of a swapped module's fused ops (None: chosen at each call). Returns the backend before."""
    holder: Any = module if hasattr(type(module), "mvk_original") else module.processor
    before: str | None = holder.__dict__.pop("mvk_backend", None)
    if backend is not None:
        holder.mvk_backend = backend
    return before


# Of a swapped module: the call that swapped it, with its backend, and the later calls that chose another one.
_calls: WeakKeyDictionary[nn.Module, list[tuple[object, str | None]]] = WeakKeyDictionary()


def note_swap(module: nn.Module, call: object, backend: str | None) -> None:
    """Record that a call of swap has swapped the module, with this backend."""
    _calls[module] = [(call, backend)]
    set_backend(module, backend)


def note_choice(module: nn.Module, call: object, backend: str) -> bool:
    """Record that a call of swap sets the backend of a module that is swapped. Returns whether the backend changes."""
    before = set_backend(module, backend)
    _calls.setdefault(module, [(None, before)]).append((call, backend))  # a copy's calls are not known
    return before != backend


def _forget_choice(module: nn.Module, call: object) -> None:
    """Set the backend to what it would be without that call."""
    calls = _calls.get(module, [])
    kept = [each for each in calls if each[0] is not call]
    if kept and len(kept) < len(calls) and original_of(module) is not None:
        _calls[module] = kept
        set_backend(module, kept[-1][1])


def restore_module(module: nn.Module) -> None:
    """Give a swapped module its original class or processor back. A module that is not swapped is not changed."""
    original = original_of(module)
    if original is None:
        return
    _calls.pop(module, None)
    set_backend(module, None)
    if isinstance(original, type):
        module.__class__ = without_form(type(module))
    else:
        module.set_processor(original)  # type: ignore[operator]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in plain text, with columns aligned to the left."""
    lines = [list(head), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)
