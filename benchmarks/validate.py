"""Holds the model of benchmarks/predict.py against what an H100 measured. Needs no GPU.

The kernels have changed since then. So the commit that was measured is taken out of git's history, its kernels are
compiled and counted as predict.py does, and what the model gives for them is compared with kernels.csv (microseconds of
each kernel, from cold caches) and counters.csv (instructions of warps) of results/nvidia-h100-80gb-hbm3-sm-90.

The constants that no data sheet has were fitted to every other shape; the rest says how near the model comes. ``--fit``
fits them anew and prints them: they belong in _model/devices.py.

Writes results/audit/validation.csv. Exit status 1 if less than LEAST of the rows that were not fitted are within
MARGIN of what was measured.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MEASURED = RESULTS / "nvidia-h100-80gb-hbm3-sm-90"
MARGIN, LEAST = 1.4, 0.95


def checkout(commit: str) -> Path:
    """The files of a commit, in a folder of build."""
    target = ROOT / "build" / f"measured-{commit}"
    if not target.exists():
        target.mkdir(parents=True)
        archive = subprocess.run(
            ["git", "-C", str(ROOT), "archive", commit, "mvkernels"], capture_output=True, check=True
        )
        subprocess.run(["tar", "-x", "-C", str(target)], input=archive.stdout, check=True)
    return target


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="validate", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, metavar="N", help="default: all cores")
    parser.add_argument("--shape", nargs="+", default=[], metavar="PART", help="only names with this in them")
    parser.add_argument("--fit", action="store_true")
    options = parser.parse_args(argv)
    sys.path.insert(0, str(ROOT))
    from _model import validation
    from _model.devices import DEVICES

    import tests.ptx.counting  # noqa: F401  (this tree's, before the other's packages are found)

    measured = validation.read(MEASURED / "kernels.csv")
    tree = checkout(measured[0]["commit"])
    sys.path.insert(0, str(tree))
    import mvkernels

    if not Path(mvkernels.__file__).is_relative_to(tree):
        raise RuntimeError(f"{mvkernels.__file__} is not of the commit that was measured")
    import triton

    triton.knobs.language.default_fp_fusion = True  # as it was when they were measured
    counted = counts_of(measured, options.shape, options.processes)
    device = DEVICES["H100"]
    rows = list(validation.joined(measured, counted))
    if options.fit:
        print(validation.written(validation.fitted(rows, device)))
        return 0
    found = list(validation.table(rows, device, validation.read(MEASURED / "counters.csv")))
    return report(found, RESULTS / "audit" / "validation.csv" if not options.shape else None)


def counts_of(measured: list[dict[str, str]], shapes: list[str], processes: int) -> dict[tuple[str, ...], Any]:
    """What the calls of these rows launch, counted, by the columns that say which call."""
    from _forked import results
    from _model import suite, validation
    from _model.devices import DEVICES

    wanted = {tuple(row[name] for name in validation.CALL) for row in measured}
    ops = sorted({row["op"] for row in measured})

    def key(call: suite.Call) -> tuple[str, ...]:
        return call.op, call.case.model, call.case.label, call.layout, str(call.batch), call.dtype

    def count(call: suite.Call) -> tuple[Any, list[str]]:
        try:
            return suite.passes(call, DEVICES["H100"]), []
        except Exception as error:
            return [], [f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"]

    batches = sorted({int(row["batch"]) for row in measured})
    jobs = [call for call in suite.calls(ops, batches, ["bfloat16"], shapes) if key(call) in wanted]
    return {key(call): passes for call, passes in zip(jobs, results(count, jobs, processes))}


def report(found: list[dict[str, Any]], target: Path | None) -> int:
    """Write the rows and print what they come to; returns the exit status."""
    from _model import validation

    from mvkernels import files
    from mvkernels.report import table

    if target is not None:
        files.write_csv(target, list(found[0]), found)
    lines = validation.summary(found)
    print(table(lines, validation.SUMMARY))
    instructions = sorted(validation.instructions(found))
    if instructions:
        print(f"instructions of {len(instructions)} kernels, predicted over counted: {instructions[0]:.2f} to "
              f"{instructions[-1]:.2f}, median {instructions[len(instructions) // 2]:.3f}")  # fmt: skip
    ratios = [float(row["ratio"]) for row in found if row["half"] == "test"]
    near = sum(1 / MARGIN < ratio < MARGIN for ratio in ratios)
    print(f"{near} of {len(ratios)} kernels that were not fitted are within {MARGIN} of what was measured")
    return int(near < LEAST * len(ratios))


if __name__ == "__main__":
    sys.exit(main())
