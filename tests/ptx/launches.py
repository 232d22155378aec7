"""Runs the library's Triton launches on the executor: CPU tensors, through the library's own planning and Triton's own
specialisation and compiler.

    with launches.executed("sm_90") as log:
        mvkernels.patch_attention(q, k, v, patch_size=2, backend="triton")
    for each in log: print(each)
"""

from __future__ import annotations

import ctypes
import struct
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from mvkernels.dispatch.registry import OPS
from mvkernels.triton import configs
from mvkernels.triton.repeated import RepeatedLaunch
from tests.ptx import machine
from tests.ptx.module import parse
from tests.ptx.program import Program, encode

DEVICES = {"sm_90": ("NVIDIA H100 80GB HBM3", 132), "sm_80": ("NVIDIA A100-SXM4-80GB", 108)}
REGION_BITS = 40
FROM_REGION = 1 << 30
"""How far from the beginning of its region a tensor lies, so that what is read before it is out of bounds too."""


class Driver:
    """What Triton asks of a driver in order to compile: no device, nothing is loaded or launched."""

    def __init__(self, arch: str) -> None:
        self.target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        # By which a kernel keeps what it has compiled.
        return int(self.target.arch)

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_capability(self, device: int = 0) -> tuple[int, int]:
        return divmod(self.target.arch, 10)


@dataclass(frozen=True)
class Executed:
    """One launch."""

    kernel: str
    blocks: int
    threads: int
    counters: machine.Counters
    findings: tuple[machine.Finding, ...]
    seconds: float

    def __str__(self) -> str:
        return f"{self.kernel}, {self.blocks} blocks, {self.seconds:.1f} s" + "".join(f"\n  {x}" for x in self.findings)


class Memory:
    """What the executor knows of the storages that launches have used: of each byte, what was done to it."""

    def __init__(self) -> None:
        self.epoch = 1
        self._traces: dict[int, tuple[weakref.ref[Any], np.ndarray[Any, Any]]] = {}
        self._fresh: dict[int, tuple[weakref.ref[Any], np.ndarray[Any, Any]]] = {}

    def allocated(self, tensor: torch.Tensor) -> None:
        """A tensor that torch.empty has just made: its elements are filled with NaN, and count as not defined."""
        storage = tensor.untyped_storage()
        if storage.nbytes() and tensor.is_floating_point():
            tensor.fill_(float("nan"))
            element = _bytes_of(tensor)[: tensor.element_size()].copy()
            self._fresh[storage.data_ptr()] = weakref.ref(storage), element

    def trace_of(self, tensor: torch.Tensor) -> np.ndarray[Any, Any]:
        """Of the storage's bytes, ready for a launch."""
        storage = tensor.untyped_storage()
        begin, size = storage.data_ptr(), storage.nbytes()
        known = self._traces.get(begin)
        if known is None or known[0]() is not storage or len(known[1]) != size * machine.library().ptx_trace_bytes():
            known = weakref.ref(storage), np.zeros(size * machine.library().ptx_trace_bytes(), np.uint8)
            self._traces[begin] = known
        fresh = self._fresh.get(begin)
        defined = None
        if fresh is not None and fresh[0]() is storage:
            # Whatever PyTorch has written since is defined, and what kernels have stored the trace knows.
            changed = (_bytes_of(tensor).reshape(-1, len(fresh[1])) != fresh[1]).any(1)
            defined = np.repeat(changed, len(fresh[1]))
        machine.library().ptx_define(known[1].ctypes.data, None if defined is None else defined.ctypes.data, size)
        return known[1]


