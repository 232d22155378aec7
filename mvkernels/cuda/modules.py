"""The compiled files of csrc/cuda: which of them a device takes, and kernels loaded from them, once a device."""

from __future__ import annotations

import json
import lzma
import runpy
import threading
from functools import cache
from pathlib import Path
from typing import Any

import torch

from mvkernels.cuda.driver import Arguments, Driver, DriverError, driver
from mvkernels.dispatch.tracing import constant
from mvkernels.triton import configs

DATA = Path(__file__).parent / "data"
COMPILER = Path(__file__).parents[2] / "csrc" / "cuda" / "compile.py"
"""Of a checkout."""
_ALLOWED_ALWAYS = 48 << 10
_lock = threading.Lock()
_thread = threading.local()
_loaded: dict[tuple[int, str], int] = {}
_allowed: dict[int, int] = {}
"""Of a function, the most dynamic shared memory that a launch has asked for."""


@cache
def manifest() -> dict[str, Any]:
    """What csrc/cuda/compile.py says of the data: ``cuda``, ``nvcc``, ``state``, ``files``. Empty if there is none."""
    try:
        found = json.loads((DATA / "manifest.json").read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _enter(calls: Driver, device: int) -> None:
    # A thread that has only allocated from what torch keeps may have no context yet.
    if not getattr(_thread, "entered", False):
        calls.enter(device)
        _thread.entered = True


@cache
def why_not_compiled() -> str | None:
    """Why there are no kernels to load, or None."""
    if not manifest():
        return "the CUDA kernels are not compiled: there was no nvcc at the build, or it failed (`make cuda` says why)"
    if COMPILER.exists() and runpy.run_path(str(COMPILER))["state"]() != manifest()["state"]:
        # Their parameters may be others than those that the launches here pass.
        return "the CUDA kernels are not those of this checkout: run `make cuda`"
    return None


def target_of(major: int, minor: int) -> str:
    """The code for a compute capability: of its own architecture, or PTX that the driver compiles.

    >>> target_of(8, 9), target_of(9, 0), target_of(10, 3), target_of(12, 0)
    ('sm_80', 'sm_90a', 'sm_100', 'compute_80')
    """
    return {8: "sm_80", 9: "sm_90a", 10: "sm_100"}.get(major, "compute_80")


@constant  # files are read, which torch.compile cannot trace
def _why_not(index: int | None) -> str | None:
    return _why_not_on(index)


@cache
def _why_not_on(index: int | None) -> str | None:
    # Of a CUDA device: asked once.
    if torch.version.hip:
        return "the CUDA kernels run on NVIDIA GPUs"
    major, minor = torch.cuda.get_device_capability(index)
    if major < 8:
        return f"compute capability {major}.{minor}: want 8.0 or more"
    if reason := why_not_compiled():
        return reason
    found = driver()
    if isinstance(found, DriverError):
        return str(found)
    wanted, version = manifest()["cuda"], found.version()
    if version // 1000 < int(wanted.split(".")[0]):
        return f"the driver is one for CUDA {version // 1000}.{version % 1000 // 10}: the kernels want {wanted}"
    return None


@constant
def arch_of(index: int | None) -> str:
    """The architecture of a CUDA device, ``sm_90``."""
    return configs.device_of("cuda", index).arch


def why_not(map_: torch.Tensor) -> str | None:
    """Why no CUDA C++ kernel can run on a tensor's device, or None."""
    if map_.device.type != "cuda":
        return f"the CUDA kernels run on CUDA tensors, but these tensors are on {map_.device.type}"
    return _why_not(map_.device.index)


def _driver() -> Driver:
    found = driver()
    if isinstance(found, DriverError):
        raise found
    return found


def kernel(device: int, module: str, name: str, shared_bytes: int) -> int:
    """A kernel as the driver's function, loaded on a device and allowed so much dynamic shared memory.

    Safe while a stream is captured; raises DriverError.
    """
    calls = _driver()
    with _lock:
        _enter(calls, device)
        with calls.relaxed():
            if (device, module) not in _loaded:
                target = target_of(*torch.cuda.get_device_capability(device))
                packed = (DATA / f"{module.replace('/', '.')}.{target}.xz").read_bytes()
                _loaded[device, module] = calls.load(lzma.decompress(packed) + b"\0")
            function = calls.function(_loaded[device, module], name)
            if shared_bytes > _allowed.get(function, _ALLOWED_ALWAYS):
                calls.allow_shared(function, shared_bytes)
                _allowed[function] = shared_bytes
            return function


def launch(
    device: int, function: int, grid: int, threads: int, shared_bytes: int, stream: int, arguments: Arguments
) -> None:
    """Launch a kernel that :func:`kernel` has given for a device, the current one, on a stream of it."""
    calls = _driver()
    _enter(calls, device)
    calls.launch(function, grid, threads, shared_bytes, stream, arguments)
