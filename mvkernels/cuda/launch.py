"""Launches of CUDA C++ kernels: planned from a :class:`~mvkernels.triton.problem.Problem`, kept, and run with each
call's tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch


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

    def __call__(self, tensors: Mapping[str, torch.Tensor], floats: Mapping[str, float]) -> None:
        """Launch on the current stream of the current device."""
        raise NotImplementedError
