"""How far each op is from float64, by dtype and backend, against PyTorch doing the same formula in the same dtype.

Writes results/<device>/numerics.csv, which benchmarks/pages.py puts into docs/numerics.md. Shapes: the small suite's.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
from _results import folder, write

from mvkernels import command, report, testing
from mvkernels.backend import BACKENDS, can_run
from mvkernels.registry import OPS
from mvkernels.verify import DTYPES


def measure(op: Any, dtype: str, backend: str, suite: str, device: str) -> dict[str, Any] | None:
    """The worst of the suite's shapes: error, PyTorch's error there, and the largest share of the allowance."""
    worst: dict[str, tuple[float, float, float]] = {}
    shapes = 0
    for case in op.suite(suite):
        arguments = case.make(batch=1, dtype=getattr(torch, dtype), device=device)
        if not can_run(op.name, backend, **arguments)[0]:
            continue
        shapes += 1
        for found in testing.check(op, arguments, backend):
            what, factor = ("out", testing.FORWARD_FACTOR) if found.name == "out" else ("grad", testing.BACKWARD_FACTOR)
            pytorch = (found.allowed - testing.FLOOR) / factor
            new = (found.error, pytorch, found.error / found.allowed)
            error, baseline, share = worst.get(what, (0.0, 0.0, 0.0))
            first = new if new[0] >= error else (error, baseline, 0.0)
            worst[what] = (first[0], first[1], max(share, new[2]))
    if not shapes:
        return None
    row: dict[str, Any] = {"op": op.name, "dtype": dtype, "backend": backend, "shapes": shapes}
    for what, values in worst.items():
        names = (f"{what}_error", f"{what}_error_pytorch", f"{what}_share_of_allowed")
        row |= {name: f"{value:.3g}" for name, value in zip(names, values)}
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", default="small", choices=("small", "full"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--no-file", action="store_true", help="print only")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    work = [(op, dtype, backend) for op in OPS.values() for dtype in DTYPES for backend in BACKENDS]
    progress = report.Progress(len(work))
    for op, dtype, backend in work:
        progress.step(f"{op.name} {dtype} {backend}")
        if backend != "reference" and backend not in op.why_not:
            continue
        row = measure(op, dtype, backend, options.suite, options.device)
        if row is not None:
            rows.append({**report.machine(options.device), **row})
    progress.close()
    shown = [name for name in rows[0] if name not in report.machine(options.device)]
    print(report.table([tuple(row[name] for name in shown) for row in rows], shown))
    if not options.no_file:
        write(rows, folder(options.device) / "numerics.csv")
    return 0


if __name__ == "__main__":
    sys.exit(command.run("numerics", main))
