"""What the audit finds in the loops of machine code: integer divisions, and narrow loads.

A loop goes over tiles, and what it does for each tile it does most often. An integer division by a number that is not
known when the kernel is compiled takes two dozen instructions, of which some go by way of floats; what a division
gives can be computed before the loop and moved on by additions. And where channels are contiguous, a thread can load
several at once.
"""

from __future__ import annotations

import re
from typing import Any

from _model.sass import Code, Instruction

NARROW = 4
"""Bytes, below which a load is narrow: a half type at a time."""
CONTIGUOUS = ("last", "per_head", "one_head")
"""Layouts in which channels of a head lie side by side."""


def divides(each: Instruction) -> bool:
    """Whether an instruction stands for an integer division by a run-time number.

    ptxas divides 32-bit numbers by way of a reciprocal that is too small rather than too large, so of the divisor
    rounded up, for which nothing else converts an integer so; and calls a routine for 64-bit ones.
    """
    if each.base == "I2F":
        return "RP" in each.name.split(".")
    return each.base == "CALL" and bool(re.search(r"_(div|rem)_[us]64", each.operands))


def narrow(each: Instruction) -> bool:
    """Whether an instruction loads less than NARROW bytes a thread from global memory."""
    parts = each.name.split(".")
    return each.base in ("LDG", "LD") and bool({"U8", "S8", "U16", "S16"} & set(parts))


def in_loops(code: Code) -> dict[str, int]:
    """How many of these stand in the loops of a kernel, each counted once."""
    inside = {number for first, last in code.loops() for number in range(first, last + 1)}
    each_one = [each for number in sorted(inside) for each in code.of(code.blocks[number])]
    return {"loop_divisions": sum(map(divides, each_one)), "loop_narrow_loads": sum(map(narrow, each_one))}


GENERAL = r"^attention_(forward|backward)_(bf16|f16|f32|tf32)(_plain)?_\d+$"
"""Kernels in CUDA C++ for all strides and sizes of groups; those for certain ones are held to the rules."""
EXCEPTIONS = (
    ("DIVISION", GENERAL,
     "CUDA C++: where the tokens of a unit lie is found once a unit, before its tiles, by as many threads as tokens"),
    ("DIVISION", r"^attention_(backward_\w+_\d+_\d+|forward_large_\w+)$",
     "CUDA C++: once a unit, in the loop over units; the loops over its tiles divide nothing"),
    ("NARROW", GENERAL,
     "CUDA C++ for all strides: with contiguous channels another loop is taken, which moves 8 or 16 bytes"),
    ("NARROW", r"^(linear_rows|norm_ffn|norm_backward|ffn_backward)$",
     "one number of each row or channel of a block: the first channel, by which rows are centred, or a bias"),
    ("NARROW", r"^(multiscale_|aggregate|depthwise|weight)",
     "weights of a depthwise convolution: those of a tap lie K * K apart"),
)  # fmt: skip
"""(finding, kernels as a pattern, reason) of what cannot be mended, beside :func:`why_narrow`."""


def why_narrow(row: dict[str, Any]) -> str:
    """Why no wider load is possible in a row's layout, or ""."""
    if row.get("layout") not in CONTIGUOUS:
        return "channels of a head do not lie side by side"
    if row.get("aligned_bytes", 0) < NARROW:
        return "a head begins at an address that a wide load cannot have"
    if bias_row(row) < NARROW:
        return "a row of the bias begins at an address that a wide load cannot have: odd numbers of half types"
    return ""


def exempt(row: dict[str, Any], finding: str) -> str:
    """The reason for which a row is not held to DIVISION or NARROW, or ""."""
    if finding == "NARROW" and (reason := why_narrow(row)):
        return reason
    kernel = str(row.get("kernel", ""))
    return next((why for what, which, why in EXCEPTIONS if what == finding and re.search(which, kernel)), "")


def findings(row: dict[str, Any]) -> list[tuple[str, str]]:
    """(finding, why it is exempt or "") of the loops of a row."""
    both = (("DIVISION", "loop_divisions"), ("NARROW", "loop_narrow_loads"))
    return [(name, exempt(row, name)) for name, column in both if row.get(column)]


def exceptions(rows: list[dict[str, Any]]) -> list[str]:
    """A line for each kind of exception that was made, with the kernels that it was made for."""
    made: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for name, why in findings(row):
            if why:
                made.setdefault((name, why), []).append(row["kernel"])
    return [
        f"{name}, {len(of)} kernels exempt ({', '.join(sorted(set(of)))}): {why}" for (name, why), of in made.items()
    ]


def bias_row(row: dict[str, Any]) -> int:
    """The largest power of two, at most 16, that divides the bytes of a row of the bias; 16 if there is none."""
    if not row.get("bias"):
        return 16
    size = int(row["tokens"]) * {"bf16": 2, "fp16": 2, "fp64": 8}.get(row["dtype"], 4)
    return min(size & -size, 16)
