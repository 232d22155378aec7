"""How often the machine code of a kernel is executed, from how often its PTX was.

The executor of tests/ptx counts PTX. ptxas makes machine code of it: it moves, copies and removes instructions,
unrolls loops and turns branches into predicates. How often a warp comes to each basic block follows from three things,
by least squares:

- what flows into a block flows out of it, and a warp begins once
- some instructions ptxas translates one to one (loads, stores, barriers, shuffles, matrix products, exponentials), so
  all copies of one, which the line of the source tells, are executed as often as it was
- where both leave a choice, a block is executed about as often as the PTX of its lines
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.optimize

from _model.sass import Code, Instruction

EXACT, ANCHOR, PRIOR = 1e3, 1.0, 0.02
"""Weights of the three."""

_PTX = (
    (r"ld\.global", "LDG"), (r"st\.global", "STG"), (r"cp\.async\.c[ag]", "LDGSTS"), (r"ld\.shared", "LDS"),
    (r"st\.shared", "STS"), (r"ldmatrix", "LDSM"), (r"stmatrix", "STSM"), (r"shfl", "SHFL"),
    (r"bar(rier)?\.sync", "BAR"), (r"mma\.sync", "HMMA"), (r"wgmma\.mma_async", "HGMMA"), (r"ex2", "MUFU.EX2"),
    (r"lg2", "MUFU.LG2"), (r"rsqrt", "MUFU.RSQ"), (r"tanh", "MUFU.TANH"),
)  # fmt: skip
ONE_TO_ONE = {kind for _, kind in _PTX}


@dataclass(frozen=True)
class Executions:
    """Of each basic block, by one warp on average."""

    code: Code
    blocks: Sequence[float]

    def total(self) -> float:
        """Instructions of a warp."""
        return float(sum(n * (b.end - b.begin) for n, b in zip(self.blocks, self.code.blocks)))

    def by(self, key: Any) -> dict[Any, float]:
        """Sums of instructions by a function of them; None is left out."""
        found: dict[Any, float] = defaultdict(float)
        for count, block in zip(self.blocks, self.code.blocks):
            for each in self.code.of(block):
                if count and (of := key(each)) is not None:
                    found[of] += count
        return found


def kind_of_ptx(name: str) -> str | None:
    """Of an instruction that is translated one to one: the machine instruction."""
    return next((kind for pattern, kind in _PTX if re.match(pattern, name)), None)


def kind_of(instruction: Instruction) -> str | None:
    """The same of the machine instruction."""
    if instruction.guard == "@!PT":  # never executed: ptxas puts some before asynchronous copies
        return None
    parts = instruction.name.split(".")
    name = ".".join(parts[:2]) if parts[0] == "MUFU" else parts[0]
    return name if name in ONE_TO_ONE else None


def executions(code: Code, names: Sequence[str], sources: Sequence[str], executed: Sequence[float]) -> Executions:
    """Solve for the blocks.

    Args:
        code: of the kernel.
        names: of the PTX instructions.
        sources: their lines, "file:line", or "".
        executed: how often a warp executed each, on average.
    """
    wanted: dict[tuple[str, str], float] = defaultdict(float)
    lines: dict[str, list[float]] = defaultdict(list)
    copies: dict[tuple[str, str], int] = defaultdict(int)
    for name, source, count in zip(names, sources, executed):
        lines[source].append(float(count))
        if kind := kind_of_ptx(name):
            wanted[kind, source] += float(count)
            copies[kind, source] += 1
    mean = {line: sum(counts) / len(counts) for line, counts in lines.items()}
    if len(mean) == 1:  # no lines are known
        mean = {}

    edges = [(i, to) for i, block in enumerate(code.blocks) for to in block.next]
    ends = [i for i, block in enumerate(code.blocks) if code.instructions[block.end - 1].base in ("EXIT", "RET")]
    variables = len(edges) + len(ends)
    into = np.zeros((len(code.blocks), variables))
    out = np.zeros((len(code.blocks), variables))
    for column, (a, b) in enumerate(edges):
        out[a, column] += 1
        into[b, column] += 1
    for column, a in enumerate(ends, len(edges)):
        out[a, column] += 1
    rows, right = [], []

    def add(row: np.ndarray[Any, Any], value: float, weight: float) -> None:
        rows.append(row * weight)
        right.append(value * weight)

    prior = [_prior(code, block, mean, dict(copies)) for block in code.blocks]
    for i in range(len(code.blocks)):
        if code.blocks[i].next == [i]:  # the jump to itself after the end
            add(into[i] + out[i], 0.0, EXACT)
            continue
        likely = prior[i]
        add(out[i] - into[i], float(i == 0), EXACT / ((likely or 0.0) + 1))
        if likely is not None:
            add(out[i], likely, PRIOR / (likely + 0.1))
    static: dict[tuple[str, str], np.ndarray[Any, Any]] = defaultdict(lambda: np.zeros(variables))
    for i, block in enumerate(code.blocks):
        for each in code.of(block):
            if kind := kind_of(each):
                static[kind, each.source if mean else ""] += out[i]
    for key, row in static.items():
        if key in wanted:
            add(row, wanted[key], ANCHOR / max(wanted[key], 0.1))
    flow, _ = scipy.optimize.nnls(np.array(rows), np.array(right), maxiter=100 * variables)
    return Executions(code, [float(x) for x in out @ flow])


def _prior(code: Code, block: Any, mean: dict[str, float], copies: dict[tuple[str, str], int]) -> float | None:
    # Where branches meet again stands the line of one of them, which says nothing.
    found = [each for each in code.of(block) if each.base not in ("BSYNC", "NOP")]
    if not found:
        return None
    counts = [mean[each.source] for each in found if each.source in mean]
    here: dict[tuple[str, str], int] = defaultdict(int)
    for each in found:
        if kind := kind_of(each):
            here[kind, each.source] += 1
    unrolled = [count / copies[key] for key, count in here.items() if key in copies]
    return float(np.median(counts) / max(1, *unrolled, 1)) if counts else 1.0
