"""From what a launch asks of each unit to microseconds."""

from __future__ import annotations

import math
from dataclasses import dataclass

from _model.devices import FITTED, Device, Fitted
from _model.work import FAR, Work

NAMES = ("issue", "arithmetic", "special", "matrix", "shared", "first_cache", "second_cache", "memory", "latency",
         "launch")  # fmt: skip
"""Limits: of schedulers; of the pipes of floats and integers; of the special-function units; of the matrix units; of
passes over shared memory, shuffles among them; of requests to the first-level cache; of the second-level cache; of the
memory; of warps that wait; of a launch."""

HOST = 6.0
"""Microseconds of the host for a launch by Triton's launcher in C, measured on a CPU of 2.5 GHz; Python's part
comes on top. It goes on beside the device, and is no part of the prediction."""


@dataclass(frozen=True)
class Times:
    """Microseconds of a launch."""

    each: dict[str, float]
    predicted: float

    @property
    def decides(self) -> str:
        return max(self.each, key=lambda name: self.each[name])


def times(work: Work, device: Device, fit: Fitted = FITTED) -> Times:
    """Each limit by itself, and the prediction.

    The processor that has most blocks takes them in turns, so many at once as it holds. A turn takes what a warp waits
    for, and what the busiest unit does for all of its blocks: with as few warps as these kernels have, the one does not
    hide the other. The processors' time, the second-level cache's and the memory's overlap, but not wholly.
    """
    clock = device.busy_clock / 1e6
    pipes = {name: fit.busy * cycles * work.warps / 4 for name, cycles in work.pipes.items()}
    units = {
        "issue": pipes["issue"],
        "arithmetic": max(pipes[name] for name in ("fma", "heavy", "alu", "uniform", "double")),
        "special": pipes["special"],
        "matrix": pipes["matrix"],
        "shared": fit.busy * fit.passes * (work.wavefronts + work.exchanges),
        "first_cache": fit.busy * fit.requests * work.passes,
    }
    # Shared memory and the first-level cache are one, and have one way in.
    busiest = max(*pipes.values(), units["shared"] + units["first_cache"])
    cold = min(1.0, work.moved_bytes / work.cached_bytes) if work.cached_bytes else 0.0
    load = fit.near + (1 - work.hit) * (fit.far + fit.further * cold)
    loads = (work.alone[1] - work.alone[0]) * load / FAR
    waiting = fit.waiting * work.alone[0] + loads
    most = math.ceil(work.grid / device.processors)
    turns = math.ceil(most / max(work.resident, 1))
    each = {name: most * value / clock for name, value in units.items()}
    each["second_cache"] = work.cached_bytes / device.cache_bytes * 1e6
    each["memory"] = work.moved_bytes / (device.bytes * fit.memory) * 1e6
    each["latency"] = turns * waiting / clock
    each["launch"] = fit.launch
    processors = each["latency"] + most * busiest / clock
    predicted = together((processors, each["second_cache"], each["memory"]), fit.power) + fit.launch
    return Times({name: each[name] for name in NAMES}, predicted)


def together(parts: tuple[float, ...], power: float) -> float:
    """The largest if it is much larger, else more than it."""
    most = max(parts)
    return most * sum((part / most) ** power for part in parts) ** (1 / power) if most else 0.0
