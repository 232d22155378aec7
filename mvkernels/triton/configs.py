"""Launch configurations of the Triton kernels: a heuristic per kernel, overridden by measured files.

Nothing is tuned at run time. ``mvkernels/configs/<device>.json``, written by ``python -m mvkernels
tune`` on that device, maps ``"op.kernel"`` to ``{key: configuration}``; what it does not name comes
from the heuristic that the op registered. Both are looked up once per key and process.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, TypeVar

import torch

from mvkernels.triton.maps import width

T = TypeVar("T")

CONFIGS = Path(__file__).parents[1] / "configs"
LISTED = Path(__file__).parent / "candidates.json"

Config = dict[str, Any]
Heuristic = Callable[[Mapping[str, Any]], Config]
Candidates = Callable[[Mapping[str, Any]], list[Config]]

_HEURISTICS: dict[tuple[str, str], Heuristic] = {}
_CANDIDATES: dict[tuple[str, str], Candidates] = {}
_caches: list[Callable[[], None]] = []
# What tuning tries at the moment, and what was asked for meanwhile.
_tried: dict[tuple[str, str, str], Config] = {}
_asked: list[dict[tuple[str, str, str], Mapping[str, Any]]] = []
_log = logging.getLogger("mvkernels")


@dataclass(frozen=True)
class Device:
    """What a launch configuration depends on: the marketing name, the architecture, the width."""

    name: str
    arch: str
    """``sm_80``, ``sm_90``, ``gfx942``, ``xpu``, or ``interpreter`` for CPU tensors."""
    processors: int


def shared_memory_of(arch: str) -> int:
    """Bytes of shared memory that one block can have on an architecture (the small ones when unknown)."""
    known = {"sm_80": 163, "sm_86": 99, "sm_87": 163, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_103": 227}
    known |= {"sm_120": 99, "sm_121": 99, "gfx950": 160, "interpreter": 227}
    return known.get(arch, 64) * 1024


ROOMY = ("sm_90", "sm_100", "sm_103", "interpreter")
"""Where matrix instructions read their operands from shared memory; elsewhere those take registers too."""


def half(key: Mapping[str, Any]) -> bool:
    """Whether a key is of float16 or bfloat16."""
    return key["dtype"] in ("f16", "bf16")


def exact(key: Mapping[str, Any]) -> bool:
    """Whether a key is of float32 products on the ordinary cores. The interpreter has no registers to run out of."""
    return bool(key["dtype"] == "f32" and key["arch"] != "interpreter")


@cache
def device_of(type_: str, index: int | None) -> Device:
    """The :class:`Device` of ``tensor.device.type, tensor.device.index``."""
    if type_ == "cuda":
        properties = torch.cuda.get_device_properties(index)
        cuda = f"sm_{properties.major}{properties.minor}"
        arch = properties.gcnArchName.split(":")[0] if torch.version.hip else cuda
        return Device(properties.name, arch, properties.multi_processor_count)
    if type_ == "xpu":
        xpu = torch.xpu.get_device_properties(index)
        return Device(xpu.name, "xpu", getattr(xpu, "gpu_subslice_count", 32))
    return Device("interpreter", "interpreter", 2)


@cache
def _major(index: int | None) -> int:
    return torch.cuda.get_device_capability(index)[0]


def why_too_old(device: torch.device) -> str | None:
    """Why an NVIDIA GPU is too old for the kernels, or None; asked of the driver once per device."""
    if device.type != "cuda" or torch.version.hip or _major(device.index) >= 8:
        return None
    return f"compute capability {_major(device.index)}.x: want 8.0 or more"


def tf32_allowed(device_type: str) -> bool:
    """Whether the user lets float32 products on such a device round to tf32."""
    # Reading allow_tf32 raises where the user has set the newer fp32_precision; that one tells both.
    nvidia = device_type == "cuda" and not torch.version.hip
    return nvidia and torch.backends.cuda.matmul.fp32_precision == "tf32"


def heuristic(op: str, kernel: str) -> Callable[[Heuristic], Heuristic]:
    """Register the default configuration of a kernel: a function of the key."""

    def register(function: Heuristic) -> Heuristic:
        _HEURISTICS[op, kernel] = function
        return function

    return register


def candidates(op: str, kernel: str) -> Callable[[Candidates], Candidates]:
    """Register what tuning may try for a kernel: a function of the key to changes of the heuristic's choice."""

    def register(function: Candidates) -> Candidates:
        _CANDIDATES[op, kernel] = function
        return function

    return register


