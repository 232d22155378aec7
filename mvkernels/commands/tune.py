"""``mvkernels tune``: measure launch configurations on this GPU and keep the best (see :mod:`mvkernels.tune`)."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from mvkernels import files
from mvkernels.commands.command import Parser, print_json, share
from mvkernels.dispatch.registry import OPS
from mvkernels.report import Progress, UsageError
from mvkernels.triton import configs
from mvkernels.tune import DTYPES, MOST, Finding, compile_case, save, tune_case, tune_choice


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="mvkernels tune", description="Measure launch configurations on this GPU and save the best.")
    parser.add_argument("--op", action="append", choices=list(OPS), help="only this op (repeatable)")
    parser.add_argument("--dtype", action="append", choices=list(DTYPES), help="only this dtype (repeatable)")
    parser.add_argument("--batch", type=int, default=32, metavar="N", help="batch of the suite's shapes (default 32)")
    parser.add_argument("--filter", nargs="+", default=[""], metavar="TEXT",
                        help="only shapes whose model or label contains one of these texts")  # fmt: skip
    parser.add_argument("--layout", choices=("channels_last", "channels_first"), help="only this layout (default: all)")
    parser.add_argument("--suite", choices=("small", "full"), default="full", help="which shapes (default full)")
    parser.add_argument("--min-time", type=float, default=0.1, metavar="S",
                        help="seconds to time each candidate (default 0.1)")  # fmt: skip
    parser.add_argument("--most", type=int, default=MOST, help=f"configurations to try per kernel (default {MOST})")
    parser.add_argument("--processes", type=int, help="processes that compile beforehand (default: one per core)")
    parser.add_argument("--compile", type=share, metavar="K/N", help="only compile: every N-th shape, starting at K")
    parser.add_argument("--output", type=Path, metavar="FILE",
                        help="file to write (default: mvkernels/configs/<device>.json)")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    return parser


def _compile_in(processes: int, argv: Sequence[str]) -> None:
    """Fill Triton's cache from several processes. What a failed process leaves out is compiled later."""
    line = [sys.executable, "-m", "mvkernels", "tune", *argv]
    started = [
        subprocess.Popen([*line, "--compile", f"{k}/{processes}"], stdout=subprocess.DEVNULL) for k in range(processes)
    ]
    for each in started:
        each.wait()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status. Raises UsageError if there is no GPU or nothing to tune."""
    options = _parser().parse_args(argv)
    if not torch.cuda.is_available():
        raise UsageError("tuning needs a CUDA or ROCm device, but torch finds none")
    if options.batch < 1:
        raise UsageError(f"--batch is {options.batch}, want 1 or more")
    device = configs.device_of("cuda", torch.cuda.current_device())
    path = options.output or configs.file_of(device.name)
    files.check(path)
    work = [
        (op, case, layout, dtype)
        for op in [OPS[name] for name in options.op or OPS]
        if "triton" in op.why_not
        for case in op.suite(options.suite)
        if any(text in f"{case.model} {case.label}" for text in options.filter)
        for layout in case.layouts
        if options.layout in (None, layout)
        for dtype in options.dtype or list(DTYPES)
    ]
    if not work:
        raise UsageError("no shape of the suite matches the options")
    processes = (os.cpu_count() or 1) if options.processes is None else options.processes
    if options.compile is None and processes > 1:
        _compile_in(processes, sys.argv[1:] if argv is None else argv)
    progress = Progress(len(work))
    done: set[tuple[str, str]] = set()
    everything: list[Finding] = []
    if options.compile is not None:
        work = work[options.compile[0] :: options.compile[1]]
    for op, case, layout, dtype in work:
        progress.step(f"{op.name} {case.label} {dtype}")
        arguments = case.make(batch=options.batch, dtype=DTYPES[dtype], device="cuda", layout=layout)
        if options.compile is not None:
            compile_case(op, arguments, done, options.most)
            continue
        for search in (partial(tune_case, most=options.most), tune_choice):
            findings = search(op, arguments, "cuda", done, options.min_time)
            save(path, op.name, findings, device)
            configs.forget()  # so that tune_choice uses what tune_case has found
            everything += findings
            if not options.json:
                for f in findings:
                    times = f"{f.default_us:.1f} us, {f.best_us:.1f} us" + (f" with {f.best}" if f.best else "")
                    print(f"{op.name}.{f.kernel} {f.key}: {times}; {f.tried} tried, {f.refused} refused", flush=True)
    progress.close()
    configs.forget()
    if options.compile is not None:
        return 0
    if options.json:
        print_json([vars(finding) for finding in everything])
    else:
        print(f"written to {path}")
    return 0
