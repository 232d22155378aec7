"""``mvkernels info``: what is installed, which backends can run, and why the others cannot."""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mvkernels import report
from mvkernels.cuda import modules
from mvkernels.cuda.driver import DriverError, driver
from mvkernels.dispatch import extension
from mvkernels.dispatch.backend import BACKENDS, can_run
from mvkernels.dispatch.registry import OPS
from mvkernels.version import __version__

PACKAGE = Path(__file__).parents[1]
VARIABLES = (
    "MVKERNELS_BACKEND",
    "MVKERNELS_CPU_ISA",
    "MVKERNELS_SKIP_EXT",
    "MVKERNELS_REQUIRE_EXT",
    "MVKERNELS_SKIP_CUDA",
    "MVKERNELS_SKIP_EXECUTORCH",
    "MVKERNELS_REQUIRE_CUDA",
    "MVKERNELS_CXXFLAGS",
    "MVKERNELS_BUILD_ISAS",
    "MVKERNELS_TEST_DEVICE",
    "MVKERNELS_TEST_TF32",
    "MVKERNELS_TEST_EXAMPLES",
    "MVKERNELS_RESULTS",
    "MVKERNELS_COMMIT",
    "MAX_JOBS",
    "NVCC",
    "CUDA_HOME",
    "CUDA_PATH",
    "TRITON_INTERPRET",
    "OMP_NUM_THREADS",
    "MALLOC_MMAP_MAX_",
    "MALLOC_TRIM_THRESHOLD_",
)


def command(options: argparse.Namespace, json: Callable[[Any], None] | None) -> int:
    """Always 0."""
    found = collect()
    json(found) if json is not None else print(text(found))
    return 0


def collect() -> dict[str, Any]:
    """Everything that ``info`` prints, as a dictionary."""
    return {
        "mvkernels": __version__,
        "commit": report.commit(),
        "location": str(PACKAGE),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "triton": _triton(),
        "devices": devices(),
        "threads": torch.get_num_threads(),
        "extension": _extension(),
        "cuda_kernels": _cuda_kernels(),
        "ops": {name: {device: _backends(name, device) for device in devices()} for name in OPS},
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "configs": sorted(path.name for path in (PACKAGE / "configs").glob("*.json")),
    }


def devices() -> dict[str, str]:
    """The devices of this machine: torch's name of each, and a description."""
    capability = torch.backends.cpu.get_cpu_capability()
    found = {"cpu": f"{report.cpu_name()} ({capability}, {os.cpu_count()} logical processors)"}
    if torch.cuda.is_available():
        found.update({f"cuda:{i}": torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())})
    if torch.backends.mps.is_available():
        found["mps"] = "Apple GPU"
    if hasattr(torch, "xpu") and torch.xpu.is_available():
        found.update({f"xpu:{i}": torch.xpu.get_device_name(i) for i in range(torch.xpu.device_count())})
    return found


def _extension() -> dict[str, Any]:
    if extension.module is None:
        return {"available": False, "reason": extension.reason}
    return {"available": True, "instruction_set": extension.instruction_set(), **extension.build_info()}


def _cuda_kernels() -> dict[str, Any]:
    if reason := modules.why_not_compiled():
        return {"available": False, "reason": reason}
    manifest, found = modules.manifest(), driver()
    reached = str(found) if isinstance(found, DriverError) else "found"
    sizes = manifest["files"].values()
    return {"available": True, "nvcc": manifest["nvcc"], "files": len(sizes), "bytes": sum(sizes), "driver": reached}


def _triton() -> str:
    try:
        import triton
    except Exception as error:  # a broken Triton is worth a line here, not a traceback
        return f"cannot be imported: {' '.join(str(error).split())}"
    return str(triton.__version__)


def _backends(op: str, device: str) -> dict[str, dict[str, Any]]:
    arguments = OPS[op].suite("small")[0].make(device=device)
    answers = {backend: can_run(op, backend, **arguments) for backend in BACKENDS}
    return {backend: {"available": able, "reason": reason} for backend, (able, reason) in answers.items()}


def text(found: dict[str, Any]) -> str:
    """The result of :func:`collect` as text."""
    lines = [
        f"mvkernels {found['mvkernels']} {found['commit']}".rstrip() + f" at {found['location']}",
        f"torch {found['torch']}, triton {found['triton']}, Python {found['python']}",
        found["platform"],
    ]
    lines += [f"{name}: {what}" for name, what in found["devices"].items()]
    lines.append(f"threads: {found['threads']}")
    built = found["extension"]
    if built["available"]:
        lines.append(f"C++ extension: running {built['instruction_set']} kernels")
        lines += [f"  {k}: {v}" for k, v in built.items() if k not in {"available", "instruction_set"}]
    else:
        lines.append(f"C++ extension: not available: {built['reason']}")
    kernels = found["cuda_kernels"]
    if kernels["available"]:
        size = f"{kernels['files']} files, {kernels['bytes'] / 2**20:.2f} MiB"
        lines.append(f"CUDA kernels: {size}, compiled by nvcc {kernels['nvcc']}; driver: {kernels['driver']}")
    else:
        lines.append(f"CUDA kernels: not available: {kernels['reason']}")
    rows = [
        (op, device, backend, "yes" if answer["available"] else "no", answer["reason"])
        for op, by_device in found["ops"].items()
        for device, answers in by_device.items()
        for backend, answer in answers.items()
    ]
    lines += ["", report.table(rows, ("op", "device", "backend", "runs", "why not")), ""]
    lines.append("environment:" if found["environment"] else "environment: no variable of mvkernels is set")
    lines += [f"  {name}={value}" for name, value in found["environment"].items()]
    lines.append(f"launch configurations: {', '.join(found['configs']) or 'none, heuristics are used'}")
    return "\n".join(lines)
