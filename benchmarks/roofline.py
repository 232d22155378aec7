"""What GPUs could do at best: a time for each shape of each op from the floors and the data sheets, without a GPU.

A call takes at least as long as its bytes at the peak of the memory, its products at the peak of the matrix units,
and its exponentials at the peak of the special-function units; the largest of the three is the prediction. A launch
is not in it, nor is a cache that keeps the inputs: a measured time may come near it at large batches, and not below
it unless everything fits the L2 cache. GPU runs are held against ``results/audit/roofline.csv``; `make audit`
writes it.

``--check`` writes nothing and exits with 1 if the file is not what the ops' floors give now.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import mvkernels  # noqa: F401  (registers the ops)
from mvkernels import files, report
from mvkernels.commands import command
from mvkernels.dispatch.registry import OPS

TARGET = Path(__file__).parent / "results" / "audit" / "roofline.csv"


@dataclass(frozen=True)
class Peaks:
    """Of a data sheet: dense, without sparsity."""

    bytes: float
    """Per second, of the memory."""
    flops: dict[str, float]
    """Per second, by dtype: float32 exact, as the kernels have it by default, not TF32."""
    exponentials: float
    """Per second: 16 for each multiprocessor and clock (CUDA C++ Programming Guide, arithmetic instructions)."""


# NVIDIA A100 80GB SXM, H100 SXM5 and H200 SXM data sheets; multiprocessors and boost clock for the exponentials.
DEVICES = {
    "A100": Peaks(2.039e12, {"bfloat16": 312e12, "float32": 19.5e12}, 16 * 108 * 1.41e9),
    "H100": Peaks(3.35e12, {"bfloat16": 989.4e12, "float32": 66.9e12}, 16 * 132 * 1.98e9),
    "H200": Peaks(4.8e12, {"bfloat16": 989.4e12, "float32": 66.9e12}, 16 * 132 * 1.98e9),
}
BATCHES = (1, 128)
MODES = {"fwd": (False,), "bwd": (True,)}


def rows() -> list[dict[str, Any]]:
    """A row for each device, shape, batch, dtype and mode, of the ops that have a kernel there."""
    found = []
    for op in (OPS[name] for name in report.ops_with(["triton"])):
        for case in op.suite("full"):
            for batch in BATCHES:
                for dtype in ("bfloat16", "float32"):
                    one = case.make(batch=1, dtype=getattr(torch, dtype), device="meta")
                    arguments = {name: _batched(name in op.maps, value, batch) for name, value in one.items()}
                    costs = {backward: op.cost(arguments, backward) for backward in (False, True)}
                    for device, peaks in DEVICES.items():
                        for mode, passes in MODES.items():
                            if any(passes) and not op.has_backward("triton"):
                                continue
                            what = {"device": device, "op": op.name, "model": case.model, "label": case.label}
                            found.append(
                                what
                                | {"batch": batch, "dtype": dtype, "mode": mode}
                                | predict([costs[backward] for backward in passes], peaks, dtype)
                            )
    return found


def _batched(is_map: bool, value: Any, batch: int) -> Any:
    """Tensors of one picture as those of a batch, without making it: all but weights and biases have a batch."""
    if not isinstance(value, torch.Tensor) or value.dim() < 4:
        return value
    return value.expand(batch, *value.shape[1:]) if is_map or value.shape[0] == 1 else value


def predict(costs: list[Any], peaks: Peaks, dtype: str) -> dict[str, Any]:
    """Microseconds of each bound, summed over the passes, and of the call; what bounds it."""
    each = [
        {
            "memory": cost.bytes / peaks.bytes * 1e6,
            "products": cost.flops / peaks.flops[dtype] * 1e6,
            "exponentials": cost.exponentials / peaks.exponentials * 1e6,
        }
        for cost in costs
    ]
    total = {name: sum(times[name] for times in each) for name in each[0]}
    return {
        "bytes": sum(cost.bytes for cost in costs),
        "flops": sum(cost.flops for cost in costs),
        "exponentials": sum(cost.exponentials for cost in costs),
        **{f"{name}_us": f"{value:.4g}" for name, value in total.items()},
        "predicted_us": f"{sum(max(times.values()) for times in each):.4g}",
        "bound": max(total, key=lambda name: total[name]),
    }


def text() -> str:
    """The file."""
    found = rows()
    out = io.StringIO()
    writer = csv.DictWriter(out, list(found[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(found)
    return out.getvalue()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    wanted = text()
    if not options.check:
        files.write(TARGET, wanted)
        print(f"written: {TARGET}", file=sys.stderr)
    elif not TARGET.exists() or TARGET.read_text() != wanted:
        print("roofline.csv is not what the ops' floors give: run benchmarks/roofline.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(command.run("roofline", main))
