"""What the time of a C++ kernel goes to: packing, products, exponentials, stores and the call, beside its floor.

Each op runs at each shape of its suite for a while, and perf (the tool of Linux) samples where the processor is. A
sample counts for a part by the name of the function: products, exponentials, convolutions, and what reads and writes
maps are functions of their own. The floor is the time that the FLOPs and the exponentials of a call take at the rates
measured in this run, one after the other since both need the same units, or that of its bytes at the copy bandwidth,
whichever is longer.
"""

from __future__ import annotations

import argparse
import bisect
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from _held import HELD, hold
from _op import SAME
from _operators import of_call
from _results import folder, keep_pages, merge, show

from mvkernels import report
from mvkernels.bench import size_class, timing
from mvkernels.commands import command
from mvkernels.dispatch import extension
from mvkernels.dispatch.registry import OPS, Case, Op

ATTENTION = (
    "patch_attention",
    "mobile_to_former",
    "former_to_mobile",
    "relu_linear_attention",
    "multiscale_linear_attention",
)
PARTS = {
    "products": r"(tile|dots|dots_tile|weigh|weigh_tile|spread|spread_tile|spread_of|spread_rows|sums|sums_of|sums_tile"
    r"|sums_of_few|sums_at_once|scores|product\w*|sum_over_queries|row_scores|add_keys|reciprocals)",
    "exponentials": r"(exponentials|exponentials_of_row|probabilities|softmax|derivatives)",
    "convolutions": r"(depthwise\w*|convolve\w*)",
    "packing": r"(pack_\w+|take\w*|turn|panel|panel_of|tokens|tokens_of|transposed_tokens|by_tokens)",
    "stores": r"(unpack_\w+|put\w*|add_to_dbias)",
}
"""The functions that a part has; a kernel's other functions are its rest, and what is not a kernel the call."""
NAMES = (*PARTS, "rest", "call")
_SECONDS, _HERTZ = 0.3, 4000
_ROUNDS = 300_000


@cache  # there are many samples, of few functions
def part_of(symbol: str, library: str) -> str:
    """The part that a sample in a function of a shared library counts for."""
    if not library.startswith("_C."):
        return "call"
    name = re.sub(r"\(.*", "", symbol.replace("(anonymous namespace)::", ""))
    while "<" in (plain := re.sub(r"<[^<>]*>", "", name)) and plain != name:
        name = plain
    function = plain.rsplit("::", 1)[-1]
    return next((part for part, functions in PARTS.items() if re.fullmatch(functions, function)), "rest")


def samples(lines: Iterable[str]) -> list[tuple[float, str]]:
    """(seconds, part) of the lines of ``perf script -F time,ip,sym,dso``."""
    found = []
    for line in lines:
        match = re.match(r"\s*(\d+\.\d+):\s+[0-9a-f]+\s+(.*) \(([^()]*)\)\s*$", line)
        if match:
            found.append((float(match[1]), part_of(match[2], Path(match[3]).name)))
    return found


def shares(found: Sequence[tuple[float, str]], begin: float, end: float) -> dict[str, float]:
    """How the samples of a time are divided among the parts, and how many there are."""
    first, last = (bisect.bisect_left(found, when, key=lambda sample: sample[0]) for when in (begin, end))
    taken = found[first:last]
    counts = Counter(part for _, part in taken)
    return {part: counts[part] / max(len(taken), 1) for part in NAMES} | {"samples": len(taken)}


def calls(op: Op, case: Case, layout: str) -> dict[str, tuple[Callable[[], Any], float, float, int]]:
    """By mode: the call of the operator, and its FLOPs, exponentials and bytes."""
    arguments = case.make(batch=1, layout=layout)
    found = {}
    for mode, kernel, given in of_call(op, arguments):
        cost = op.cost(arguments, mode == "bwd")
        found[mode] = (partial(kernel, *given), cost.flops, cost.exponentials, cost.bytes)
    return found


