"""The kernels in CUDA C++, compiled by nvcc to PTX once for each state of the sources, and executed on CPU tensors."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from unittest import mock

import torch

from mvkernels.cuda.launch import Launch
from tests.ptx import launches

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "csrc" / "cuda"
BUILT = ROOT / "build" / "cuda"
FLAGS = ("-ptx", "-arch=compute_80", "-lineinfo", "-std=c++17", "-I", str(SOURCES))


def has_nvcc() -> bool:
    """Whether the kernels can be compiled here."""
    return shutil.which("nvcc") is not None


@cache
def ptx_of(file: str) -> str:
    """PTX of a file of csrc/cuda, named without its ending."""
    state = hashlib.sha256(" ".join([file, *FLAGS]).encode())
    for each in sorted(SOURCES.rglob("*.cu*")):
        state.update(str(each.relative_to(SOURCES)).encode() + each.read_bytes())
    target = BUILT / f"{file.replace('/', '-')}-{state.hexdigest()[:16]}.ptx"
    if not target.exists():
        BUILT.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=BUILT) as place:
            made = Path(place, "made.ptx")
            subprocess.run(["nvcc", *FLAGS, "-o", str(made), str(SOURCES / f"{file}.cu")], check=True, env=os.environ)
            made.replace(target)  # at once: another process may do the same
    return target.read_text()


@contextmanager
def executed(
    arch: str = "sm_90", processors: int | None = None, tf32: bool = False
) -> Iterator[list[launches.Executed]]:
    """As :func:`tests.ptx.launches.executed`, with the kernels in CUDA C++ too."""
    memory = launches.Memory()
    with mock.patch.object(launches, "Memory", lambda: memory), launches.executed(arch, processors, tf32) as log:

        def launch(planned: Launch, tensors: Mapping[str, torch.Tensor], floats: Mapping[str, float]) -> None:
            arguments = (*(tensors[name] for name in planned.pointers), *planned.longs, *planned.ints)
            arguments += tuple(float(floats[name]) for name in planned.floats)
            ptx = ptx_of(planned.module)
            call = launches.Call(planned.kernel, ptx, planned.shared_bytes, planned.grid, arguments, by_nvcc=True)
            done = launches.execute(call, memory)
            assert done.threads == planned.threads
            log.append(done)

        with mock.patch.object(Launch, "__call__", launch):
            yield log
