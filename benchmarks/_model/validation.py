"""How near the model comes to the times that a GPU measured, and the fit of its constants to half of them."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import scipy.optimize
from _counters import COUNTED

from _model.devices import FITTED, Device, Fitted
from _model.limits import times
from _model.work import Work

CALL = ("op", "model", "label", "layout", "batch", "dtype")
FREE = ("launch", "waiting", "busy", "far", "further", "requests", "passes", "power")
"""The constants that are fitted. ``near`` and ``memory`` are measured ones."""


@dataclass(frozen=True)
class Row:
    """A kernel of a call: what was measured, and what was counted of all its launches."""

    measured: Mapping[str, str]
    launches: Sequence[Work]
    half: str
    """"fit", or "test"."""

    @property
    def us(self) -> float:
        return float(self.measured["us"])

    def predicted(self, device: Device, fit: Fitted = FITTED) -> float:
        """Microseconds."""
        return sum(times(each, device, fit).predicted for each in self.launches)


def joined(measured: Iterable[Mapping[str, str]], counted: Mapping[tuple[str, ...], Sequence[Any]]) -> Iterator[Row]:
    """Rows of kernels.csv with what was counted of their calls, by CALL; those of PyTorch's own kernels are left out.

    Every other shape is for the fit, with all its batches, layouts and modes.
    """
    measured = list(measured)
    shapes = sorted({(row["op"], row["model"], row["label"]) for row in measured})
    half = {shape: ("fit", "test")[i % 2] for i, shape in enumerate(shapes)}
    for row in measured:
        wanted = ("fwd",) if row["mode"] == "fwd" else ("fwd", "bwd")
        passes = counted.get(tuple(row[name] for name in CALL), ())
        launches = [
            work for each in passes if each.mode in wanted for work in each.launches if work.kernel == row["kernel"]
        ]
        if len(launches) == int(row["launches"]):
            yield Row(row, launches, half[row["op"], row["model"], row["label"]])


def fitted(rows: Sequence[Row], device: Device, start: Fitted = FITTED) -> Fitted:
    """The constants with which the logarithms of predicted over measured are least, over the rows of the fit."""
    mine = [row for row in rows if row.half == "fit"]
    measured = np.array([row.us for row in mine])

    def constants(x: Any) -> Fitted:
        return replace(start, **dict(zip(FREE, map(float, x))))

    def error(x: Any) -> float:
        if min(x) <= 0 or constants(x).power < 1:
            return 9.0
        ratio = np.log(np.array([row.predicted(device, constants(x)) for row in mine]) / measured)
        return float(np.abs(ratio).mean() + 0.3 * (ratio**2).mean())

    x = np.array([getattr(start, name) for name in FREE])
    for _ in range(2):  # it stops early where it begins far away
        x = scipy.optimize.minimize(error, x, method="Nelder-Mead", options={"maxiter": 600, "adaptive": True}).x
    return constants(x)


def written(fit: Fitted) -> str:
    """The constants, a line each."""
    return "\n".join(f"{each.name} {getattr(fit, each.name):.3g}" for each in fields(fit))


def table(rows: Sequence[Row], device: Device, counters: Sequence[Mapping[str, str]]) -> Iterator[dict[str, Any]]:
    """A row for each kernel: measured, predicted, and the instructions where the hardware's counters have them."""

    def identity(row: Mapping[str, str], grid: str, registers: float) -> tuple[Any, ...]:
        # Of two shapes with one grid the registers tell which it is.
        return (*(row[name] for name in ("op", "layout", "batch", "kernel")), grid, registers)

    known = {identity(row, row["grid"], float(row["registers"])): row["warp_instructions"] for row in counters}
    for row in rows:
        of, predicted = row.measured, row.predicted(device)
        first = row.launches[0]
        counted = any(part in of["label"] for part in COUNTED[of["op"]][1:])
        instructions = known.get(identity(of, str(first.grid), first.registers), "") if counted else ""
        yield {
            "device": of["device"], **{name: of[name] for name in CALL}, "mode": of["mode"], "kernel": of["kernel"],
            "launches": of["launches"], "half": row.half, "measured_us": of["us"], "predicted_us": f"{predicted:.4g}",
            "ratio": f"{predicted / row.us:.3f}", "decides": times(first, device).decides,
            "instructions_measured": instructions,
            "instructions_predicted": round(first.warp_instructions) if instructions else "",
        }  # fmt: skip


def summary(rows: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    """A line for each half: quantiles of predicted over measured, and how many rows are within a factor."""
    found: list[list[Any]] = []
    for half in ("fit", "test"):
        ratio = np.array([float(row["ratio"]) for row in rows if row["half"] == half])
        if len(ratio):
            within = [f"{(np.maximum(ratio, 1 / ratio) < most).mean():.0%}" for most in (1.25, 1.4, 2)]
            found.append([half, len(ratio), *(f"{q:.2f}" for q in np.quantile(ratio, (0.1, 0.5, 0.9))), *within])
    return found


SUMMARY = ["half", "kernels", "10 %", "median", "90 %", "within 1.25", "within 1.4", "within 2"]


def instructions(rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """Predicted over measured, of each kernel that has counters, once."""
    found = {
        (row["op"], row["kernel"], row["instructions_measured"]): float(row["instructions_predicted"])
        / float(row["instructions_measured"])
        for row in rows if row["instructions_measured"]
    }  # fmt: skip
    return list(found.values())


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
