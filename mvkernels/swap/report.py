"""What a swap did, row by row, and the way back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import nn


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
    """Why it was not swapped, or "already swapped"."""


@dataclass
class SwapReport:
    """The answer of :func:`mvkernels.swap`. Prints as a table."""

    entries: list[SwapEntry] = field(default_factory=list)
    _changed: list[tuple[nn.Module, type[nn.Module]]] = field(default_factory=list, repr=False)

    @property
    def count(self) -> int:
        """How many modules this call swapped; those that were swapped before do not count."""
        return len(self._changed)

    def restore(self) -> None:
        """Undo what this call did: the model is what it was. A second call does nothing."""
        for module, original in self._changed:
            restore_module(module, original)
        self._changed.clear()

    def __str__(self) -> str:
        if not self.entries:
            return "nothing to swap: the model has no attention module that is known here"
        rows = [(e.name or "(the model)", e.module_class, "yes" if e.swapped else "no", e.reason) for e in self.entries]
        total = f"{sum(e.swapped for e in self.entries)} of {len(rows)} swapped"
        if not any(e.swapped for e in self.entries):
            total += ": the model is as it was"
        return table(("name", "class", "swapped", "reason"), rows) + "\n" + total


def restore_module(module: nn.Module, original: type[nn.Module]) -> None:
    """Give a swapped module its own class back; one that is not swapped is left alone."""
    if getattr(type(module), "mvk_original", None) is original:
        module.__class__ = original
        module.__dict__.pop("mvk_backend", None)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Plain text, columns aligned to the left."""
    lines = [list(head), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)
