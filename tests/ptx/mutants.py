"""Faults planted in compiled kernels: what a compiler or an author could get wrong."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from tests.ptx.launches import Call, Executed, Memory, bytes_of, execute
from tests.ptx.loading import program_of
from tests.ptx.module import parse


@dataclass
class Recording:
    """A launch, with what its tensors held before and after."""

    call: Call
    before: list[torch.Tensor]
    """Of each storage of a tensor argument, bytes."""
    defined: list[np.ndarray[Any, Any]]
    """Whether its bytes were, before."""
    after: list[torch.Tensor]
    effects: list[int]
    """Of each instruction, a hash of its results."""

    @classmethod
    def of(cls, call: Call, memory: Memory) -> Recording:
        """Record a launch, which is run on copies."""
        tensors = [each for each in call.arguments if isinstance(each, torch.Tensor)]
        found = cls(
            call, [bytes_of(each).clone() for each in tensors], [memory.defined(each) for each in tensors], [], []
        )
        done, found.after, found.effects = found.run(call.ptx)
        assert not done.findings, "a fault before one is planted"
        return found

    def run(self, ptx: str, limit: int = 20_000_000) -> tuple[Executed, list[torch.Tensor], list[int]]:
        """The launch again with other code: what was found, what the storages hold then, and the effects."""
        effects = (ctypes.c_uint64 * len(program_of(ptx).names))()
        memory = Memory()
        copies: dict[int, torch.Tensor] = {}
        arguments: list[Any] = []
        index = 0
        for each in self.call.arguments:
            if isinstance(each, torch.Tensor):
                key = each.untyped_storage().data_ptr()
                if key not in copies:
                    copy = torch.empty(0, dtype=each.dtype).set_(self.before[index].clone().untyped_storage())
                    copies[key] = copy
                    memory.define(copy, self.defined[index])
                # The same place in a copy of the storage.
                same = torch.empty(0, dtype=each.dtype).set_(
                    copies[key].untyped_storage(), each.storage_offset(), each.shape, each.stride()
                )
                arguments.append(same)
                index += 1
            else:
                arguments.append(each)
        done = execute(replace(self.call, ptx=ptx, arguments=tuple(arguments)), memory, limit=limit, effects=effects)
        return done, [bytes_of(each).clone() for each in arguments if isinstance(each, torch.Tensor)], list(effects)

    def same(self, after: list[torch.Tensor]) -> bool:
        """Whether every bit is as it was."""
        return all(torch.equal(right, found) for right, found in zip(self.after, after, strict=True))

    def differs(self, after: list[torch.Tensor]) -> bool:
        """Whether a result is wrong by more than rounding: by a hundredth of the largest value of its tensor."""
        tensors = [each for each in self.call.arguments if isinstance(each, torch.Tensor)]
        for tensor, right, found in zip(tensors, self.after, after, strict=True):
            x, y = (each.view(tensor.dtype).double() for each in (right, found))
            error = (x - y).abs().nan_to_num(float("inf"))
            error[(x == y) | (x.isnan() & y.isnan())] = 0  # NaN: of memory around the tensors
            if error.numel() and error.max() > 0.01 * x.nan_to_num(0, 0, 0).abs().max():
                return True
        return False


@dataclass(frozen=True)
class Mutant:
    """One planted fault."""

    kind: str
    line: int
    text: str
    """The line before."""
    ptx: str
    statements: tuple[int, ...]
    """Indices of the changed or removed instructions."""
    waits: bool
    """Whether it is about when things happen: such an instruction gives no result."""

    def planted(self, before: list[int], after: list[int]) -> bool:
        """Whether it made a difference to anything, given the effects without it and with it: not if the instruction
        never ran, or gave what it had given."""
        if self.waits:
            return any(before[i] for i in self.statements)
        return any(before[i] != after[i] for i in self.statements)


Change = Callable[[str], str | None]


def _substituted(pattern: str, by: str) -> Change:
    def change(line: str) -> str | None:
        changed, count = re.subn(pattern, by, line, count=1)
        return changed if count else None

    return change


def _moved(pattern: str, by: int) -> Change:
    # A number in the line that the pattern's group is, made larger.
    def change(line: str) -> str | None:
        found = re.search(pattern, line)
        if not found:
            return None
        return line[: found.start(1)] + str(int(found.group(1)) + by) + line[found.end(1) :]

    return change


def _other_swizzle(line: str) -> str | None:
    # The highest two bits of a descriptor of a matrix in shared memory.
    found = re.search(r"\bor\.b64\s+%rd\d+, %rd\d+, (-\d+);", line)
    if not found:
        return None
    return line[: found.start(1)] + str((int(found.group(1)) ^ 1 << 62) & ((1 << 64) - 1)) + line[found.end(1) :]


FAULTS: dict[str, Change] = {
    "barrier removed": _substituted(r"\bbar\.sync\s+0;", ""),
    "warp's barrier removed": _substituted(r"\bbar\.warp\.sync\s+-1;", ""),
    "copy not waited for": _substituted(r"\bcp\.async\.wait_group\s+\d+;", ""),
    "waited for one copy fewer": _moved(r"\bcp\.async\.wait_group\s+(\d+);", 1),
    "copy without its mask": _substituted(r"(cp\.async\.c\w\.shared\.global .*, 0x\w+), %r\d+;", r"\1;"),
    "copies not committed": _substituted(r"\bcp\.async\.commit_group;", ""),
    "product not waited for": _substituted(r"\bwgmma\.wait_group\.sync\.aligned\s+\d+;", ""),
    "waited for one product fewer": _moved(r"\bwgmma\.wait_group\.sync\.aligned\s+(\d+);", 1),
    "products not committed": _substituted(r"\bwgmma\.commit_group\.sync\.aligned;", ""),
    "proxy not fenced": _substituted(r"\bfence\.proxy\.async\.shared::cta;", ""),
    "product not fenced": _substituted(r"\bwgmma\.fence\.sync\.aligned;", ""),
    "load one element on": _moved(r"ld\.global[^\[]*\[\s*%rd\d+\s*\+\s*(\d+)", 2),
    "store one element on": _moved(r"st\.global[^\[]*\[\s*%rd\d+\s*\+\s*(\d+)", 2),
    "load without its mask": _substituted(r"^(\s*)@!?%p\d+(\s+ld\.global)", r"\1\2"),
    "store without its mask": _substituted(r"^(\s*)@!?%p\d+(\s+st\.global)", r"\1\2"),
    "store with the mask turned": _substituted(r"^(\s*)@(%p\d+\s+st\.global)", r"\1@!\2"),
    "load with the mask turned": _substituted(r"^(\s*)@(%p\d+\s+ld\.global)", r"\1@!\2"),
    "bound one too far": _substituted(r"\bsetp\.lt\.s32\b", "setp.le.s32"),
    "mask of either, not both": _substituted(r"\band\.pred\b", "or.pred"),
    "swizzle by another row": _moved(r"\bxor\.b32\s+%r\d+, %r\d+, (\d+);", 16),
    "swizzle left out": _substituted(r"\bxor\.b32(\s+%r\d+), (%r\d+), %r\d+;", r"mov.b32\1, \2;"),
    "matrix not transposed": _substituted(r"(ldmatrix\S*)\.trans", r"\1"),
    "matrix transposed": _substituted(r"(ldmatrix\.sync\.aligned\.m8n8\.x\d)\.shared", r"\1.trans.shared"),
    "another lane's value": _substituted(r"(shfl\.sync\.bfly\.b32\s+%r\d+, %r\d+), \d+,", r"\1, 0,"),
    "another swizzle": _other_swizzle,
    "another row of shared memory": _moved(r"(?:ld|st)\.shared[^\[]*\[%r\d+\+(\d+)\]", 256),
}
"""What can be planted, by name."""
EVERYWHERE = (
    "copy not waited for",
    "waited for one copy fewer",
    "copies not committed",
    "product not waited for",
    "waited for one product fewer",
    "products not committed",
    "proxy not fenced",
    "product not fenced",
)
"""Taken out of the whole kernel at once: of several, one may stand in for another, and what is left is right."""
BY_SOURCE = (
    "load without its mask",
    "copy without its mask",
    "store without its mask",
    "mask of either, not both",
    "bound one too far",
)
"""Changed in all instructions that were made of one line of the source, as an author would get it wrong: of a single
register's load or bound, another mask often does the work too."""


def mutants(ptx: str) -> Iterator[Mutant]:
    """All that can be planted in a kernel, one at a time."""
    lines = ptx.split("\n")
    parsed = parse(ptx).statements
    statements = {each.line: index for index, each in enumerate(parsed)}
    source = {each.line: each.source for each in parsed}
    for kind, change in FAULTS.items():
        changed = {number: new for number, line in enumerate(lines) if (new := change(line)) is not None}
        sets: dict[Any, dict[int, str]] = {}
        for number, new in changed.items():
            place = "" if kind in EVERYWHERE else source[number] if kind in BY_SOURCE else number
            sets.setdefault(place, {})[number] = new
        for each in sets.values():
            first = next(iter(each))
            text = "\n".join(each.get(number, line) for number, line in enumerate(lines))
            places = tuple(statements[number] for number in each)
            yield Mutant(kind, first, lines[first].strip(), text, places, kind in EVERYWHERE or "barrier" in kind)
