"""A Triton kernel that is launched again and again with the same ints, constants and options.

Triton's own path looks at every argument at every launch, to find the compiled kernel: with fifty arguments that
takes several times what the launch itself takes. Here only what can change from one launch to the next is looked at:
the device, the tensors' dtypes and whether they begin at a multiple of 16 bytes, the types of the floats, and what
Triton's path takes from the kernel and from ``triton.knobs`` at each launch. The first launch of a kind goes through
Triton's path, which compiles, and the compiled kernel is kept; later ones give it their arguments in the way that
Triton's path ends with.

That end is Triton's own affair and differs between versions and backends, so this is done only for CUDA and for the
versions that it was written for. All else takes Triton's path at each launch: other versions and backends, the
interpreter, launches while hooks are set (a profiler sets them), a kernel one of whose global values has changed.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
import triton
from triton.runtime import driver


def _cuda_launcher() -> Any:
    # The class whose objects launch compiled kernels; None where they want arguments that we do not know.
    major, minor = map(int, re.findall(r"\d+", triton.__version__)[:2])
    if not (3, 4) <= (major, minor) <= (3, 6):
        return None
    try:
        from triton.backends.nvidia.driver import CudaLauncher
    except ImportError:
        return None
    return CudaLauncher


_CUDA_LAUNCHER = _cuda_launcher()
if _CUDA_LAUNCHER is not None:
    from triton import knobs


OPTIONS = {"enable_fp_fusion": True}
"""Of every kernel: float32 sums of products take an instruction each, also where Triton's default is two,
as triton-lang/triton, pull request 11270, proposes."""


class _Kept(NamedTuple):
    # A compiled kernel that has been launched, so that it is loaded on its device.
    run: Any
    function: int
    packed_metadata: Any
    constants: tuple[Any, ...]
    """What follows tensors and floats."""
    device_cache: Any
    """Where Triton's path found it. Whoever wants it compiled again empties ``kernel.device_caches``."""
    global_values: tuple[tuple[dict[str, Any], str, Any], ...]


def _hooks_are_set() -> bool:
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    # Since Triton 3.5 a chain of hooks that may be empty, before that a hook or None.
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


class RepeatedLaunch:
    """``kernel[(grid,)](*tensors, *floats, *ints, **meta, **options)`` for changing tensors and floats."""

    def __init__(self, kernel: Any, grid: int, ints: tuple[int, ...], meta: dict[str, Any], options: dict[str, int]):
        self.kernel, self.grid, self.ints, self.meta = kernel, grid, ints, meta
        self.options = OPTIONS | options
        self._keeps = _CUDA_LAUNCHER is not None and type(kernel) is triton.JITFunction
        self._kept: dict[Hashable, _Kept] = {}

    def __call__(self, tensors: Sequence[torch.Tensor], floats: Sequence[float]) -> None:
        """Launch on the current stream of the current device."""
        if not self._keeps:
            self._by_triton(tensors, floats)
            return
        device = driver.active.get_current_device()
        kept = self._kept.get(self._kind(device, tensors, floats))
        if kept is None or not self._holds(kept, device):
            compiled = self._by_triton(tensors, floats)
            # Asked anew: compiling is what gives a kernel its hash.
            self._keep(self._kind(device, tensors, floats), device, compiled, floats)
            return
        # Grid, stream, function, packed metadata, metadata and hooks, and every argument, constants too.
        kept.run(
            self.grid, 1, 1, driver.active.get_current_stream(device), kept.function, kept.packed_metadata,
            None, None, None, *tensors, *floats, *kept.constants,
        )  # fmt: skip

    def _by_triton(self, tensors: Sequence[torch.Tensor], floats: Sequence[float]) -> Any:
        return self.kernel[(self.grid,)](*tensors, *floats, *self.ints, **self.meta, **self.options)

    def _kind(self, device: int, tensors: Sequence[torch.Tensor], floats: Sequence[float]) -> Hashable:
        # All that the choice of the compiled kernel depends on, but for what is fixed in this object.
        return (
            device,
            driver.active,
            self.kernel.hash,
            self.kernel.debug,
            knobs.runtime.debug,
            getattr(knobs.compilation, "instrumentation_mode", None),
            *[type(value) for value in floats],
            *[tensor.dtype for tensor in tensors],
            *[tensor.data_ptr() % 16 == 0 for tensor in tensors],
        )

    def _holds(self, kept: _Kept, device: int) -> bool:
        kernel = self.kernel
        if kernel.pre_run_hooks or _hooks_are_set() or kernel.device_caches.get(device) is not kept.device_cache:
            return False
        for values, name, value in kept.global_values:  # noqa: SIM110 (all() costs a generator)
            if values.get(name) is not value:
                return False
        return True

    def _keep(self, kind: Hashable, device: int, compiled: Any, floats: Sequence[float]) -> None:
        kernel = self.kernel
        # A hook may have kept Triton from compiling; an int in a float's place may have become a constant.
        if compiled is None or kernel.hash is None or any(type(value) is not float for value in floats):
            return
        if type(compiled.run) is not _CUDA_LAUNCHER:
            return
        positional = len(kernel.arg_names) - len(self.meta)
        by_name = kernel.arg_names[positional:]
        if set(by_name) != set(self.meta):  # a default value: not worth its own case
            return
        used = [(values, name) for (name, _), (_, values) in kernel.used_global_vals.items()]
        self._kept[kind] = _Kept(
            compiled.run,
            compiled.function,
            compiled.packed_metadata,
            (*self.ints, *(self.meta[name] for name in by_name)),
            kernel.device_caches.get(device),
            tuple((values, name, values.get(name)) for values, name in used),
        )
