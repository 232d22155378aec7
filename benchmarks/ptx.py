"""Executes the compiled GPU kernels on a CPU: what `make ptx` runs. Needs no GPU.

Every op, forward and backward, at the inputs of ``mvkernels verify``, in float32 (ieee and tf32), float16 and
bfloat16, by tests/ptx: the library's own planning and launches, and the PTX one instruction after the other, which
Triton's own compiler makes for sm_90 and sm_80, and nvcc of the kernels in CUDA C++. Results are compared with float64
as ever; every access is checked. Writes results/ptx/<op>.csv, a row for each kernel of each case:

- ``error``, ``allowed``, ``ok``: of the case's worst tensor, ``worst``
- ``races``, ``findings``: accesses that no barrier sets apart; those and all other faults (out of bounds, misaligned,
  undefined values, missing waits and fences, divergence at a barrier)
- ``instructions`` of warps; ``matrix_flops``
- ``global_requests`` of warps, ``global_sectors`` of 32 bytes that they touch, ``global_bytes`` that lanes ask for
- ``shared_requests`` of warps, and ``conflicts``: passes over the banks beyond those that the width asks for

Exit status 1 if something is wrong, 2 for bad usage.
"""

from __future__ import annotations

import argparse
import datetime
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import _forked
import triton

from mvkernels import files
from mvkernels.commands import command
from mvkernels.report import commit, table
from tests.devices import PRETENDED
from tests.ptx import cases

RESULTS = Path(__file__).parent / "results" / "ptx"


def executed(case: cases.Case) -> tuple[tuple[list[dict[str, Any]], bool], list[str]]:
    """(rows of a case and whether something is wrong, faults). Never raises: an error is a fault."""
    try:
        outcome = cases.run(case)
    except Exception as error:
        return ([], True), [f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"]
    return (list(cases.rows(outcome)), bool(outcome.faults)), outcome.faults


SUMMED = ("findings", "instructions", "global_bytes", "global_sectors", "conflicts", "shared_requests")


def summary(rows: list[dict[str, Any]]) -> Iterator[list[Any]]:
    """A line for each kernel: in how many cases it ran, by dtype; findings; how its accesses lie."""
    kernels = sorted({(row["op"], row["backend"], row["kernel"]) for row in rows})
    for op, backend, kernel in kernels:
        of = [row for row in rows if (row["op"], row["backend"], row["kernel"]) == (op, backend, kernel)]
        total = {name: sum(row[name] for row in of) for name in SUMMED}
        yield [
            op, backend, kernel, *(sum(row["dtype"] == dtype for row in of) for dtype in cases.DTYPES),
            total["findings"], f"{total['instructions'] / 1e6:.1f}",
            f"{total['global_bytes'] / (32 * total['global_sectors'] or 1):.0%}",
            f"{total['conflicts'] / (total['shared_requests'] or 1):.2f}",
        ]  # fmt: skip


COLUMNS = [
    "op",
    "backend",
    "kernel",
    *cases.DTYPES,
    "findings",
    "million instructions",
    "asked of moved",
    "conflicts a request",
]


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="ptx", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--op", action="append", choices=list(cases.FEW), help="only this op (repeatable)")
    parser.add_argument("--dtype", action="append", choices=list(cases.DTYPES), help="only this dtype (repeatable)")
    parser.add_argument("--arch", action="append", choices=list(PRETENDED), help="only this one (repeatable)")
    parser.add_argument("--backend", action="append", choices=("triton", "cuda"), help="only this one (repeatable)")
    parser.add_argument("--filter", default="", metavar="TEXT", help="only cases with this in their name")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, metavar="N", help="default: all cores")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FOLDER")
    options = parser.parse_args(argv)
    if triton.knobs.runtime.interpret:
        print("ptx: unset TRITON_INTERPRET, it replaces the compiler", file=sys.stderr)
        return 2
    ops, dtypes = options.op or list(cases.FEW), options.dtype or list(cases.DTYPES)
    jobs = [
        case
        for case in cases.cases()
        if case.op in ops
        and case.dtype in dtypes
        and case.arch in (options.arch or PRETENDED)
        and case.backend in (options.backend or (case.backend,))
        and options.filter in str(case)
    ]
    if not jobs or options.processes < 1:
        print("ptx: no case matches" if not jobs else "ptx: --processes: want 1 or more", file=sys.stderr)
        return 2
    same = {"triton": triton.__version__, "date": datetime.date.today().isoformat(), "commit": commit()}
    found = _forked.results(executed, jobs, options.processes)
    rows = [row | same for rows, _ in found for row in rows]
    if (options.dtype or options.arch or options.backend or options.filter) and options.out == RESULTS:
        print(
            "ptx: no file is written, since this is a part of what an op's file has; --out writes one", file=sys.stderr
        )
    else:
        for op in {row["op"] for row in rows}:
            of = [row for row in rows if row["op"] == op]
            files.write_csv(options.out / f"{op}.csv", list(of[0]), of)
    print(table(list(summary(rows)), COLUMNS))
    races = sum(row["races"] for row in rows)
    wrong = sum(bad for _, bad in found)
    print(f"{len(jobs)} cases, {wrong} wrong, {races} races")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(command.run("ptx", main))
