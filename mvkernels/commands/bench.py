"""The command ``mvkernels bench``: it measures, prints tables, and writes files and plots."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from mvkernels import report
from mvkernels.bench import ab as bench_ab
from mvkernels.bench import compare as bench_compare
from mvkernels.bench import html
from mvkernels.bench import plots as bench_plots
from mvkernels.bench.measuring import MODES, PEERS, Options, Result, geomeans, measure, read_csv, write_csv
from mvkernels.bench.rows import Row
from mvkernels.dispatch.registry import OPS
from mvkernels.files import check as check_file


@dataclass(frozen=True)
class Files:
    """The files to read and write."""

    csv: str | None = None
    plot: str | None = None
    roofline: str | None = None
    read: str | None = None
    compare: str | None = None
    tolerance: float = bench_compare.TOLERANCE


# Options that cannot be combined with the options listed for them.
_ALONE = {
    "html": ("ab", "read", "compare", "csv", "plot", "roofline"),
    "ab": ("read", "compare", "csv", "plot", "roofline"),
    "read": ("csv",),
}


def command(options: argparse.Namespace, json: Callable[[Any], None] | None) -> int:
    """Returns 1 if a kernel of this library was wrong or has become slower."""
    for one, others in _ALONE.items():
        for other in others:
            if getattr(options, one) is not None and getattr(options, other) is not None:
                raise report.UsageError(f"--{other} cannot be combined with --{one}")
    if options.html is not None:
        return html.command(options.html, json)
    asked = Options(
        ops=options.op,
        suite=options.suite,
        labels=options.shape,
        batches=options.batch,
        modes=options.mode,
        dtypes=options.dtype,
        layouts=options.layout,
        backends=options.backend,
        against=options.against,
        device=options.device,
        threads=options.threads,
        rounds=options.rounds,
        min_time=options.min_time,
        memory=not options.no_memory,
    )
    if options.ab is not None:
        return ab_command(asked, options.ab, options.tolerance, json)
    files = Files(options.csv, options.plot, options.roofline, options.read, options.compare, options.tolerance)
    return report_on(asked, files, json)


def report_on(options: Options, files: Files, json: Callable[[Any], None] | None) -> int:
    """Measure, print, write files. Returns 1 if a kernel of this library was wrong or has become slower, else 0."""
    if files.read is None:
        check(options)
    for path in (files.csv, files.plot, files.roofline):
        if path is not None:
            check_file(path)
    for option, path in (("--plot", files.plot), ("--roofline", files.roofline)):
        if path is not None:
            bench_plots.check_kind(option, path)
    old = None if files.compare is None else _rows(files.compare)
    if files.read is not None:
        result = Result(rows=_rows(files.read))
    else:
        csv = files.csv
        result = measure(options, None if csv is None else lambda so_far: write_csv(so_far.rows, csv))
    if files.plot is not None:
        bench_plots.draw(result.rows, files.plot)
    if files.roofline is not None:
        bench_plots.roofline(result.rows, files.roofline)
    changes = [] if old is None else bench_compare.compare(old, result.rows, files.tolerance)
    if json is not None:
        rates = {
            name: {"copy_b_s": r.copy, "matmul_flop_s": r.matmul, "fma_flop_s": r.fma}
            for name, r in result.rates.items()
        }
        machine = report.machine(options.device)
        machine["threads"] = str(options.threads)
        document = {
            "machine": machine,
            "rates": rates,
            "rows": [asdict(row) for row in result.rows],
            "summary": geomeans(result.rows),
            "not_run": result.not_run,
        }
        if old is not None:
            document["changes"] = [asdict(change) for change in changes]
        json(document)
    else:
        print(text(result))
        if old is not None:
            print()
            print(bench_compare.text(changes, bench_compare.drift(old, result.rows)))
    for row in result.wrong:
        print(f"mvkernels bench: {row.op} {row.label} on {row.provider}: {row.note}", file=sys.stderr)
    regressed = sum(change.regressed for change in changes)
    if regressed:
        print(f"mvkernels bench: {regressed} rows have regressed against {files.compare}", file=sys.stderr)
    return 1 if result.wrong or regressed else 0


def _rows(path: str) -> list[Row]:
    rows = read_csv(path)
    if not rows:
        raise report.UsageError(f"{path} has no rows")
    return rows


def ab_command(options: Options, commit: str, tolerance: float, json: Callable[[Any], None] | None) -> int:
    """Compare this checkout with another commit. 1 if it is slower or wrong somewhere, or if no row has both times."""
    check(options)
    rows = bench_ab.run(options, commit, tolerance)
    if not rows:
        raise report.UsageError("no shape of the suite matches the options")
    json({"against": commit, "rows": bench_ab.as_json(rows)}) if json is not None else print(
        bench_ab.text(rows, commit)
    )
    if all(row.ratio is None for row in rows):
        print(f"mvkernels bench: no row has a time on both sides: {rows[0].verdict}", file=sys.stderr)
        return 1
    return 1 if any(row.regressed for row in rows) else 0


def check(options: Options) -> None:
    """Check the options before anything runs. Raises UsageError."""
    for name in options.ops:
        if name not in OPS:
            raise report.UsageError(f"unknown op {name!r}, want one of {', '.join(OPS)}")
    for peer in options.against:
        if peer not in PEERS:
            raise report.UsageError(f"unknown peer {peer!r}, want some of {', '.join(PEERS)}")
    for mode in options.modes:
        if mode not in MODES:
            raise report.UsageError(f"unknown mode {mode!r}, want some of {', '.join(MODES)}")
    report.check_device(options.device)
    for name in options.ops or report.ops_with(options.backends):
        report.check_backends(name, options.backends, options.device)


def text(result: Result) -> str:
    """The results as tables of text."""
    rows = result.rows
    first = rows[0]
    lines = [
        f"{first.device} ({first.capability}), {first.threads} thread{'s' if first.threads > 1 else ''}, "
        f"torch {first.torch}, mvkernels {first.mvkernels} {first.commit}, allocator {first.allocator}",
    ]
    for dtype, rates in result.rates.items():
        peak = "" if rates.fma is None else f", multiply-adds {rates.fma / 1e9:.0f} GFLOP/s"
        lines.append(f"{dtype}: copy {rates.copy / 1e9:.1f} GB/s, matmul {rates.matmul / 1e9:.0f} GFLOP/s{peak}")
    lines.append("")
    shapes = [
        (
            f"{r.model} {r.label}",
            r.batch,
            r.dtype,
            "last" if r.layout == "channels_last" else "first",
            r.mode,
            r.provider,
            _us(r.median_us),
            _us(r.min_us),
            None if r.median_low_us is None else f"{_us(r.median_low_us)}..{_us(r.median_high_us)}",
            None if r.speedup_median is None else f"{r.speedup_median:.2f}x",
            None if r.speedup_min is None else f"{r.speedup_min:.2f}x",
            None if r.fraction_of_floor is None else f"{100 * r.fraction_of_floor:.0f}%",
            None if r.gb_s is None else f"{r.gb_s:.3g}",
            None if r.tflop_s is None else f"{r.tflop_s:.3g}",
            None if r.fraction_of_fma is None else f"{100 * r.fraction_of_fma:.0f}%",
            report.megabytes(r.peak_bytes),
            None if r.error is None else f"{r.error:.1e}",
            _clip(r.note),
        )
        for r in rows
    ]
    header = ("shape", "batch", "dtype", "channels", "mode", "provider", "median us", "min us", "95 % of median",
              "x median", "x min", "of floor", "GB/s", "TFLOP/s", "of peak", "peak MB", "error", "note")  # fmt: skip
    lines += [report.table(shapes, header), ""]
    summary = [tuple(s.values()) for s in geomeans(rows)]
    if summary:
        names = ("op", "mode", "dtype", "provider", "tokens", "shapes", "x of medians", "x of minima", "worst")
        lines += ["Speed-up over the best peer, geometric mean:", report.table(summary, names)]
    lines += [f"not run: {backend}: {reason}" for backend, reason in result.not_run.items()]
    return "\n".join(lines)


def _us(value: float | None) -> str:
    return "-" if value is None else report.microseconds(value * 1e-6)


def _clip(note: str) -> str:
    return note if len(note) <= 80 else note[:77] + "..."
