"""Whether "auto" takes an op's kernels in CUDA C++ rather than those in Triton, where both can run a call.

What was measured decides: ``mvkernels tune`` times both on a device, and keeps in its file of configurations, under
``<op>.backend``, which one was faster for a key. Where nothing was measured, the time that the machine code predicts
does (``predicted.json``, which benchmarks/predict.py writes): CUDA C++ is taken where it is predicted to be at least
LEAST times as fast.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mvkernels.triton import configs

if TYPE_CHECKING:
    from mvkernels.dispatch.registry import Op

KERNEL = "backend"
"""The name of the configuration."""
PREDICTED = Path(__file__).parent / "predicted.json"
LEAST = 1.3
"""How many times as fast the prediction has to be: its error is of that size."""


@cache
def predicted() -> Mapping[str, Mapping[str, Mapping[str, float]]]:
    """How many times as fast as Triton's CUDA C++ is predicted to be: by architecture, op, and class of keys."""
    return json.loads(PREDICTED.read_text())["times_as_fast"]  # type: ignore[no-any-return]


def register(op: str) -> None:
    """Let an op have the choice."""

    @configs.heuristic(op, KERNEL)
    def default(key: Mapping[str, Any]) -> dict[str, Any]:
        known = predicted().get(key["arch"], {}).get(op, {})
        return {"CUDA": int(known.get(configs.class_of(key), 0.0) >= LEAST)}


def key_of(op: Op, arguments: Mapping[str, Any], backward: bool) -> dict[str, Any]:
    """The key of a call with these arguments, by name, of an op that has the choice."""
    bound = inspect.signature(op.function).bind(**arguments)
    bound.apply_defaults()
    for other in ("backend", "process_group"):
        bound.arguments.pop(other, None)
    return _key(op, op.check(*bound.arguments.values()), backward)[0]


def _key(op: Op, arguments: tuple[Any, ...], backward: bool) -> tuple[dict[str, Any], configs.Device]:
    assert op.choice is not None
    device = arguments[0].device
    of = configs.device_of(device.type, device.index)
    return {**op.choice(arguments, backward), "arch": of.arch}, of


def is_faster(op: Op, arguments: tuple[Any, ...], backward: bool) -> bool:
    """Whether CUDA C++ is taken for these checked arguments of an op that has the choice; with ``backward`` for forward
    and backward together."""
    key, device = _key(op, arguments, backward)
    return bool(configs.config(op.name, KERNEL, device.name, key)["CUDA"])
