"""The rows of ``mvkernels bench``: columns, CSV files, summaries."""

from __future__ import annotations

import csv
import math
import re
import types
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from mvkernels import files, report
from mvkernels.dispatch.registry import Case


@dataclass
class Row:
    """One line of the CSV: a provider's figures for one shape.

    The names and their order stay, and new ones go to the end: docs/benchmarks.md says what each is.
    """

    date: str
    device: str
    capability: str
    torch: str
    mvkernels: str
    commit: str
    threads: int
    allocator: str
    op: str
    model: str
    label: str
    size_class: str
    batch: int
    dtype: str
    layout: str
    mode: str
    provider: str
    ok: bool
    median_us: float | None = None
    min_us: float | None = None
    p20_us: float | None = None
    p80_us: float | None = None
    rounds: int = 0
    speedup_median: float | None = None
    """Median of the best peer over this median (and likewise of the minima); peers have none."""
    speedup_min: float | None = None
    best_peer: str = ""
    peak_bytes: int | None = None
    peak_resident_bytes: int | None = None
    floor_us: float | None = None
    fraction_of_floor: float | None = None
    copy_gb_s: float = 0.0
    matmul_gflop_s: float = 0.0
    error: float | None = None
    note: str = ""
    median_low_us: float | None = None
    """The 95 % confidence interval of the median."""
    median_high_us: float | None = None
    gb_s: float | None = None
    """The floor's bytes and FLOPs over the median."""
    tflop_s: float | None = None
    triton: str = ""
    wall_us: float | None = None
    """On a GPU: per call, one after another, with what they cost the host (the least of a few tens)."""
    fma_gflop_s: float | None = None
    """The measured peak of multiply-adds on a CPU."""
    fraction_of_fma: float | None = None

    @property
    def shape(self) -> tuple[Any, ...]:
        """What two rows must agree in to be of the same work, whoever does it."""
        return (self.op, self.model, self.label, self.batch, self.dtype, self.layout, self.mode)


COLUMNS = tuple(f.name for f in fields(Row))


def geomean(values: Sequence[float]) -> float:
    """The geometric mean."""
    return math.exp(sum(map(math.log, values)) / len(values))


def geomeans(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Speed-ups put together by op, mode, dtype, provider and class of shapes, worst shape included."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if row.speedup_median is not None:
            for klass in dict.fromkeys((row.size_class, "all")):
                groups.setdefault((row.op, row.mode, row.dtype, row.provider, klass), []).append(row)
    out = []
    for (op, mode, dtype, provider, klass), members in sorted(groups.items(), key=_class_order):
        medians = [row.speedup_median or math.nan for row in members]
        minima = [row.speedup_min or math.nan for row in members]
        out.append(
            {
                "op": op,
                "mode": mode,
                "dtype": dtype,
                "provider": provider,
                "size_class": klass,
                "shapes": len(members),
                "geomean_of_medians": round(geomean(medians), 3),
                "geomean_of_minima": round(geomean(minima), 3),
                "worst": round(min(medians), 3),
            }
        )
    return out


def _class_order(item: tuple[tuple[str, ...], list[Row]]) -> tuple[Any, ...]:
    *rest, klass = item[0]
    return (*rest, klass == "all", int(re.sub(r"\D", "", klass) or 0))


def write_csv(rows: Sequence[Row], path: str | Path) -> None:
    """Write rows with the stable columns."""
    files.write_csv(path, COLUMNS, (asdict(row) for row in rows))


def size_class(case: Case) -> str:
    """The class of shapes that a summary puts together: for grouped attention by the tokens of a group."""
    shape = case.shape
    if "window" in shape:
        tokens = shape["window"] ** 2
    elif "patch" in shape:
        tokens = shape["height"] * shape["width"] // shape["patch"] ** 2
    else:
        return "all"
    return next((f"N<={bound}" for bound in (16, 64, 255) if tokens <= bound), "N>=256")


def read_csv(path: str | Path) -> list[Row]:
    """The rows of a file that this or an earlier version wrote. Missing columns get their defaults.

    Raises UsageError if the file cannot be read or is not a file of ``mvkernels bench``.
    """
    try:
        with open(path, newline="") as file:
            reader = csv.DictReader(file)
            names = reader.fieldnames or ()
            missing = [f.name for f in fields(Row) if f.default is MISSING and f.name not in names]
            if missing:
                raise report.UsageError(f"{path} is not a file of mvkernels bench: it has no column {missing[0]!r}")
            return [
                Row(**{name: _value(name, text) for name, text in line.items() if name in COLUMNS}) for line in reader
            ]
    except OSError as error:
        raise report.UsageError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, csv.Error) as error:
        raise report.UsageError(f"{path} cannot be read: {error}") from None


def _value(name: str, text: str | None) -> Any:
    kind = _KINDS[name]
    if kind is str:
        return text or ""
    optional = isinstance(kind, types.UnionType)
    if not text:
        if optional:
            return None
        raise ValueError(f"{name} is empty")
    kind = get_args(kind)[0] if optional else kind
    if kind is bool:
        return text == "True"
    value = kind(text)
    # A wrong result may be off by anything; a time of nothing would be compared and divided by.
    if (name != "error" and not (0 <= value < math.inf)) or (name in ("median_us", "min_us") and not value):
        raise ValueError(f"{name} is {text}")
    return value


_KINDS = get_type_hints(Row)
