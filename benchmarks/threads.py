"""How the C++ kernels scale with threads: the same call on one thread and on several, interleaved.

Believe it only on a quiet machine: with every core in use, a barrier waits for whoever else runs.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from _held import HELD, hold
from _results import folder, keep_pages, show, write

from mvkernels import report
from mvkernels.bench import timing
from mvkernels.commands import command
from mvkernels.dispatch.registry import OPS


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--suite", default="small", choices=("small", "full"))
    parser.add_argument("--min-time", type=float, default=0.5)
    parser.add_argument("--no-file", action="store_true", help="print only")
    parser.add_argument("--isa", choices=HELD, help="hold the processor to this instruction set")
    options = parser.parse_args()
    hold(options.isa, sys.argv)
    keep_pages()
    rows = []
    for op in (OPS[name] for name in report.ops_with(["cpp"])):
        for case in op.suite(options.suite):
            for batch in options.batch:
                arguments = case.make(batch=batch)
                if op.pack is not None:  # as callers do: once, not in each call
                    arguments["packed"] = op.pack(arguments)

                def on(threads: int, arguments: dict[str, Any] = arguments, op: Any = op) -> Callable[[], Any]:
                    def call() -> Any:
                        torch.set_num_threads(threads)
                        return op.function(**arguments, backend="cpp")

                    return call

                with torch.no_grad():
                    times = timing.interleave({"1": on(1), "n": on(options.threads)}, min_time=options.min_time)
                rows.append(
                    {
                        **report.machine(),
                        "threads": options.threads,
                        "op": op.name,
                        "model": case.model,
                        "label": case.label,
                        "batch": batch,
                        "one_thread_us": round(times["1"].median * 1e6, 2),
                        "threads_us": round(times["n"].median * 1e6, 2),
                        "scaling_median": round(times["1"].median / times["n"].median, 3),
                        "scaling_min": round(times["1"].min / times["n"].min, 3),
                    }
                )
    shown = ("op", "model", "label", "batch", "threads", "one_thread_us", "threads_us", "scaling_median", "scaling_min")
    show(rows, shown)
    if not options.no_file:
        write(rows, folder() / "threads.csv")
    return 0


if __name__ == "__main__":
    sys.exit(command.run("threads", main))
