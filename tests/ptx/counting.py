"""Executes some blocks of a launch to count what they do: no checks, no traces, tensors of any size.

Nothing here knows of the library: what is launched are PTX, a grid and arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tests.ptx import machine
from tests.ptx.loading import beginning, program_of, scalar
from tests.ptx.program import Program


@dataclass(frozen=True)
class Counted:
    """What the blocks of a sample did, in all of them."""

    program: Program
    blocks: int
    counters: machine.Counters
    executed: np.ndarray[Any, Any]
    """Of each instruction, by how many warps."""
    traffic: np.ndarray[Any, Any]
    """Of each tensor: sectors loaded, loaded and not in the first-level cache, stored; its passes."""


def sample_of(blocks: int, most: int) -> list[int]:
    """Blocks of a grid that stand for all: the first, the last, and between them in steps that are no power of two."""
    if blocks <= most:
        return list(range(blocks))
    return sorted({round(i * (blocks - 1) / (most - 1)) for i in range(most)})


def count(
    ptx: str, kernel: str, arguments: Sequence[torch.Tensor | float | int], shared_bytes: int, blocks: Sequence[int],
    cache_bytes: int,
) -> Counted:  # fmt: skip
    """Execute these blocks of a launch on what its tensors hold."""
    program = program_of(ptx, kernel)
    regions: list[machine.Region] = []
    parameters = {name: 0 for name, _ in program.module.parameters}
    for value, (parameter, _) in zip(arguments, program.module.parameters, strict=False):
        if isinstance(value, torch.Tensor):
            parameters[parameter] = beginning(len(regions)) + value.data_ptr() % 256
            span = sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True)) + 1
            span = span * value.element_size() if value.numel() else 0
            regions.append(machine.Region(parameters[parameter], span, value.data_ptr() if span else None, None, None))
        else:
            parameters[parameter] = scalar(value)
    sample = machine.Sample(blocks, cache_bytes)
    counters, findings, _ = machine.run(program, 0, parameters, regions, shared_bytes, 1, sample=sample)
    if findings:
        raise RuntimeError(str(findings[0]))
    return Counted(program, len(blocks), counters, sample.executed, sample.traffic)
