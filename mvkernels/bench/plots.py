"""The plots of ``mvkernels bench``: bars of speed-up, and the roofline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mvkernels import files, report
from mvkernels.bench.rows import Row


def pyplot() -> Any:
    """matplotlib without a display. Raises UsageError if it is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise report.UsageError("--plot needs matplotlib: pip install 'mvkernels[bench]'") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def check_kind(option: str, path: str) -> None:
    """Raise UsageError unless matplotlib can draw a file of this name."""
    known = pyplot().gcf().canvas.get_supported_filetypes()
    if Path(path).suffix[1:] not in known:
        raise report.UsageError(f"{option} {path}: want a name that ends in one of {', '.join(sorted(known))}")


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
        ax.set_xlabel("times as fast as the best peer that ran", fontsize=8)
        ax.set_title(" ".join(panel), fontsize=9)
        if providers:
            ax.legend(fontsize=7)
    save(figure, path)


def _bar_label(row: Row) -> str:
    return f"{row.model} {row.label} B{row.batch}{'' if row.layout == 'channels_last' else ' NCHW'}"


def roofline(rows: Sequence[Row], path: str | Path) -> None:
    """Work done per second against FLOPs per byte, under the measured copy and matrix-product rates.

    Bytes and FLOPs are those of the floor, the same for all who do the work, so providers lie above one another.
    A panel for each dtype; the lines are the rates of the first of its rows.
    """
    plt = pyplot()
    rows = [r for r in rows if r.gb_s and r.tflop_s]
    dtypes = list(dict.fromkeys(r.dtype for r in rows)) or [""]
    figure, axes = plt.subplots(1, len(dtypes), figsize=(7 * len(dtypes), 5.5), squeeze=False)
    for dtype, ax in zip(dtypes, axes[0]):
        mine = [r for r in rows if r.dtype == dtype]
        for provider in dict.fromkeys(r.provider for r in mine):
            points = [point(r) for r in mine if r.provider == provider]
            ax.scatter(*zip(*points), s=14, alpha=0.7, label=provider)
        if mine:
            at = [point(r)[0] for r in mine]
            line = [min(at) / 2 * (4 * max(at) / min(at)) ** (i / 99) for i in range(100)]
            ax.plot(line, [roof(mine[0], x) for x in line], color="black", linewidth=1, label="measured roofline")
            ax.set_xscale("log")
            ax.set_yscale("log")
            ax.legend(fontsize=7)
        ax.set_xlabel("FLOPs per byte of the floor")
        ax.set_ylabel("GFLOP/s")
        ax.set_title(f"{mine[0].device}, {dtype}" if mine else "no row has a time", fontsize=9)
    save(figure, path)


def point(row: Row) -> tuple[float, float]:
    """FLOPs per byte, GFLOP/s."""
    assert row.gb_s and row.tflop_s
    return row.tflop_s * 1e3 / row.gb_s, row.tflop_s * 1e3


def roof(row: Row, intensity: float) -> float:
    """GFLOP/s that the machine of a row can do at this intensity."""
    return min(row.copy_gb_s * intensity, row.matmul_gflop_s)


def save(figure: Any, path: str | Path) -> None:
    """Write a figure, in the format that the name ends in, and close it."""
    figure.tight_layout()
    with files.replacing(path) as file:
        figure.savefig(file, dpi=120, format=Path(path).suffix[1:])
    pyplot().close(figure)
