"""``mvkernels bench --compare OLD.csv``: each of this library's rows against the same row of an earlier run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mvkernels import report
from mvkernels.bench.rows import Row, geomean
from mvkernels.dispatch.backend import BACKENDS

TOLERANCE = 0.05
"""Relative change of a median that is ignored: two runs of the same code differ by about this."""


@dataclass(frozen=True)
class Change:
    """One row in the old and in the new results."""

    old: Row
    new: Row
    ratio: float | None
    """New median divided by old: above 1 is slower. None if one of them has no time."""
    verdict: str
    """"slower", "faster", "same", or "wrong": it had a time, and now fails."""

    @property
    def regressed(self) -> bool:
        return self.verdict in ("slower", "wrong")


def compare(old: Sequence[Row], new: Sequence[Row], tolerance: float = TOLERANCE) -> list[Change]:
    """Compare the rows of mvkernels' backends that are in both, with the same device, threads and allocator.

    A row is slower if the confidence intervals of the two medians do not overlap and the medians differ by more than
    ``tolerance``. Raises UsageError if no row is in both.
    """
    before = {_key(row): row for row in old if row.provider in BACKENDS}
    pairs = [(before[_key(row)], row) for row in new if row.provider in BACKENDS and _key(row) in before]
    if not pairs:
        ours, theirs = (sorted({f"{r.device} ({r.capability})" for r in rows}) for rows in (new, old))
        why = "" if ours == theirs else f": the old rows are of {', '.join(theirs)}, the new rows of {', '.join(ours)}"
        raise report.UsageError(f"--compare: the old and the new results have no row in common{why}")
    return [_change(then, now, tolerance) for then, now in pairs]


def _key(row: Row) -> tuple[object, ...]:
    return (*row.shape, row.provider, row.device, row.capability, row.threads, row.allocator)


def _change(old: Row, new: Row, tolerance: float) -> Change:
    if old.median_us is None or new.median_us is None:
        return Change(old, new, None, "wrong" if old.ok and not new.ok else "same")
    ratio = new.median_us / old.median_us
    (old_low, old_high), (new_low, new_high) = _interval(old), _interval(new)
    verdict = "same"
    if ratio > 1 + tolerance and new_low > old_high:
        verdict = "slower"
    elif ratio < 1 / (1 + tolerance) and new_high < old_low:
        verdict = "faster"
    return Change(old, new, ratio, verdict)


def _interval(row: Row) -> tuple[float, float]:
    """The confidence interval of the median. In older files: the 20 % and 80 % quantiles, a wider interval."""
    low = row.median_low_us if row.median_low_us is not None else row.p20_us
    high = row.median_high_us if row.median_high_us is not None else row.p80_us
    assert row.median_us is not None
    return (row.median_us if low is None else low, row.median_us if high is None else high)


def drift(old: Sequence[Row], new: Sequence[Row]) -> float | None:
    """Geometric mean of new/old of the peers: their code has not changed, so it shows changes of the machine."""
    before = {_key(row): row.median_us for row in old if row.provider not in BACKENDS and row.median_us}
    ratios = [
        row.median_us / before[_key(row)]  # type: ignore[operator]
        for row in new
        if row.provider not in BACKENDS and row.median_us and _key(row) in before
    ]
    return geomean(ratios) if ratios else None


def text(changes: Sequence[Change], machine: float | None) -> str:
    """A table of the changes, and a summary."""
    lines = [
        (
            c.new.op, f"{c.new.model} {c.new.label}", c.new.batch, c.new.dtype, c.new.layout, c.new.mode,
            c.new.provider, _us(c.old.median_us), _us(c.new.median_us), None if c.ratio is None else f"{c.ratio:.3f}x",
            c.verdict,
        )
        for c in changes
    ]  # fmt: skip
    header = ("op", "shape", "batch", "dtype", "layout", "mode", "provider", "old us", "new us", "new/old", "verdict")
    commits = " -> ".join(
        next((r.commit for r in rows if r.commit), "?") for rows in zip(*((c.old, c.new) for c in changes))
    )
    ratios = [c.ratio for c in changes if c.ratio is not None]
    total = f"{len(changes)} rows compared ({commits}), {sum(c.regressed for c in changes)} regressed"
    if ratios:
        total += f", geometric mean of new/old {geomean(ratios):.3f}"
    if machine is not None:
        total += f"; of the peers, whose code has not changed: {machine:.3f}"
    return f"{report.table(lines, header)}\n\n{total}"


def _us(value: float | None) -> str:
    return "-" if value is None else report.microseconds(value * 1e-6)
