"""The time of a warp that has a processor for itself: its instructions in order, each when what it waits for is there.

Fixed latencies the compiler has written into the code, as stalls. Those of instructions that set a scoreboard are here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from _model.counts import Executions
from _model.sass import NO_SCOREBOARD, Instruction

# Cycles on an H100 (Luo et al., "Benchmarking and Dissecting the Nvidia Hopper GPU Architecture via
# Microbenchmarking", 2024, tables 4 and 8; rounded). Those of other instructions that set a scoreboard: OTHER.
LATENCY = {"LDS": 30, "LDSM": 33, "STS": 20, "STSM": 20, "SHFL": 25, "MUFU": 24, "BAR": 20, "ATOMS": 60, "I2F": 24,
           "F2I": 24, "F2F": 24, "S2R": 20, "LDC": 30, "ULDC": 10, "R2UR": 12, "CS2R": 10, "LDGDEPBAR": 4,
           "MEMBAR": 20, "FENCE": 10}  # fmt: skip
OTHER = 20
READ = 12
"""Until the operands of an instruction are read."""
PRODUCT = 40
"""Of an asynchronous product, beside the cycles that it takes the matrix unit."""


@dataclass
class _Warp:
    memory: float
    """Cycles from a global load to its result."""
    clock: float = 0.0
    ready: list[float] = field(default_factory=lambda: [0.0] * 6)
    """When what set each scoreboard has its result."""
    groups: list[float] = field(default_factory=lambda: [0.0])
    """When each group of asynchronous copies has arrived; the last is open."""
    products: float = 0.0
    """When the last asynchronous product is done."""

    def issue(self, each: Instruction) -> None:
        begin = max([self.clock, *(self.ready[i] for i in each.waits)])
        base = each.base
        if base == "LDGSTS":
            self.groups[-1] = max(self.groups[-1], begin + self.memory)
        elif base == "LDGDEPBAR":
            self.groups = [*self.groups[-8:], 0.0]
        elif base == "DEPBAR" and (found := re.search(r"SB\d, 0x([0-9a-f]+)", each.operands)):
            # All but the latest so many, the open one not among them.
            done = self.groups[: len(self.groups) - 1 - int(found[1], 16)]
            begin = max([begin, *done])
        elif base == "HGMMA":
            self.products = max(self.products, begin) + matrix_cycles(each)
        elif base == "WARPGROUP" and "DEPBAR" in each.name:
            begin = max(begin, self.products + PRODUCT)
        latency = self.memory if base in ("LDG", "LD", "LDL", "ATOMG") else LATENCY.get(base, OTHER)
        if each.written != NO_SCOREBOARD:
            self.ready[each.written] = max(self.ready[each.written], begin + latency)
        if each.read != NO_SCOREBOARD:
            self.ready[each.read] = max(self.ready[each.read], begin + READ)
        self.clock = begin + max(each.stall, 1)


def matrix_cycles(each: Instruction) -> float:
    """Of a scheduler's matrix unit, for an instruction of one warp; see devices.py on the rates."""
    shape = re.search(r"\.(\d+)x(\d+)x(\d+)", each.name)
    if each.base == "HGMMA" and shape:
        m, n, k = map(int, shape.groups())
        return max(2 * m * n * k / 4 / (512 if "TF32" in each.name else 1024), 16.0)
    return {"16816": 6.5, "1688": 6.5 if "TF32" in each.name else 3.25, "1684": 3.25}.get(
        next((part for part in each.name.split(".") if part.isdigit()), ""), 16.0
    )


def alone(executions: Executions, memory: float) -> float:
    """Cycles of a warp from its beginning to its end, with global loads that take ``memory`` cycles."""
    code, counts = executions.code, executions.blocks
    cost = [0.0] * len(code.blocks)
    warp = _Warp(memory)

    def walk(blocks: Sequence[int], settled: set[int]) -> None:
        for number in blocks:
            if counts[number] < 1e-3:
                continue
            begin = warp.clock
            for each in code.of(code.blocks[number]):
                warp.issue(each)
            if number not in settled:
                cost[number] = warp.clock - begin

    walk(range(len(code.blocks)), set())
    settled: set[int] = set()
    for first, last in code.loops():
        # Once more from the state that the loop leaves: what an iteration takes among others.
        blocks = range(first, last + 1)
        walk(blocks, settled)
        walk(blocks, settled)
        settled |= set(blocks)
    return sum(count * each for count, each in zip(counts, cost))