def default(op: str, kernel: str, key: Mapping[str, Any]) -> Config:
    """The heuristic's choice, whatever was measured."""
    return _HEURISTICS[op, kernel](key)


def candidates_of(op: str, kernel: str, key: Mapping[str, Any]) -> list[Config]:
    """The changes that tuning may try; none for a kernel that registered none."""
    return _CANDIDATES[op, kernel](key) if (op, kernel) in _CANDIDATES else []


@cache
def _listed() -> Mapping[str, Mapping[str, Mapping[str, list[Config]]]]:
    return json.loads(LISTED.read_text())["candidates"]


def class_of(key: Mapping[str, Any]) -> str:
    """Of keys that compile to nearly the same code: tiles are as wide, and float16 has bfloat16's bytes and
    instructions."""
    padded = {name: width(key[name]) for name in ("d", "dv") if name in key}
    return key_text({**key, **padded, **({"dtype": "bf16"} if half(key) else {})})


def listed(op: str, kernel: str, key: Mapping[str, Any]) -> list[Config] | None:
    """Of the changes that tuning may try those worth it, the most promising first; None if nobody has looked."""
    return _listed().get(key["arch"], {}).get(f"{op}.{kernel}", {}).get(class_of(key))


def tiles_to_try(lanes: int, blocks: Sequence[int]) -> list[Config]:
    """Candidates for kernels that walk over tiles of (pixels, lanes): sizes that so many warps have registers for."""
    return [
        {"BLOCK": block, "PROGRAMS": programs, "num_warps": warps, "num_stages": stages}
        for block in blocks
        for warps in (1, 2, 4, 8)
        for stages in (1, 2)
        for programs in (2, 8)
        if 4 * 64 * warps <= block * lanes <= 128 * 64 * warps
    ]


def memo(function: Callable[..., T]) -> Callable[..., T]:
    """An lru_cache for what follows from configurations: :func:`forget` empties it."""
    cached = lru_cache(maxsize=4096)(function)
    _caches.append(cached.cache_clear)
    return cached


def file_of(device_name: str) -> Path:
    """Where the measured configurations of a device lie, whether or not there are any."""
    return CONFIGS / (re.sub(r"[^A-Za-z0-9]+", "_", device_name).strip("_").lower() + ".json")


def key_text(key: Mapping[str, Any]) -> str:
    """The key as it is written in a configuration file: ``bias=0,d=36,dtype=f16,…``, without ``arch``."""
    return ",".join(f"{name}={key[name]}" for name in sorted(key) if name != "arch")


@cache
def _measured(device_name: str) -> Mapping[str, Mapping[str, Config]]:
    path = file_of(device_name)
    try:
        return json.loads(path.read_text())["configs"]
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        _log.warning("launch configurations in %s are not read: %s", path, error)
        return {}


@cache
def _config(op: str, kernel: str, device_name: str, items: tuple[tuple[str, Any], ...]) -> Config:
    key = dict(items)
    text = key_text(key)
    for record in _asked:
        record[op, kernel, text] = key
    measured = _measured(device_name).get(f"{op}.{kernel}", {}).get(text, {})
    return {**_HEURISTICS[op, kernel](key), **measured, **_tried.get((op, kernel, text), {})}


def config(op: str, kernel: str, device_name: str, key: Mapping[str, Any]) -> Config:
    """The launch configuration of a kernel: ``num_warps``, ``num_stages`` and its block sizes.

    ``key`` holds what the choice may depend on, ``arch`` among it. Do not change what is returned.
    """
    return _config(op, kernel, device_name, tuple(sorted(key.items())))


def forget() -> None:
    """Read the files anew at the next call (after tuning, and in tests)."""
    _measured.cache_clear()
    _config.cache_clear()
    for clear in _caches:
        clear()


@contextmanager
def trying(op: str, kernel: str, key: str, change: Config) -> Iterator[None]:
    """Inside, the kernel's configuration for this key (as :func:`key_text` writes it) is changed. Not thread-safe."""
    _tried[op, kernel, key] = change
    forget()
    try:
        yield
    finally:
        del _tried[op, kernel, key]
        forget()


@contextmanager
def recording() -> Iterator[dict[tuple[str, str, str], Mapping[str, Any]]]:
    """Collect which configurations are asked for: {(op, kernel, key as text): key}. Not thread-safe."""
    record: dict[tuple[str, str, str], Mapping[str, Any]] = {}
    _asked.append(record)
    forget()
    try:
        yield record
    finally:
        _asked.remove(record)
