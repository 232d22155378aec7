"""Where "auto" is to take CUDA C++ rather than Triton, by the times that results/audit/prediction.csv has of both.

Writes mvkernels/cuda/predicted.json: by architecture, op and class of keys (mvkernels.cuda.choice), how many times as
fast CUDA C++ is predicted to be, the least of the calls of a class. Of calls that record a gradient the forward and the
backward count together. ``--check`` writes nothing and exits with 1 if the file is not what the predictions give.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from _model.devices import DEVICES

from mvkernels import files
from mvkernels.commands import command
from mvkernels.cuda import choice
from mvkernels.dispatch.registry import OPS
from mvkernels.triton import configs

PREDICTION = Path(__file__).parent / "results" / "audit" / "prediction.csv"
SAME = ("device", "op", "model", "label", "batch", "dtype", "layout")


def times_as_fast(rows: list[dict[str, str]]) -> dict[str, dict[str, dict[str, float]]]:
    """What the file has, of the rows of predictions."""
    calls: dict[tuple[str, ...], dict[tuple[str, str], float]] = defaultdict(dict)
    for row in rows:
        if row["kernel"] == "all":
            calls[tuple(row[name] for name in SAME)][row["backend"], row["mode"]] = float(row["predicted_us"])
    found: dict[str, dict[str, dict[str, float]]] = {}
    for (device, op, model, label, _, dtype, layout), us in calls.items():
        for grad, modes in ((False, ("fwd",)), (True, ("fwd", "bwd"))):
            if not all((backend, mode) in us for backend in ("triton", "cuda") for mode in modes):
                continue
            triton, cuda = (sum(us[backend, mode] for mode in modes) for backend in ("triton", "cuda"))
            arch = DEVICES[device].arch
            kind = _class_of(device, op, model, label, dtype, layout, grad)
            of = found.setdefault(arch, {}).setdefault(op, {})
            of[kind] = round(min(of.get(kind, triton / cuda), triton / cuda), 2)
    return {arch: {op: dict(sorted(of.items())) for op, of in sorted(ops.items())} for arch, ops in found.items()}


def _class_of(device: str, op: str, model: str, label: str, dtype: str, layout: str, grad: bool) -> str:
    case = next(each for each in OPS[op].suite("full") if (each.model, each.label) == (model, label))
    arguments = case.make(batch=1, dtype=getattr(torch, dtype), device="cpu", layout=layout)
    known = DEVICES[device]
    pretended = configs.Device(known.name, known.arch, known.processors)
    with mock.patch.object(configs, "device_of", lambda *_: pretended):
        return configs.class_of(choice.key_of(OPS[op], arguments, grad))


def text() -> str:
    """The file."""
    with PREDICTION.open(newline="") as file:
        found: dict[str, Any] = {"times_as_fast": times_as_fast(list(csv.DictReader(file)))}
    return json.dumps(found, indent=1) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    wanted = text()
    if not options.check:
        files.write(choice.PREDICTED, wanted)
        print(f"written: {choice.PREDICTED}", file=sys.stderr)
    elif choice.PREDICTED.read_text() != wanted:
        print("predicted.json is not what prediction.csv gives: run benchmarks/choice.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(command.run("choice", main))
