"""What ``mvkernels bench`` prints and draws."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from mvkernels import report
from mvkernels.backend import can_run
from mvkernels.bench import MODES, PEERS, Options, Result, Row, geomeans, measure, write_csv
from mvkernels.registry import OPS


def command(options: Options, csv: str | None, plot: str | None, json: Callable[[Any], None] | None) -> int:
    """Measure, print, write files. 1 if a kernel of this library was wrong, else 0."""
    check(options)
    for path in (csv, plot):
        if path is not None:
            check_file(path)
    if plot is not None:
        known = pyplot().gcf().canvas.get_supported_filetypes()
        if Path(plot).suffix[1:] not in known:
            raise report.UsageError(f"--plot {plot}: want a name that ends in one of {', '.join(sorted(known))}")
    result = measure(options, (lambda so_far: write_csv(so_far.rows, csv)) if csv is not None else None)
    if plot is not None:
        draw(result.rows, plot)
    if json is not None:
        rates = {name: {"copy_b_s": r.copy, "matmul_flop_s": r.matmul} for name, r in result.rates.items()}
        machine = report.machine(options.device)
        machine["threads"] = str(options.threads)
        json(
            {
                "machine": machine,
                "rates": rates,
                "rows": [asdict(row) for row in result.rows],
                "summary": geomeans(result.rows),
                "not_run": result.not_run,
            }
        )
    else:
        print(text(result))
    for row in result.wrong:
        print(f"mvkernels bench: {row.op} {row.label} on {row.provider}: {row.note}", file=sys.stderr)
    return 1 if result.wrong else 0


def check(options: Options) -> None:
    """Refuse before anything runs: raises UsageError."""
    for name in options.ops:
        if name not in OPS:
            raise report.UsageError(f"unknown op {name!r}, want one of {', '.join(OPS)}")
    for peer in options.against:
        if peer not in PEERS:
            raise report.UsageError(f"unknown peer {peer!r}, want some of {', '.join(PEERS)}")
    for mode in options.modes:
        if mode not in MODES:
            raise report.UsageError(f"unknown mode {mode!r}, want some of {', '.join(MODES)}")
    check_device(options.device)
    for name in options.ops or OPS:
        check_backends(name, options.backends, options.device)


def check_file(path: str) -> None:
    """Raise UsageError unless a file can be written there; makes its folder."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        there = Path(path).exists()
        Path(path).open("a").close()
        if not there:
            Path(path).unlink()
    except OSError as error:
        raise report.UsageError(f"{path} cannot be written: {error.strerror}") from None


def check_device(device: str) -> None:
    """Raise UsageError unless tensors live there, with values."""
    try:
        torch.empty(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise report.UsageError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from None


def check_backends(op: str, backends: Sequence[str], device: str) -> None:
    """Raise UsageError, with the reason, if a backend that was named runs no shape of an op's suite."""
    arguments = OPS[op].suite("small")[0].make(device=device)
    for backend in backends:
        able, reason = can_run(op, backend, **arguments)
        if not able:
            raise report.UsageError(f"{op}: backend {backend} cannot run: {reason}")


def text(result: Result) -> str:
    """The tables for a reader."""
    rows = result.rows
    first = rows[0]
    lines = [
        f"{first.device} ({first.capability}), {first.threads} thread{'s' if first.threads > 1 else ''}, "
        f"torch {first.torch}, mvkernels {first.mvkernels} {first.commit}, allocator {first.allocator}",
    ]
    for dtype, rates in result.rates.items():
        lines.append(f"{dtype}: copy {rates.copy / 1e9:.1f} GB/s, matmul {rates.matmul / 1e9:.0f} GFLOP/s")
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
            None if r.p20_us is None else f"{_us(r.p20_us)}..{_us(r.p80_us)}",
            None if r.speedup_median is None else f"{r.speedup_median:.2f}x",
            None if r.speedup_min is None else f"{r.speedup_min:.2f}x",
            None if r.fraction_of_floor is None else f"{100 * r.fraction_of_floor:.0f}%",
            report.megabytes(r.peak_bytes),
            None if r.error is None else f"{r.error:.1e}",
            _clip(r.note),
        )
        for r in rows
    ]
    header = ("shape", "batch", "dtype", "channels", "mode", "provider", "median us", "min us", "p20..p80", "x median",
              "x min", "of floor", "peak MB", "error", "note")  # fmt: skip
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


def pyplot() -> Any:
    """matplotlib without a display; UsageError where it is missing."""
    try:
        import matplotlib
    except ImportError:
        raise report.UsageError("--plot needs matplotlib: pip install 'mvkernels[bench]'") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def draw(rows: Sequence[Row], path: str | Path) -> None:
    """Bars of speed-up over the best peer, a panel for each op and mode."""
    plt = pyplot()
    rows = [r for r in rows if r.speedup_median is not None]
    panels = list(dict.fromkeys((r.op, r.mode, r.dtype) for r in rows)) or [("", "", "")]
    labels = {p: list(dict.fromkeys(_bar_label(r) for r in rows if (r.op, r.mode, r.dtype) == p)) for p in panels}
    height = sum(0.9 + 0.32 * len(names) for names in labels.values())
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(9, height), squeeze=False,
        gridspec_kw={"height_ratios": [0.9 + 0.32 * len(labels[p]) for p in panels]},
    )  # fmt: skip
    for panel, ax in zip(panels, axes[:, 0]):
        mine = [r for r in rows if (r.op, r.mode, r.dtype) == panel]
        providers = list(dict.fromkeys(r.provider for r in mine))
        names = labels[panel]
        thick = 0.8 / max(len(providers), 1)
        for i, provider in enumerate(providers):
            bars = {_bar_label(r): r for r in mine if r.provider == provider}
            at = [names.index(n) + (i - (len(providers) - 1) / 2) * thick for n in bars]
            drawn = ax.barh(at, [r.speedup_median for r in bars.values()], thick, label=provider)
            ax.bar_label(drawn, [f"{r.speedup_median:.2f}" for r in bars.values()], padding=2, fontsize=7)
        ax.axvline(1, color="black", linewidth=0.8)
        ax.set_yticks(range(len(names)), names, fontsize=7)
        ax.invert_yaxis()
        ax.set_xlabel("times as fast as the best of eager, SDPA, torch.compile", fontsize=8)
        ax.set_title(" ".join(panel), fontsize=9)
        if providers:
            ax.legend(fontsize=7)
    figure.tight_layout()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _bar_label(row: Row) -> str:
    return f"{row.model} {row.label} B{row.batch}{'' if row.layout == 'channels_last' else ' NCHW'}"
