"""How far each op is from float64, by dtype and backend, beside PyTorch with the same formula in the same dtype: what
it errs on this machine, and what it is expected to on any.

Writes results/<device>/numerics.csv, which benchmarks/pages.py puts into docs/numerics.md. Shapes: the small suite's.
And results/<device>/winograd.csv: the error of each way to compute a 3 x 3 convolution, at each shape of its suite.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from typing import Any

import torch
from _results import folder, write
from torch.nn.functional import conv2d

from mvkernels import report, testing
from mvkernels.commands import command
from mvkernels.dispatch import extension
from mvkernels.dispatch.backend import can_run
from mvkernels.dispatch.registry import OPS, Op
from mvkernels.ops import conv3x3
from mvkernels.verify import DTYPES


def measure(op: Op, dtype: str, suite: str, device: str) -> list[dict[str, Any]]:
    """A row for each backend: the worst of the shapes, its error, PyTorch's there and the expected one, and the largest
    share of what is allowed."""
    worst: dict[str, dict[str, tuple[float, ...]]] = {}
    shapes: dict[str, int] = {}
    for case in op.suite(suite):
        arguments = testing.normalised(op, case.make(batch=1, dtype=getattr(torch, dtype), device=device))
        every = list(testing.tensors_in(arguments))
        held, cotangent = testing.yardstick(op, arguments, every)
        for backend in ("reference", *op.why_not):
            if not can_run(op.name, backend, **arguments)[0]:
                continue
            wanted = every if op.has_backward(backend) else []
            shapes[backend] = shapes.get(backend, 0) + 1
            with testing.poisoned():
                actual = testing.run(partial(op.function, backend=backend), arguments, wanted, cotangent)
            found = worst.setdefault(backend, {})
            for one in held.compare(actual):
                what = "out" if one.name == "out" else "grad"
                *before, share = found.get(what, (0.0, 0.0, 0.0, 0.0))
                errors = (one.error, one.pytorch, held.expected_error(one.name)) if one.error >= before[0] else before
                found[what] = (*errors, max(share, one.error / one.allowed))
    columns = ("error", "error_pytorch", "error_expected", "share_of_allowed")
    return [
        {"op": op.name, "dtype": dtype, "backend": backend, "shapes": shapes[backend]}
        | {f"{what}_{c}": f"{value:.3g}" for what, values in found.items() for c, value in zip(columns, values)}
        | ({} if "grad" in found else {f"grad_{c}": "" for c in columns})
        for backend, found in worst.items()
    ]


def winograd() -> list[dict[str, Any]]:
    """A row for each shape of conv3x3, direct and by each of Winograd's algorithms: errors against float64 over the
    largest value of the result, and over its root mean square, and PyTorch's own."""
    found: list[dict[str, Any]] = []
    for case in OPS["conv3x3"].suite("full"):
        given = case.make(batch=1)
        maps = [given["x"]] if given.get("beside") is None else [given["x"], given["beside"]]
        x, (weight, bias), stride = torch.cat(maps, dim=1), (given["weight"], given.get("bias")), given["stride"]
        exact = conv2d(x.double(), weight.double(), None if bias is None else bias.double(), stride, 1)
        sizes = (x.shape[1], weight.shape[0], stride, *x.shape[-2:])
        results = {"pytorch": conv2d(x, weight, bias, stride, 1)}
        for tile in (0, 2, 4) if stride == 1 else (0,):
            packed = conv3x3.operators.pack(weight, bias, tile)
            out = conv3x3.operators.forward(x, None, packed, weight.shape[0], tile, stride, 0, None)
            results[f"F({tile} x {tile})" if tile else "direct"] = out
        taken = conv3x3.operators.tile_of(*sizes)
        for name, out in results.items():
            error = out.double() - exact
            found.append(
                {
                    "shape": f"{case.model} {case.label}",
                    "algorithm": name,
                    "taken": name == (f"F({taken} x {taken})" if taken else "direct"),
                    "max_error": f"{float(error.abs().max() / exact.abs().max()):.2e}",
                    "rms_error": f"{float(error.square().mean().sqrt() / exact.square().mean().sqrt()):.2e}",
                }
            )
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", default="small", choices=("small", "full"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--no-file", action="store_true", help="print only")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    work = [(op, dtype) for op in OPS.values() for dtype in DTYPES]
    progress = report.Progress(len(work))
    for op, dtype in work:
        progress.step(f"{op.name} {dtype}")
        rows += [{**report.machine(options.device), **r} for r in measure(op, dtype, options.suite, options.device)]
    progress.close()
    shown = [name for name in rows[0] if name not in report.machine(options.device)]
    print(report.table([tuple(row[name] for name in shown) for row in rows], shown))
    if not options.no_file:
        write(rows, folder(options.device) / "numerics.csv")
    if options.device == "cpu" and extension.module is not None:
        errors = [{**report.machine(options.device), **row} for row in winograd()]
        shown = ["shape", "algorithm", "taken", "max_error", "rms_error"]
        print(report.table([tuple(row[name] for name in shown) for row in errors], shown))
        if not options.no_file:
            write(errors, folder(options.device) / "winograd.csv")
    return 0


if __name__ == "__main__":
    sys.exit(command.run("numerics", main))
