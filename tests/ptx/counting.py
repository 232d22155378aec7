"""Executes some blocks of a launch to count what they do: no checks, no traces, tensors of any size.

Nothing here knows of the library: what is launched are PTX, a grid and arguments.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from tests.ptx import machine
from tests.ptx.module import parse
from tests.ptx.program import Program, encode

FROM_REGION = 1 << 30


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


@lru_cache(maxsize=256)
def program_of(ptx: str, kernel: str) -> Program:
    """A kernel's program; ``kernel`` is "" for a file that has one only."""
    program = encode(parse(ptx, kernel))
    if unknown := machine.unknown(program):
        raise RuntimeError(f"the executor has no {', '.join(unknown)}")
    return program


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
            begin = int(len(regions) + 1 << machine.library().ptx_region_bits()) + FROM_REGION
            parameters[parameter] = begin + value.data_ptr() % 256
            span = sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True)) + 1
            span = span * value.element_size() if value.numel() else 0
            regions.append(machine.Region(parameters[parameter], span, value.data_ptr() if span else None, None, None))
        elif isinstance(value, float):
            parameters[parameter] = struct.unpack("<I", struct.pack("<f", value))[0]
        else:
            parameters[parameter] = int(value)
    sample = machine.Sample(blocks, cache_bytes)
    counters, findings, _ = machine.run(program, 0, parameters, regions, shared_bytes, 1, sample=sample)
    if findings:
        raise RuntimeError(str(findings[0]))
    return Counted(program, len(blocks), counters, sample.executed, sample.traffic)
