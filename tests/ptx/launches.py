"""Runs the library's launches on the executor: CPU tensors, through the library's own planning and Triton's own
specialisation and compiler, or nvcc's.

    with launches.executed("sm_90") as log:
        mvkernels.patch_attention(q, k, v, patch_size=2, backend="triton")
    for each in log: print(each)
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import numpy as np
import torch
from triton.runtime import driver
from triton.runtime.errors import OutOfResources

from mvkernels.cuda import modules
from mvkernels.cuda.launch import Launch
from mvkernels.dispatch.registry import OPS
from mvkernels.triton import configs
from mvkernels.triton.repeated import RepeatedLaunch
from tests.devices import PRETENDED
from tests.ptx import machine, nvcc
from tests.ptx.loading import Driver, beginning, program_of, scalar


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
        self._told: set[int] = set()

    def allocated(self, tensor: torch.Tensor) -> None:
        """A tensor that torch.empty has just made: its elements are filled with NaN, integers with the least, and count
        as not defined."""
        storage = tensor.untyped_storage()
        if storage.nbytes() and tensor.dtype != torch.bool:
            tensor.fill_(float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).min)
            element = bytes_of(tensor).numpy()[: tensor.element_size()].copy()
            self._fresh[storage.data_ptr()] = weakref.ref(storage), element

    def is_fresh(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor's storage is one of torch.empty's."""
        known = self._fresh.get(tensor.untyped_storage().data_ptr())
        return known is not None and known[0]() is tensor.untyped_storage()

    def defined(self, tensor: torch.Tensor) -> np.ndarray[Any, Any]:
        """Of the storage's bytes, whether they are defined now."""
        size = tensor.untyped_storage().nbytes()
        found = np.zeros(size, np.uint8)
        machine.library().ptx_defined(self.trace_of(tensor).ctypes.data, found.ctypes.data, size)
        return found

    def define(self, tensor: torch.Tensor, defined: np.ndarray[Any, Any]) -> None:
        """Say it of a storage that no launch has seen."""
        storage = tensor.untyped_storage()
        trace = np.zeros(storage.nbytes() * machine.library().ptx_trace_bytes(), np.uint8)
        machine.library().ptx_define(trace.ctypes.data, defined.ctypes.data, storage.nbytes())
        self._traces[storage.data_ptr()] = weakref.ref(storage), trace
        self._told.add(storage.data_ptr())

    def trace_of(self, tensor: torch.Tensor) -> np.ndarray[Any, Any]:
        """Of the storage's bytes, ready for a launch."""
        storage = tensor.untyped_storage()
        begin, size = storage.data_ptr(), storage.nbytes()
        known = self._traces.get(begin)
        if known is None or known[0]() is not storage or len(known[1]) != size * machine.library().ptx_trace_bytes():
            known = weakref.ref(storage), np.zeros(size * machine.library().ptx_trace_bytes(), np.uint8)
            self._traces[begin] = known
        if begin in self._told:
            return known[1]
        defined = None
        if self.is_fresh(tensor):
            fresh = self._fresh[begin]
            # Whatever PyTorch has written since is defined, and what kernels have stored the trace knows.
            changed = (bytes_of(tensor).numpy().reshape(-1, len(fresh[1])) != fresh[1]).any(1)
            defined = np.repeat(changed, len(fresh[1]))
        machine.library().ptx_define(known[1].ctypes.data, None if defined is None else defined.ctypes.data, size)
        return known[1]


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """Of its storage, which the two share."""
    return torch.tensor([], dtype=torch.uint8).set_(tensor.untyped_storage())


def _region(index: int, tensor: torch.Tensor, memory: Memory, keep: list[Any]) -> tuple[machine.Region, int]:
    # What the tensor spans, and of that the bytes of its elements.
    itemsize, begin = tensor.element_size(), tensor.storage_offset() * tensor.element_size()
    span = (sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1) * itemsize
    span = span if tensor.numel() else 0
    base = beginning(index) + tensor.data_ptr() % 256
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


