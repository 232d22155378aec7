"""Whether the error criterion finds faults that kernels have had, planted into every sum and addition of every op.

Writes results/<device>/faults.csv, which benchmarks/pages.py puts into docs/numerics.md. Shapes: the small suite's.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
from _faults import FAULTS, plant
from _results import folder, write

from mvkernels import report
from mvkernels.commands import command
from mvkernels.dispatch.registry import OPS, Op

# In half types a result is rounded by more than these change it.
FLOAT32_ONLY = ("half", "tf32", "scale")


def measure(op: Op, dtype: str, suite: str) -> list[dict[str, Any]]:
    """A row for each fault: at how many places of the suite's shapes it changes a result, and is found."""
    faults = [fault for fault in FAULTS if dtype == "float32" or fault not in FLOAT32_ONLY]
    shares: dict[str, list[tuple[float, float]]] = {}
    for case in op.suite(suite):
        for row in plant(op, case.make(dtype=getattr(torch, dtype)), faults):
            if row["effect"]:
                shares.setdefault(row["fault"], []).append((row["share"], row["share_by_pytorch"]))
    return [
        {
            "op": op.name,
            "dtype": dtype,
            "fault": fault,
            "planted": len(found),
            "found": sum(share > 1 for share, _ in found),
            "found_by_pytorch": sum(share > 1 for _, share in found),
            "least_share": f"{min(share for share, _ in found):.3g}",
        }
        for fault, found in shares.items()
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", default="small", choices=("small", "full"))
    parser.add_argument("--dtype", nargs="+", default=["float32", "float16", "bfloat16"])
    parser.add_argument("--no-file", action="store_true", help="print only")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    work = [(op, dtype) for op in OPS.values() for dtype in options.dtype]
    progress = report.Progress(len(work))
    for op, dtype in work:
        progress.step(f"{op.name} {dtype}")
        rows += [{**report.machine("cpu"), **row} for row in measure(op, dtype, options.suite)]
    progress.close()
    shown = [name for name in rows[0] if name not in report.machine("cpu")]
    print(report.table([tuple(row[name] for name in shown) for row in rows], shown))
    if not options.no_file:
        write(rows, folder() / "faults.csv")
    return 0


if __name__ == "__main__":
    sys.exit(command.run("faults", main))