def _bytes_of(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    storage = tensor.untyped_storage()
    return np.frombuffer((ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr()), np.uint8)


def _region(index: int, tensor: torch.Tensor, memory: Memory, keep: list[Any]) -> tuple[machine.Region, int]:
    # What the tensor spans, and of that the bytes of its elements.
    itemsize, begin = tensor.element_size(), tensor.storage_offset() * tensor.element_size()
    span = (sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1) * itemsize
    span = span if tensor.numel() else 0
    base = (index + 1 << REGION_BITS) + FROM_REGION + tensor.data_ptr() % 256
    if span == 0:
        return machine.Region(base, 0, None, None, None), base
    allowed = None
    if span != tensor.numel() * itemsize:
        allowed = np.zeros(span // itemsize, bool)
        np.lib.stride_tricks.as_strided(allowed, tensor.shape, tensor.stride())[...] = True
        allowed = np.repeat(allowed, itemsize)
    trace = memory.trace_of(tensor)
    keep += [allowed, trace]
    at = trace.ctypes.data + begin * machine.library().ptx_trace_bytes()
    return machine.Region(base, span, tensor.data_ptr(), None if allowed is None else allowed.ctypes.data, at), base


@lru_cache(maxsize=None)
def program_of(ptx: str) -> Program:
    """A kernel's program."""
    program = encode(parse(ptx))
    if unknown := machine.unknown(program):
        raise RuntimeError(f"the executor has no {', '.join(unknown)}")
    return program


class Executor:
    """Takes the place of a launch on a device."""

    def __init__(self, skewed: bool = False, changed: Callable[[str, str], str] | None = None) -> None:
        self.memory = Memory()
        self.log: list[Executed] = []
        self.skewed = skewed
        self.changed = changed

    def launch(self, repeated: RepeatedLaunch, tensors: Sequence[torch.Tensor], floats: Sequence[float]) -> None:
        """Compile as Triton does for these arguments, and execute."""
        kernel = repeated.kernel
        compiled = kernel.warmup(
            *tensors, *floats, *repeated.ints, grid=(repeated.grid,), **repeated.meta, **repeated.options
        )
        ptx = compiled.asm["ptx"]
        if self.changed:
            ptx = self.changed(kernel.__name__, ptx)
        self.execute(kernel, compiled, ptx, repeated, tensors, floats)

    def execute(
        self,
        kernel: Any,
        compiled: Any,
        ptx: str,
        repeated: RepeatedLaunch,
        tensors: Sequence[torch.Tensor],
        floats: Sequence[float],
    ) -> None:
        program = program_of(ptx)
        given = dict(zip(kernel.arg_names, [*tensors, *floats, *repeated.ints], strict=False)) | repeated.meta
        passed = [name for name, kind in compiled.src.signature.items() if kind != "constexpr"]
        regions: list[machine.Region] = []
        keep: list[Any] = []
        # After the kernel's own: pointers to scratch memory, which none of ours asks for.
        parameters = {name: 0 for name, _ in program.module.parameters}
        for name, (parameter, _) in zip(passed, program.module.parameters, strict=False):
            value = given[name]
            if isinstance(value, torch.Tensor):
                region, parameters[parameter] = _region(len(regions), value, self.memory, keep)
                regions.append(region)
            elif isinstance(value, float):
                parameters[parameter] = struct.unpack("<I", struct.pack("<f", value))[0]
            else:
                parameters[parameter] = int(value)
        begin = time.perf_counter()
        counters, findings, self.memory.epoch = machine.run(
            program, repeated.grid, parameters, regions, compiled.metadata.shared, self.memory.epoch, self.skewed
        )
        del keep
        taken = time.perf_counter() - begin
        threads = program.module.threads
        self.log.append(Executed(kernel.__name__, repeated.grid, threads, counters, tuple(findings), taken))


@contextmanager
def executed(
    arch: str = "sm_90",
    processors: int | None = None,
    skewed: bool = False,
    changed: Callable[[str, str], str] | None = None,
) -> Iterator[list[Executed]]:
    """Within: Triton launches on CPU tensors run as compiled for a GPU, here. The log grows with each.

    Args:
        arch: "sm_90" (as sm_90a) or "sm_80".
        processors: how many the device is said to have: what the size of a grid follows.
        skewed: whether approximate instructions are as wrong as they may be.
        changed: function of a kernel's name and PTX that gives the PTX to execute, to plant faults.
    """
    name, usual = DEVICES[arch]
    device = configs.Device(name, arch, processors or usual)
    executor = Executor(skewed, changed)

    def watched(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def made(*args: Any, **kwargs: Any) -> torch.Tensor:
            tensor = make(*args, **kwargs)
            if tensor.device.type == "cpu":
                executor.memory.allocated(tensor)
            return tensor

        return made

    with ExitStack() as stack:
        enter = stack.enter_context
        for owner, names in ((torch, ("empty", "empty_like", "empty_strided")), (torch.Tensor, ("new_empty",))):
            for each in names:
                enter(mock.patch.object(owner, each, watched(getattr(owner, each))))
        enter(mock.patch.object(configs, "device_of", lambda *_: device))
        for op in OPS.values():
            enter(mock.patch.dict(op.why_not, {"triton": lambda *_, **__: None}))
        enter(mock.patch.object(RepeatedLaunch, "__call__", lambda self, *of: executor.launch(self, *of)))
        enter(mock.patch.object(driver, "_active", Driver(arch)))
        yield executor.log
