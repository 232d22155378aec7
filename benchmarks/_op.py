"""The benchmark of one op against eager, SDPA and torch.compile, as each op's own file runs it."""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
import tempfile
from pathlib import Path

from _held import HELD, hold
from _results import folder, merge, stem

from mvkernels.commands import command

SAME = ("op", "model", "label", "batch", "dtype", "layout", "mode")
"""The columns that say which rows of a file a new measurement takes the place of."""


def run(op: str, description: str | None) -> int:
    """Measure an op and write its files; returns the exit status."""
    return command.run(op, lambda: _run(op, description))


def _run(op: str, description: str | None) -> int:
    """Two files for a CPU, for the two things that users meet: freed memory kept by the process (primary), and
    glibc's default allocator, where every large temporary is faulted in anew.

    A file keeps the rows that are not measured this time.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", default="full", choices=("small", "full"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", nargs="+", help="default: 1 8 on a CPU, 1 32 128 on a GPU")
    parser.add_argument("--dtype", nargs="+", help="default: float32 on a CPU, bfloat16 float32 on a GPU")
    parser.add_argument("--against", default="eager,sdpa,compile", help="as for `mvkernels bench`")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--min-time", default="0.5")
    parser.add_argument("--isa", choices=HELD, help="hold a CPU to this instruction set")
    parser.add_argument("--allocator", nargs="+", default=["kept", "default"], choices=("kept", "default"))
    options = parser.parse_args()
    cpu = options.device == "cpu"
    if options.isa and not cpu:
        parser.error("--isa is for a CPU")
    hold(options.isa, sys.argv)
    status = 0
    for allocator in options.allocator if cpu else ["default"]:
        name = op + ("" if allocator == "kept" or not cpu else "_default_allocator")
        target = folder(options.device) / stem(name, options.threads)
        line = [sys.executable, "-m", "mvkernels", "bench", op, "--suite", options.suite]
        line += ["--batch", *(options.batch or (["1", "8"] if cpu else ["1", "32", "128"]))]
        line += ["--dtype", *(options.dtype or (["float32"] if cpu else ["bfloat16", "float32"]))]
        line += ["--mode", "fwd", "full", "--device", options.device, "--threads", str(options.threads)]
        line += ["--against", options.against]
        line += ["--min-time", options.min_time, "--allocator", allocator]
        with tempfile.TemporaryDirectory() as place:
            measured = Path(place) / "rows.csv"
            status = max(status, subprocess.run([*line, "--csv", str(measured)], check=False).returncode)
            if not measured.exists():
                continue
            with measured.open(newline="") as file:
                merge(list(csv.DictReader(file)), Path(f"{target}.csv"), SAME)
        plot = [sys.executable, "-m", "mvkernels", "bench", "--read", f"{target}.csv", "--plot", f"{target}.png"]
        status = max(status, subprocess.run(plot, stdout=subprocess.DEVNULL, check=False).returncode)
    return status
