"""Executes the compiled Triton kernels on a CPU: what `make ptx` runs. Needs no GPU.

Every op, forward and backward, at the inputs of ``mvkernels verify``, in float32 (ieee and tf32), float16 and
bfloat16, as compiled for sm_90 and sm_80, by tests/ptx: the library's own planning and launches, Triton's own
compiler, and its PTX one instruction after the other. Results are compared with float64 as ever; every access is
checked. Writes results/ptx/<op>.csv, a row for each kernel of each case:

- ``error``, ``allowed``, ``ok``: of the case's worst tensor, ``worst``
- ``races``, ``findings``: accesses that no barrier sets apart; those and all other faults (out of bounds, misaligned,
  undefined values, missing waits and fences, divergence at a barrier)
- ``instructions`` of warps; ``matrix_flops``
- ``global_requests`` of warps, ``global_sectors`` of 32 bytes that they touch, ``global_bytes`` that lanes ask for
- ``shared_requests`` of warps, and ``conflicts``: passes over the banks beyond those that the width asks for

``--candidates`` executes instead what ``mvkernels tune`` would try on an H100, each configuration once, at the models'
shapes: results/ptx/candidates.csv. What needs more shared memory than there is has no row; tune refuses it too.

Exit status 1 if something is wrong, 2 for bad usage.
"""

from __future__ import annotations

import argparse
import datetime
import multiprocessing
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import triton
from triton.runtime.errors import OutOfResources

from mvkernels import files
from mvkernels.commands import command
from mvkernels.report import Progress, commit, table
from tests.ptx import cases, launches

RESULTS = Path(__file__).parent / "results" / "ptx"


Job = cases.Case | cases.Candidate
JOBS: list[Job] = []
"""What is being run. Processes are forks, and find it here: what makes a case's arguments cannot be sent to them."""


def executed(index: int) -> tuple[list[dict[str, Any]], list[str]]:
    """(rows, faults) of a case or a candidate, by its place in JOBS. Never raises: an error is a fault."""
    torch.set_num_threads(1)
    job = JOBS[index]
    try:
        outcome = cases.run(job) if isinstance(job, cases.Case) else job.run()
    except OutOfResources as error:  # as on a GPU: tune counts it as refused
        if isinstance(job, cases.Candidate):
            return [], []
        return [], [str(error)]
    except Exception as error:
        return [], [f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"]
    rows = list(cases.rows(outcome))
    if isinstance(job, cases.Candidate):
        change = " ".join(f"{name}={value}" for name, value in job.change.items())
        same = {"key": job.key, "change": change}
        rows = [
            {**row, **same} for row in rows if row["kernel"] == job.kernel
        ]  # none if the change is not to launch it
    return rows, outcome.faults


def run(jobs: Sequence[Job], processes: int) -> tuple[list[dict[str, Any]], int]:
    """(rows in the order of the jobs, how many jobs have faults). A fault is said at once, on stderr."""
    found: dict[int, list[dict[str, Any]]] = {}
    wrong = 0
    progress = Progress(len(jobs))
    JOBS[:] = jobs
    with ProcessPoolExecutor(processes, multiprocessing.get_context("fork")) as pool:
        futures = {pool.submit(executed, index): index for index in range(len(jobs))}
        for future in as_completed(futures):
            index = futures[future]
            found[index], faults = future.result()
            wrong += bool(faults)
            progress.step(str(jobs[index]))
            for fault in faults:
                print(f"{jobs[index]}: {fault}", file=sys.stderr, flush=True)
    progress.close()
    same = {"triton": triton.__version__, "date": datetime.date.today().isoformat(), "commit": commit()}
    return [row | same for index in sorted(found) for row in found[index]], wrong


SUMMED = ("findings", "instructions", "global_bytes", "global_sectors", "conflicts", "shared_requests")


def summary(rows: list[dict[str, Any]]) -> Iterator[list[Any]]:
    """A line for each kernel: in how many cases it ran, by dtype; findings; how its accesses lie."""
    kernels = sorted({(row["op"], row["kernel"]) for row in rows})
    for op, kernel in kernels:
        of = [row for row in rows if (row["op"], row["kernel"]) == (op, kernel)]
        total = {name: sum(row[name] for row in of) for name in SUMMED}
        yield [
            op, kernel, *(sum(row["dtype"] == dtype for row in of) for dtype in cases.DTYPES), total["findings"],
            f"{total['instructions'] / 1e6:.1f}",
            f"{total['global_bytes'] / (32 * total['global_sectors'] or 1):.0%}",
            f"{total['conflicts'] / (total['shared_requests'] or 1):.2f}",
        ]  # fmt: skip


COLUMNS = ["op", "kernel", *cases.DTYPES, "findings", "million instructions", "asked of moved", "conflicts a request"]


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="ptx", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--op", action="append", choices=list(cases.FEW), help="only this op (repeatable)")
    parser.add_argument("--dtype", action="append", choices=list(cases.DTYPES), help="only this dtype (repeatable)")
    parser.add_argument("--arch", action="append", choices=list(launches.DEVICES), help="only this one (repeatable)")
    parser.add_argument("--filter", default="", metavar="TEXT", help="only cases with this in their name")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, metavar="N", help="default: all cores")
    parser.add_argument("--candidates", action="store_true", help="instead: the configurations that tune would try")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FOLDER")
    options = parser.parse_args(argv)
    if triton.knobs.runtime.interpret:
        print("ptx: unset TRITON_INTERPRET, it replaces the compiler", file=sys.stderr)
        return 2
    ops, dtypes = options.op or list(cases.FEW), options.dtype or list(cases.DTYPES)
    every = cases.candidates(ops, dtypes) if options.candidates else cases.cases()
    jobs: list[Job] = [
        job
        for job in every
        if (case := job.case if isinstance(job, cases.Candidate) else job).op in ops
        and case.dtype in dtypes
        and case.arch in (options.arch or launches.DEVICES)
        and options.filter in str(job)
    ]
    if not jobs or options.processes < 1:
        print("ptx: no case matches" if not jobs else "ptx: --processes: want 1 or more", file=sys.stderr)
        return 2
    rows, wrong = run(jobs, options.processes)
    part = options.dtype or options.arch or options.filter or (options.candidates and options.op)
    if part and options.out == RESULTS:
        print(
            "ptx: no file is written, since this is a part of what an op's file has; --out writes one", file=sys.stderr
        )
    elif options.candidates and rows:
        files.write_csv(options.out / "candidates.csv", list(rows[0]), rows)
    else:
        for op in {row["op"] for row in rows}:
            of = [row for row in rows if row["op"] == op]
            files.write_csv(options.out / f"{op}.csv", list(of[0]), of)
    print(table(list(summary(rows)), COLUMNS))
    races = sum(row["races"] for row in rows)
    print(f"{len(jobs)} {'candidates' if options.candidates else 'cases'}, {wrong} wrong, {races} races")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(command.run("ptx", main))