@dataclass(frozen=True)
class Call:
    """One launch, compiled, with its arguments."""

    kernel: str
    ptx: str
    shared_bytes: int
    blocks: int
    arguments: tuple[torch.Tensor | float | int, ...]
    """Those that are not constants of the compiled kernel."""
    cubin: bytes = b""
    """The machine code that goes with it, which is not what is executed."""
    by_nvcc: bool = False
    """Whether the PTX is nvcc's, of a file that may have other kernels too."""

    @classmethod
    def of(cls, repeated: RepeatedLaunch, tensors: Sequence[torch.Tensor], floats: Sequence[float]) -> Call:
        """Compile as Triton does for these arguments."""
        kernel = repeated.kernel
        given = [*tensors, *floats, *repeated.ints]
        compiled = kernel.warmup(*given, grid=(repeated.grid,), **repeated.meta, **repeated.options)
        most = configs.shared_memory_of(f"sm_{compiled.metadata.target.arch}")
        if compiled.metadata.shared > most:
            raise OutOfResources(compiled.metadata.shared, most, "shared memory")
        named = dict(zip(kernel.arg_names, given, strict=False)) | repeated.meta
        passed = tuple(named[name] for name, kind in compiled.src.signature.items() if kind != "constexpr")
        code = compiled.asm
        return cls(kernel.__name__, code["ptx"], compiled.metadata.shared, repeated.grid, passed, code["cubin"])

    @classmethod
    def by_nvcc_of(cls, launch: Launch, tensors: Mapping[str, torch.Tensor], floats: Mapping[str, float]) -> Call:
        """Of a kernel in CUDA C++."""
        most = configs.shared_memory_of(f"sm_{driver.active.get_current_device()}")
        if launch.shared_bytes > most:
            raise OutOfResources(launch.shared_bytes, most, "shared memory")
        pointers, numbers = [tensors[name] for name in launch.pointers], [float(floats[name]) for name in launch.floats]
        passed = (*pointers, *launch.longs, *launch.ints, *numbers)
        return cls(launch.kernel, nvcc.ptx_of(launch.module), launch.shared_bytes, launch.grid, passed, by_nvcc=True)


def execute(
    call: Call, memory: Memory, skewed: bool = False, limit: int = machine.LIMIT, effects: Any = None
) -> Executed:
    """Run a launch on what its tensors hold."""
    program = program_of(call.ptx, call.kernel if call.by_nvcc else "")
    regions: list[machine.Region] = []
    keep: list[Any] = []
    # After the kernel's own: pointers to scratch memory, which none of ours asks for.
    parameters = {name: 0 for name, _ in program.module.parameters}
    for value, (parameter, _) in zip(call.arguments, program.module.parameters, strict=False):
        if isinstance(value, torch.Tensor):
            region, parameters[parameter] = _region(len(regions), value, memory, keep)
            regions.append(region)
        else:
            parameters[parameter] = scalar(value)
    begin = time.perf_counter()
    counters, findings, memory.epoch = machine.run(
        program, call.blocks, parameters, regions, call.shared_bytes, memory.epoch, skewed, limit, effects
    )
    del keep
    taken = time.perf_counter() - begin
    return Executed(call.kernel, call.blocks, program.module.threads, counters, tuple(findings), taken)


@contextmanager
def allocations(memory: Memory) -> Iterator[None]:
    """Within: what torch.empty and its like make on the CPU counts as not defined."""

    def watched(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def made(*args: Any, **kwargs: Any) -> torch.Tensor:
            tensor = make(*args, **kwargs)
            if tensor.device.type == "cpu":
                memory.allocated(tensor)
            return tensor

        return made

    with ExitStack() as stack:
        for owner, names in ((torch, ("empty", "empty_like", "empty_strided")), (torch.Tensor, ("new_empty",))):
            for each in names:
                stack.enter_context(mock.patch.object(owner, each, watched(getattr(owner, each))))
        yield


@contextmanager
def executed(
    arch: str = "sm_90",
    processors: int | None = None,
    tf32: bool = False,
    skewed: bool = False,
    watch: Callable[[Call, Memory], None] = lambda *_: None,
) -> Iterator[list[Executed]]:
    """Within: launches on CPU tensors run as compiled for a GPU, here. The log grows with each.

    Args:
        arch: "sm_90" (as sm_90a) or "sm_80".
        processors: how many the device is said to have: what the size of a grid follows.
        tf32: whether products of float32 may round.
        skewed: whether approximate instructions are as wrong as they may be.
        watch: sees each launch before it runs.
    """
    device = PRETENDED[arch]
    device = replace(device, processors=processors or device.processors)
    memory, log = Memory(), list[Executed]()

    def launch(repeated: RepeatedLaunch, tensors: Sequence[torch.Tensor], floats: Sequence[float]) -> None:
        call = Call.of(repeated, tensors, floats)
        watch(call, memory)
        log.append(execute(call, memory, skewed))

    def launch_of_nvcc(kernel: Launch, tensors: Mapping[str, torch.Tensor], floats: Mapping[str, float]) -> None:
        call = Call.by_nvcc_of(kernel, tensors, floats)
        watch(call, memory)
        log.append(execute(call, memory, skewed))
        assert log[-1].threads == kernel.threads, "as many as the kernel's bounds say"

    with ExitStack() as stack:
        enter = stack.enter_context
        enter(allocations(memory))
        enter(mock.patch.object(configs, "device_of", lambda *_: device))
        enter(mock.patch.object(configs, "tf32_allowed", lambda *_: tf32))
        for op in OPS.values():
            if "triton" in op.why_not:
                enter(mock.patch.dict(op.why_not, {"triton": lambda *_, **__: None}))
        enter(mock.patch.object(RepeatedLaunch, "__call__", launch))
        enter(mock.patch.object(modules, "why_not", lambda *_: nvcc.why_not() or None))
        enter(mock.patch.object(Launch, "__call__", launch_of_nvcc))
        enter(mock.patch.object(driver, "_active", Driver(arch)))
        yield log
