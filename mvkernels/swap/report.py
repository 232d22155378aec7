"""What a swap did, row by row, and the way back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from mvkernels.swap.swapped import without_form


@dataclass(frozen=True)
class SwapEntry:
    """One attention module that was found."""

    name: str
    """Its name in the model; empty if it is the model itself."""
    module_class: str
    """The name of its class before the swap."""
    swapped: bool
    """Whether it runs on the fused kernels now."""
    reason: str = ""
    """Why it was not swapped, or "already swapped", or "restored"."""


@dataclass
class SwapReport:
    """The answer of :func:`mvkernels.swap`. Prints as a table."""

    entries: list[SwapEntry] = field(default_factory=list)
    _call: object = field(default_factory=object, repr=False, compare=False)
    """Stands for the call of swap that the report is of."""
    _changed: dict[str, nn.Module] = field(default_factory=dict, repr=False)
    _before: dict[str, nn.Module] = field(default_factory=dict, repr=False)
    """Modules that were swapped before this call, by name."""
    _folded: list[tuple[nn.Module, Any]] = field(default_factory=list, repr=False)

    @property
    def count(self) -> int:
        """How many modules this call swapped; those that were swapped before do not count, nor do restored ones."""
        return len(self._changed)

    @property
    def folded(self) -> int:
        """How many modules fold the norms of their convolutions since this call."""
        return len(self._folded)

    def restore(self) -> None:
        """Undo what this call did: the model is what it was. A second call does nothing.

        What others did to a module since stays: a class that they made of its class (``fully_shard``, a
        parametrization) is made anew on the original one. The entries of restored modules say so.
        """
        for module in self._before.values():
            _forget_choice(module, self._call)
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

    def _restored(self, entry: SwapEntry) -> SwapEntry:
        module = (self._changed | self._before).get(entry.name)
        if module is None:
            return entry
        if entry.name in self._changed or original_of(module) is None:
            return replace(entry, swapped=False, reason="restored")
        return replace(entry, reason="already swapped")

    def __str__(self) -> str:
        folded = f"; {self.folded} modules fold their norms" if self._folded else ""
        if not self.entries:
            return "nothing to swap: the model has no attention module that is known here" + folded
        rows = [(e.name or "(the model)", e.module_class, "yes" if e.swapped else "no", e.reason) for e in self.entries]
        total = f"{sum(e.swapped for e in self.entries)} of {len(rows)} swapped"
        if not any(e.swapped for e in self.entries):
            total += ": attention is as it was" if folded else ": the model is as it was"
        return table(("name", "class", "swapped", "reason"), rows) + "\n" + total + folded


def original_of(module: nn.Module) -> Any:
    """What a swapped module had in the place of what it has now: its class, or its processor. None if not swapped."""
    kind = getattr(type(module), "mvk_original", None)
    return kind if kind is not None else getattr(module.__dict__.get("processor"), "mvk_original", None)


def set_backend(module: nn.Module, backend: str | None) -> str | None:
    """Choose the backend of a swapped module's fused ops; None: chosen at each call. Returns what it was."""
    holder: Any = module if hasattr(type(module), "mvk_original") else module.processor
    before: str | None = holder.__dict__.pop("mvk_backend", None)
    if backend is not None:
        holder.mvk_backend = backend
    return before


# Of a swapped module: the call that swapped it, with its backend, and the later calls that chose another one.
_calls: WeakKeyDictionary[nn.Module, list[tuple[object, str | None]]] = WeakKeyDictionary()


def note_swap(module: nn.Module, call: object, backend: str | None) -> None:
    """A call of swap has swapped the module, with this backend."""
    _calls[module] = [(call, backend)]
    set_backend(module, backend)


def note_choice(module: nn.Module, call: object, backend: str) -> bool:
    """A call of swap chooses another backend for a module that is swapped; whether that is another one."""
    before = set_backend(module, backend)
    _calls.setdefault(module, [(None, before)]).append((call, backend))  # a copy's calls are not known
    return before != backend


def _forget_choice(module: nn.Module, call: object) -> None:
    """The backend is what it was without that call, whichever calls came after it."""
    calls = _calls.get(module, [])
    kept = [each for each in calls if each[0] is not call]
    if kept and len(kept) < len(calls) and original_of(module) is not None:
        _calls[module] = kept
        set_backend(module, kept[-1][1])


def restore_module(module: nn.Module) -> None:
    """Give a swapped module its own class or processor back; one that is not swapped is left alone."""
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
    """Plain text, columns aligned to the left."""
    lines = [list(head), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)
