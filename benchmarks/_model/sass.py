"""Machine code of NVIDIA GPUs as text, taken apart: instructions with what the compiler wrote beside them for the
scheduler, and the basic blocks that they form.

Of the 128 bits of an instruction the upper ones say (Jia et al., "Dissecting the NVIDIA Volta GPU architecture via
microbenchmarking", 2018, 2.1; the same up to sm_90): for how many cycles the warp issues nothing after it, which of
six scoreboards it sets until its result is there, which until its operands are read, and for which it waits before.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from _machine_code import tool

NO_SCOREBOARD = 7


@dataclass(frozen=True)
class Instruction:
    """One."""

    name: str
    """With its modifiers, "LDG.E.128"."""
    operands: str
    guard: str
    """"", or the predicate as written: "@!P0"."""
    source: str
    """"file:line" of what it was compiled from, or ""."""
    stall: int
    written: int
    """Scoreboard that is set until the result is there, or NO_SCOREBOARD."""
    read: int
    """The same until the operands are read."""
    waits: tuple[int, ...]
    """Scoreboards."""

    @property
    def base(self) -> str:
        return self.name.split(".")[0]


@dataclass
class Block:
    """Instructions that are executed one after the other, whenever the first one is."""

    begin: int
    end: int
    """The first that is not in it."""
    next: list[int] = field(default_factory=list)
    """Blocks that may follow."""


@dataclass(frozen=True)
class Code:
    """One kernel."""

    instructions: Sequence[Instruction]
    blocks: Sequence[Block]

    def of(self, block: Block) -> Sequence[Instruction]:
        return self.instructions[block.begin : block.end]

    def loops(self) -> list[tuple[int, int]]:
        """First and last block of each, the innermost ones first."""
        found = {(to, number) for number, block in enumerate(self.blocks) for to in block.next if to <= number}
        # The jump to itself at the end of a kernel is none.
        real = [(a, b) for a, b in found if self.blocks[b].end - self.blocks[a].begin > 1]
        return sorted(real, key=lambda each: each[1] - each[0])


_LINE = re.compile(r'//## File "([^"]*)", line (\d+)(.*)')
_CODE = re.compile(
    r"\s*/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(@!?U?P\w+)?\s*([A-Z][\w.]*)\s*([^;]*);.*/\* 0x([0-9a-f]{16}) \*/"
)
_SECOND = re.compile(r"\s*/\* 0x([0-9a-f]{16}) \*/\s*$")
_LABEL = re.compile(r"^(\.L_[\w$]+|\$?[\w.$]+):\s*$")


def disassembled(cubin: bytes) -> str:
    """What nvdisasm makes of it, with lines of the source and the bits of each instruction."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        line = [tool("nvdisasm"), "-c", "-g", "-hex", str(file)]
        return subprocess.run(line, capture_output=True, text=True, check=True).stdout


def parse(text: str, kernel: str) -> Code:
    """The code of a kernel in nvdisasm's text."""
    section = text.partition(f".section\t.text.{kernel},")[2].partition("\n\t.section\t")[0]
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    source = ""
    written: tuple[str, str, str] | None = None
    for line in section.split("\n"):
        if found := _LINE.search(line):
            source = f"{found[1].rsplit('/', 1)[-1]}:{found[2]}"
        elif found := _CODE.match(line):
            written = found[1] or "", found[2], found[3].strip()
        elif (found := _SECOND.match(line)) and written:
            guard, name, operands = written
            instructions.append(_instruction(name, operands, guard, source, int(found[1], 16)))
            written = None
        elif found := _LABEL.match(line):
            labels[found[1]] = len(instructions)
    return Code(instructions, _blocks(instructions, labels))


def _instruction(name: str, operands: str, guard: str, source: str, bits: int) -> Instruction:
    # The upper 64 of them: the first of the others is bit 105 of all.
    waits = tuple(i for i in range(6) if bits >> 52 + i & 1)
    return Instruction(name, operands, guard, source, bits >> 41 & 15, bits >> 46 & 7, bits >> 49 & 7, waits)


def _blocks(instructions: Sequence[Instruction], labels: dict[str, int]) -> list[Block]:
    jumps = {"BRA", "EXIT", "RET", "BRX", "JMP", "BREAK"}
    begins = {0, *labels.values()}
    for i, each in enumerate(instructions):
        # What is never true ends nothing; an exit of some threads does not end the others.
        if each.base in jumps:
            begins.add(i + 1)
    starts = sorted(i for i in begins if i < len(instructions))
    number = {begin: i for i, begin in enumerate(starts)}
    blocks = [Block(a, b) for a, b in zip(starts, [*starts[1:], len(instructions)])]
    for i, block in enumerate(blocks):
        last = instructions[block.end - 1]
        target = re.search(r"`\((\.L_[\w$]+)\)|(\.L_[\w$]+)", last.operands)
        at = labels.get(target[1] or target[2]) if target else None
        if last.base == "BRA" and at in number:
            block.next.append(number[at])
        falls = last.base not in jumps or last.guard or (last.base == "BRA" and _conditional(last))
        if falls and i + 1 < len(blocks):
            block.next.append(i + 1)
    return blocks


def _conditional(branch: Instruction) -> bool:
    # "BRA.DIV UR4, .L", "BRA.U !UP0, .L", "BRA P1, .L": it has a condition beside its target.
    return "," in branch.operands