def run(names: Sequence[str], suite: str) -> None:
    """Print a line of JSON for each call: what it is, when it ran and how long it took."""
    torch.set_num_threads(1)
    rates, module = timing.measure_rates(), extension.module
    if module is None or rates.fma is None:
        raise report.UsageError(extension.reason)
    count = module.exponentials(1)[0] * _ROUNDS
    peak = count / timing.interleave({"exp": lambda: module.exponentials(_ROUNDS)}, rounds=7)["exp"].min
    for name in names:
        for case in OPS[name].suite(suite):
            for layout in case.layouts:
                for mode, (call, flops, exponentials, moved) in calls(OPS[name], case, layout).items():
                    with torch.no_grad():
                        best = timing.interleave({"call": call}, min_time=0.05)["call"].min
                        begin = time.monotonic()
                        while time.monotonic() < begin + _SECONDS:
                            for _ in range(max(1, round(1e-4 / best))):
                                call()
                        end = time.monotonic()
                    floor = max(flops / rates.fma + exponentials / peak, moved / rates.copy)
                    row = {
                        **report.machine(),
                        "threads": 1,
                        "op": name,
                        "model": case.model,
                        "label": case.label,
                        "size_class": size_class(case),
                        "batch": 1,
                        "dtype": "float32",
                        "layout": layout,
                        "mode": mode,
                        "min_us": round(best * 1e6, 2),
                        "floor_us": round(floor * 1e6, 2),
                        "fraction_of_floor": round(floor / best, 3),
                        "fma_gflop_s": round(rates.fma / 1e9, 1),
                        "exp_g_s": round(peak / 1e9, 2),
                        "copy_gb_s": round(rates.copy / 1e9, 1),
                    }
                    print(json.dumps({"begin": begin, "end": end, "row": row}), flush=True)


def output_of(command: Sequence[str]) -> list[str]:
    """The lines that a command prints. Raises UsageError if it fails."""
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise report.UsageError(f"{' '.join(command[:2])} ended with status {done.returncode}")
    return done.stdout.splitlines()


def main() -> int:
    """Profile the ops and write parts.csv."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", nargs="+", choices=ATTENTION, default=ATTENTION)
    parser.add_argument("--suite", default="full", choices=("small", "full"))
    parser.add_argument("--isa", choices=HELD, help="hold the processor to this instruction set")
    parser.add_argument("--no-file", action="store_true", help="print only")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    hold(options.isa, sys.argv)
    keep_pages()
    if options.child:
        run(options.op, options.suite)
        return 0
    perf = shutil.which("perf")
    if perf is None:
        raise report.UsageError("perf, the profiler of Linux, is not installed")
    with tempfile.TemporaryDirectory() as place:
        data = str(Path(place) / "perf.data")
        child = [sys.executable, __file__, "--child", "--suite", options.suite, "--op", *options.op]
        record = [perf, "record", "-q", "-F", str(_HERTZ), "-e", "cpu-clock", "-k", "CLOCK_MONOTONIC", "-o", data]
        ran = output_of([*record, "--", *child])
        found = samples(output_of([perf, "script", "-i", data, "-F", "time,ip,sym,dso", "--ns"]))
    if not any(part in PARTS for _, part in found):
        raise report.UsageError("perf found none of the kernels' functions by name")
    rows = []
    for line in ran:
        one = json.loads(line)
        divided = shares(found, one["begin"], one["end"])
        if not divided["samples"]:
            raise report.UsageError(f"perf has no sample of {one['row']['op']} {one['row']['label']}")
        rows.append(one["row"] | {part: round(share, 4) for part, share in divided.items()})
    show(rows, ("op", "label", "layout", "mode", "min_us", "fraction_of_floor", *NAMES))
    if not options.no_file:
        merge(rows, folder() / "parts.csv", SAME)
    return 0


if __name__ == "__main__":
    sys.exit(command.run("parts", main))
