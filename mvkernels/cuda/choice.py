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

from mvkernels.dispatch.tracing import constant
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


_TOKENS = (16, 32, 64, 128, 256, 512)
_CHANNELS = (16, 24, 32, 40, 48, 56, 64, 128)
_SIDES = (0, 1, 3, 5)


def _at_least(count: int, limits: tuple[int, ...]) -> int:
    # By comparisons, which torch.compile can trace for sizes that it does not know.
    for limit in limits:
        if count <= limit:
            return limit
    return 2 * limits[-1]


def tokens(count: int) -> int:
    """A count of tokens as keys have it: the next power of two."""
    return _at_least(count, _TOKENS)


def channels(count: int) -> int:
    """A count of a head's channels as keys have it: the next multiple of 8, up to 64."""
    return _at_least(count, _CHANNELS)


def side(count: int) -> int:
    """The side of a depthwise kernel as keys have it; 0 for none."""
    return _at_least(count, _SIDES)


def key_of(op: Op, arguments: Mapping[str, Any], backward: bool) -> dict[str, Any]:
    """The key of a call with these arguments, by name, of an op that has the choice."""
    bound = inspect.signature(op.function).bind(**arguments)
    bound.apply_defaults()
    for other in ("backend", "process_group"):
        bound.arguments.pop(other, None)
    checked, device = op.check(*bound.arguments.values()), next(iter(arguments.values())).device
    return {**_key(op, checked, backward), "arch": configs.device_of(device.type, device.index).arch}


def _key(op: Op, arguments: tuple[Any, ...], backward: bool) -> dict[str, Any]:
    assert op.choice is not None
    return {**op.choice(arguments), "grad": int(backward)}


def is_faster(op: Op, arguments: tuple[Any, ...], backward: bool) -> bool:
    """Whether CUDA C++ is taken for these checked arguments of an op that has the choice; with ``backward`` for forward
    and backward together."""
    device = arguments[0].device
    return _taken(op.name, device.type, device.index, tuple(_key(op, arguments, backward).items()))


@constant
def _taken(op: str, type_: str, index: int | None, items: tuple[tuple[str, Any], ...]) -> bool:
    # What torch.compile would have to trace: files are read, and kept.
    of = configs.device_of(type_, index)
    return bool(configs.config(op, KERNEL, of.name, {**dict(items), "arch": of.arch})["CUDA"])
