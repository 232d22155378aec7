"""How far each op is from float64, by dtype and backend, beside PyTorch with the same formula in the same dtype: what
it errs on this machine, and what it is expected to on any.

Writes results/<device>/numerics.csv, which benchmarks/pages.py puts into docs/numerics.md. Shapes: the small suite's.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from typing import Any

import torch
from _results import folder, write

from mvkernels import report, testing
from mvkernels.backend import BACKENDS, can_run
from mvkernels.registry import OPS
from mvkernels.verify import DTYPES


def measure(op: Any, dtype: str, backend: str, suite: str, device: str) -> dict[str, Any] | None:
    """The worst of the shapes: its error, PyTorch's and the expected one there, and the largest share of allowed."""
    worst: dict[str, tuple[float, ...]] = {}
    shapes = 0
    for case in op.suite(suite):
        arguments = testing.normalised(op, case.make(batch=1, dtype=getattr(torch, dtype), device=device))
        if not can_run(op.name, backend, **arguments)[0]:
            continue
        shapes += 1
        wanted = list(testing.tensors_in(arguments))
        held, cotangent = testing.yardstick(op, arguments, wanted)
        with testing.poisoned():
            actual = testing.run(partial(op.function, backend=backend), arguments, wanted, cotangent)
        for found in held.compare(actual):
            what = "out" if found.name == "out" else "grad"
            *before, share = worst.get(what, (0.0, 0.0, 0.0, 0.0))
            errors = (
                (found.error, found.pytorch, held.expected_error(found.name)) if found.error >= before[0] else before
            )
            worst[what] = (*errors, max(share, found.error / found.allowed))
    if not shapes:
        return None
    row: dict[str, Any] = {"op": op.name, "dtype": dtype, "backend": backend, "shapes": shapes}
    for what, values in worst.items():
        columns = ("error", "error_pytorch", "error_expected", "share_of_allowed")
        row |= {f"{what}_{column}": f"{value:.3g}" for column, value in zip(columns, values)}
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
    sys.exit(main())
