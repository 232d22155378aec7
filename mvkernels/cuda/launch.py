"""Launches of CUDA C++ kernels: planned from a :class:`~mvkernels.triton.problem.Problem`, kept, and run with each
call's tensors."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from mvkernels.cuda import modules
from mvkernels.cuda.driver import Arguments
from mvkernels.triton import configs

_RESERVED = 1 << 10  # bytes of shared memory, beside those that a block asks for


@dataclass(frozen=True)
class Launch:
    """One kernel launch without its tensors. A kernel's arguments go: pointers, 64-bit ints, 32-bit ints, floats."""

    module: str
    """The file of csrc/cuda, without its ending: ``attention/forward``."""
    kernel: str
    grid: int
    threads: int
    """Of a block: what the kernel's __launch_bounds__ say."""
    shared_bytes: int
    """Dynamic, of a block."""
    pointers: tuple[str, ...]
    longs: tuple[int, ...]
    ints: tuple[int, ...]
    floats: tuple[str, ...]
    _layout: struct.Struct = field(init=False, repr=False, compare=False)
    _loaded: dict[int, int] = field(init=False, repr=False, compare=False, default_factory=dict)
    """The driver's function by device."""

    def __post_init__(self) -> None:
        # Eight bytes each, then four: every parameter lies where its own alignment puts it, without gaps.
        sizes = len(self.pointers), len(self.longs), len(self.ints), len(self.floats)
        object.__setattr__(self, "_layout", struct.Struct("<{}Q{}q{}i{}f".format(*sizes)))

    def __call__(self, tensors: Mapping[str, torch.Tensor], floats: Mapping[str, float]) -> None:
        """Launch on the current stream of the current device."""
        device = torch.cuda.current_device()
        function = self._loaded.get(device)
        if function is None:
            function = self._loaded[device] = modules.kernel(device, self.module, self.kernel, self.shared_bytes)
        pointers = [tensors[name].data_ptr() for name in self.pointers]
        values = [floats[name] for name in self.floats]
        arguments = Arguments.of(self._layout.pack(*pointers, *self.longs, *self.ints, *values))
        stream = torch._C._cuda_getCurrentRawStream(device)
        modules.launch(device, function, self.grid, self.threads, self.shared_bytes, stream, arguments)


def fitting(arch: str, shared_bytes: int) -> int:
    """Blocks with so much shared memory each that a processor has room for."""
    return (configs.shared_memory_of(arch) + _RESERVED) // (shared_bytes + _RESERVED)
