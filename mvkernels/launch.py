"""Launch configurations of the Triton kernels: a heuristic per kernel, overridden by measured files.

Nothing is tuned at run time. ``mvkernels/configs/<device>.json``, written by ``python -m mvkernels
tune`` on that device, maps ``"op.kernel"`` to ``{key: configuration}``; what it does not name comes
from the heuristic that the op registered. Both are looked up once per key and process.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

CONFIGS = Path(__file__).parent / "configs"

Config = dict[str, Any]
Heuristic = Callable[[Mapping[str, Any]], Config]

_HEURISTICS: dict[tuple[str, str], Heuristic] = {}
_log = logging.getLogger("mvkernels")


@dataclass(frozen=True)
class Device:
    """What a launch configuration depends on: the marketing name, the architecture, the width."""

    name: str
    arch: str
    """``sm_80``, ``sm_90``, ``gfx942``, ``xpu``, or ``interpreter`` for CPU tensors."""
    processors: int

    @property
    def shared_memory(self) -> int:
        """Bytes of shared memory that one block can have."""
        return shared_memory_of(self.arch)


def shared_memory_of(arch: str) -> int:
    """Bytes of shared memory that one block can have on an architecture (the small ones when unknown)."""
    known = {"sm_80": 163, "sm_86": 99, "sm_87": 163, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_103": 227}
    known |= {"sm_120": 99, "sm_121": 99, "gfx950": 160, "interpreter": 227}
    return known.get(arch, 64) * 1024


@lru_cache(maxsize=None)
def device_of(type_: str, index: int | None) -> Device:
    """The :class:`Device` of ``tensor.device.type, tensor.device.index``."""
    if type_ == "cuda":
        properties = torch.cuda.get_device_properties(index)
        if torch.version.hip:
            arch = properties.gcnArchName.split(":")[0]
        else:
            arch = f"sm_{properties.major}{properties.minor}"
        return Device(properties.name, arch, properties.multi_processor_count)
    if type_ == "xpu":
        properties = torch.xpu.get_device_properties(index)
        return Device(properties.name, "xpu", getattr(properties, "gpu_subslice_count", 32))
    return Device("interpreter", "interpreter", 2)


def heuristic(op: str, kernel: str) -> Callable[[Heuristic], Heuristic]:
    """Register the default configuration of a kernel: a function of the key."""

    def register(function: Heuristic) -> Heuristic:
        _HEURISTICS[op, kernel] = function
        return function

    return register


def file_of(device_name: str) -> Path:
    """Where the measured configurations of a device lie, whether or not there are any."""
    return CONFIGS / (re.sub(r"[^A-Za-z0-9]+", "_", device_name).strip("_").lower() + ".json")


def key_text(key: Mapping[str, Any]) -> str:
    """The key as it is written in a configuration file: ``d=36,dtype=f16,dv=36,n=256``, without ``arch``."""
    return ",".join(f"{name}={key[name]}" for name in sorted(key) if name != "arch")


@lru_cache(maxsize=None)
def _measured(device_name: str) -> Mapping[str, Mapping[str, Config]]:
    path = file_of(device_name)
    try:
        return json.loads(path.read_text())["configs"]
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        _log.warning("launch configurations in %s are not read: %s", path, error)
        return {}


@lru_cache(maxsize=None)
def _config(op: str, kernel: str, device_name: str, items: tuple[tuple[str, Any], ...]) -> Config:
    key = dict(items)
    return {**_HEURISTICS[op, kernel](key), **_measured(device_name).get(f"{op}.{kernel}", {}).get(key_text(key), {})}


def config(op: str, kernel: str, device_name: str, key: Mapping[str, Any]) -> Config:
    """The launch configuration of a kernel: ``num_warps``, ``num_stages`` and its block sizes.

    ``key`` holds what the choice may depend on, ``arch`` among it. Do not change what is returned.
    """
    return _config(op, kernel, device_name, tuple(sorted(key.items())))


def forget() -> None:
    """Read the files anew at the next call (after tuning, and in tests)."""
    _measured.cache_clear()
    _config.cache_clear()
