"""Launches as the model takes them, and how a call's launches are had without a GPU."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from tests.ptx.loading import Driver


@dataclass(frozen=True)
class Launch:
    """A kernel's launch, compiled, with its arguments: all that the model wants to know."""

    kernel: str
    ptx: str
    cubin: bytes
    grid: int
    threads: int
    shared_bytes: int
    """Of a block, static and dynamic."""
    arguments: Sequence[torch.Tensor | float | int]
    """In the order of the kernel's parameters."""
    alone: bool = True
    """Whether the PTX has this kernel only."""


def compiled(kernel: JITFunction[Any], arguments: Sequence[Any], grid: Any, options: dict[str, Any]) -> Launch:
    """A Triton kernel's launch, compiled as Triton does for these arguments."""
    found = _RUN(kernel, *arguments, grid=grid, warmup=True, **options)
    named = dict(zip(kernel.arg_names, arguments)) | options
    passed = [named[name] for name, kind in found.src.signature.items() if kind != "constexpr"]
    metadata, code = found.metadata, found.asm
    blocks = 1
    for n in grid(named) if callable(grid) else grid:
        blocks *= n
    return Launch(metadata.name, code["ptx"], code["cubin"], blocks, 32 * metadata.num_warps, metadata.shared, passed)


_RUN = JITFunction.run
SOURCES = Path(__file__).parents[2] / "csrc" / "cuda"
BUILT = Path(__file__).parents[2] / "build" / "model"


@cache
def by_nvcc(source: Path, arch: str) -> tuple[str, bytes]:
    """PTX and machine code of a file in CUDA C++: compiled once for each state of the sources."""
    compiler = shutil.which("nvcc")
    if compiler is None:
        raise RuntimeError("CUDA C++ kernels: there is no nvcc")
    state = hashlib.sha256(arch.encode())
    for each in sorted((*SOURCES.rglob("*.cuh"), source)):
        state.update(each.read_bytes())
    ptx, cubin = (BUILT / f"{source.stem}-{state.hexdigest()[:16]}.{kind}" for kind in ("ptx", "cubin"))
    if not cubin.exists():
        BUILT.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=BUILT) as folder:
            made = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
            same = [compiler, "-lineinfo", f"-arch={arch}"]
            code = [*same, "-std=c++17", "-I", str(SOURCES), "-ptx", "-o", str(made[0]), str(source)]
            for line in (code, [*same, "-cubin", "-o", str(made[1]), str(made[0])]):
                done = subprocess.run(line, capture_output=True, text=True, check=False)
                if done.returncode:
                    raise RuntimeError(done.stderr)
            made[0].replace(ptx)  # at once: another process may do the same
            made[1].replace(cubin)
    return ptx.read_text(), cubin.read_bytes()


def of_cuda(launch: Any, tensors: Mapping[str, torch.Tensor], floats: Mapping[str, float], arch: str) -> Launch:
    """A launch of CUDA C++ (mvkernels/cuda/launch.py) with a call's tensors."""
    ptx, cubin = by_nvcc(SOURCES / f"{launch.module}.cu", arch)
    pointers = [tensors[name] for name in launch.pointers]
    arguments = [*pointers, *launch.longs, *launch.ints, *(float(floats[name]) for name in launch.floats)]
    return Launch(
        launch.kernel, ptx, cubin, launch.grid, launch.threads, launch.shared_bytes, arguments, alone=False
    )  # fmt: skip


@contextmanager
def watched(arch: str, device: Any, ops: Sequence[Any], watch: Callable[[Launch], None], module: Any) -> Iterator[None]:
    """Within: launches on CPU tensors are compiled for a GPU and given to ``watch``; nothing is computed.

    Args:
        arch: "sm_90" or "sm_80".
        device: what the library is told that it runs on.
        ops: whose kernels are allowed on CPU tensors: Triton's all, those in CUDA C++ where shapes allow it.
        watch: sees each launch, in order.
        module: the library's, that has ``device_of``.
    """

    def run(kernel: JITFunction[Any], *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        watch(compiled(kernel, arguments, grid, options))

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(module, "device_of", lambda *_: device))
        if hasattr(module, "tf32_allowed"):
            stack.enter_context(mock.patch.object(module, "tf32_allowed", lambda *_: False))
        for op in ops:
            if "triton" in op.why_not:
                stack.enter_context(mock.patch.dict(op.why_not, {"triton": lambda *_, **__: None}))
        with suppress(ImportError):
            from mvkernels.cuda import modules
            from mvkernels.cuda.launch import Launch as Cuda

            def launch(cuda: Any, tensors: Mapping[str, torch.Tensor], floats: Mapping[str, float]) -> None:
                watch(of_cuda(cuda, tensors, floats, arch))

            stack.enter_context(mock.patch.object(Cuda, "__call__", launch))
            why_not = None if shutil.which("nvcc") else "there is no nvcc"
            stack.enter_context(mock.patch.object(modules, "why_not", lambda *_: why_not))
        stack.enter_context(mock.patch.object(JITFunction, "run", run))
        stack.enter_context(mock.patch.object(driver, "_active", Driver(arch)))
        yield
