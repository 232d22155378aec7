"""Several ops in one process against eager, SDPA and torch.compile: what `benchmarks/<op>.py` measures, on a GPU, where
starting a process for each op takes longer than measuring it. Rows go to the ops' files after every shape.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict

import torch
from _op import SAME
from _results import folder, merge

from mvkernels import bench, report
from mvkernels.commands import command
from mvkernels.dispatch.registry import OPS


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", nargs="+", choices=list(OPS), help="default: those with a Triton kernel")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--suite", default="full", choices=("small", "full"))
    parser.add_argument("--shape", nargs="+", default=[], metavar="PART", help="only shapes whose name has this in it")
    parser.add_argument("--batch", nargs="+", type=int, default=[128, 1])
    parser.add_argument("--mode", nargs="+", default=["fwd", "full"], choices=bench.MODES)
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"])
    parser.add_argument("--layout", nargs="+", default=[], choices=("channels_last", "channels_first"))
    parser.add_argument("--against", default="eager,sdpa", help="as for `mvkernels bench`")
    parser.add_argument("--min-time", type=float, default=0.03)
    options = parser.parse_args()
    if torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
        raise report.UsageError("there is no CUDA device")
    asked = bench.Options(
        ops=options.op or report.ops_with(["triton"]),
        suite=options.suite, labels=options.shape, batches=options.batch, modes=options.mode,
        dtypes=options.dtype, layouts=options.layout, against=options.against.split(","), device=options.device,
        min_time=options.min_time,
    )  # fmt: skip
    written = 0

    def save(result: bench.Result) -> None:
        nonlocal written
        rows = [asdict(row) for row in result.rows[written:]]
        written = len(result.rows)
        for op in {row["op"] for row in rows}:
            found = [{key: "" if value is None else value for key, value in row.items()} for row in rows]
            merge([row for row in found if row["op"] == op], folder(options.device) / f"{op}.csv", SAME)

    result = bench.measure(asked, save)
    for row in result.wrong:
        print(f"wrong: {row.shape}: {row.note}", file=sys.stderr)
    return int(bool(result.wrong))


if __name__ == "__main__":
    sys.exit(command.run("ops", main))
