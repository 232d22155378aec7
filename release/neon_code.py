"""Reads machine code for aarch64: which innermost loops multiply and add, how, and what they spill."""

from __future__ import annotations

import re
import subprocess
from dataclasses import astuple, dataclass
from pathlib import Path

FUNCTION = re.compile(r"^[0-9a-f]+ <(.+)>:$")
INSTRUCTION = re.compile(r"^\s*([0-9a-f]+):\s+([a-z][a-z0-9.]*)\s*(.*)$")
BRANCH = re.compile(r"(b|b\.[a-z]+|cbn?z|tbn?z)$")
TARGET = re.compile(r"([0-9a-f]+) <")
ELEMENT = re.compile(r"v\d+\.[sd]\[\d\]$")
MOVES = ("ldr", "ldp", "ldur", "str", "stp", "stur")


@dataclass(frozen=True)
class Loop:
    """An innermost loop, with counts of its instructions."""

    function: str
    fmla: int
    by_element: int
    """Those whose factor is one element of a register, which needs no broadcast."""
    broadcasts: int
    loads: int
    spills: int
    """Vector registers stored to the stack or loaded from it."""
    instructions: int


def spilled(name: str, operands: str) -> bool:
    """Whether a vector register goes to the stack or comes from it."""
    return name in MOVES and re.match(r"[qds]\d", operands) is not None and "[sp" in operands


def counted(function: str, body: list[tuple[int, str, str]]) -> Loop:
    def count(*names: str) -> int:
        return sum(name in names for _, name, _ in body)

    sums = [operands for _, name, operands in body if name in {"fmla", "fmls"}]
    return Loop(
        function,
        fmla=len(sums),
        by_element=sum(ELEMENT.search(operands) is not None for operands in sums),
        broadcasts=count("dup", "ld1r"),
        loads=count("ldr", "ldp", "ldur", "ld1", "ld1r", "ld2", "ld3", "ld4"),
        spills=sum(spilled(name, operands) for _, name, operands in body),
        instructions=len(body),
    )


def loops_of(function: str, body: list[tuple[int, str, str]]) -> list[Loop]:
    """The innermost loops of a function that multiply and add."""
    position = {address: i for i, (address, _, _) in enumerate(body)}
    found = set()
    for end, (_, name, operands) in enumerate(body):
        target = TARGET.search(operands) if BRANCH.match(name) else None
        begin = position.get(int(target[1], 16), end + 1) if target else end + 1
        # A way back over the function's end is no loop: the compiler has put a rare part behind it.
        if begin <= end and not any(name == "ret" for _, name, _ in body[begin:end]):
            found.add((begin, end))
    inner = [(b, e) for b, e in sorted(found) if not any(b <= c and f <= e and (b, e) != (c, f) for c, f in found)]
    loops = [counted(function, body[begin : end + 1]) for begin, end in inner]
    return [loop for loop in loops if loop.fmla]


def loops(disassembly: str) -> list[Loop]:
    """The innermost loops in what ``objdump -d -C --no-show-raw-insn`` prints, those with the most sums first."""
    out: list[Loop] = []
    function = ""
    body: list[tuple[int, str, str]] = []
    for line in disassembly.splitlines():
        if name := FUNCTION.match(line):
            out += loops_of(function, body)
            function, body = name[1], []
        elif found := INSTRUCTION.match(line):
            body.append((int(found[1], 16), found[2], found[3].split("//")[0].strip()))
    out += loops_of(function, body)
    return sorted(out, key=lambda loop: (-loop.fmla, astuple(loop)))


def disassembled(file: Path) -> str:
    command = ["aarch64-linux-gnu-objdump", "-d", "-C", "--no-show-raw-insn", str(file)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
