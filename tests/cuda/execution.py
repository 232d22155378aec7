"""Runs launches of CUDA C++ kernels on the executor of tests/ptx: CPU tensors, nvcc's PTX.

with execution.executed() as log:
    out = launcher.forward("patch_attention", q, k, v, (2, 2), None, None, scale)
for each in log: print(each)
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from unittest import mock

import torch

from mvkernels.cuda.launch import Launch
from mvkernels.triton import configs
from tests.devices import PRETENDED
from tests.ptx import launches

SOURCES = Path(__file__).parents[2] / "csrc" / "cuda"
BUILT = Path(__file__).parents[2] / "build" / "cuda"
NVCC = shutil.which("nvcc")
FLAGS = ("-ptx", "-arch=compute_80", "-lineinfo", "-std=c++17")


@cache
def ptx_of(module: str) -> str:
    """What nvcc makes of csrc/cuda/<module>.cu: compiled once for each state of the sources."""
    assert NVCC is not None
    version = subprocess.run([NVCC, "--version"], capture_output=True, check=True).stdout
    state = hashlib.sha256(version + " ".join((module, *FLAGS)).encode())
    for each in sorted((*SOURCES.rglob("*.cuh"), SOURCES / f"{module}.cu")):
        state.update(each.read_bytes())
    target = BUILT / f"{module.replace('/', '-')}-{state.hexdigest()[:16]}.ptx"
    if not target.exists():
        BUILT.mkdir(parents=True, exist_ok=True)
        made = target.with_suffix(f".{os.getpid()}")
        line = [NVCC, *FLAGS, "-I", str(SOURCES), "-o", str(made), str(SOURCES / f"{module}.cu")]
        done = subprocess.run(line, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr)
        made.replace(target)  # at once: another process may do the same
    return target.read_text()


@contextmanager
def executed(
    arch: str = "sm_90", tf32: bool = False, skewed: bool = False, processors: int | None = None
) -> Iterator[list[launches.Executed]]:
    """Within: CUDA launches on CPU tensors run as compiled for compute_80, here. The log grows with each."""
    memory, log = launches.Memory(), list[launches.Executed]()

    def launch(self: Launch, tensors: Mapping[str, torch.Tensor], floats: Mapping[str, float]) -> None:
        pointers = (tensors[name] for name in self.pointers)
        arguments = (*pointers, *self.longs, *self.ints, *(float(floats[name]) for name in self.floats))
        call = launches.Call(self.kernel, ptx_of(self.module), self.shared_bytes, self.grid, arguments, by_nvcc=True)
        log.append(launches.execute(call, memory, skewed))
        assert log[-1].threads == self.threads

    device = PRETENDED[arch]
    with ExitStack() as stack:
        enter = stack.enter_context
        enter(launches.allocations(memory))
        enter(mock.patch.object(configs, "device_of", lambda *_: device))
        enter(mock.patch.object(configs, "tf32_allowed", lambda *_: tf32))
        enter(mock.patch.object(Launch, "__call__", launch))
        yield log
