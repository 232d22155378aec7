"""The page docs/gpu.md: what GPUs measured, each file of benchmarks/results/<GPU> by itself."""

from __future__ import annotations

import collections
from pathlib import Path

from _figures import MODE, OPS, OURS, Row, geomean, read, where
from _op import SAME

HEAD = """# On a GPU

See what was checked and timed on real GPUs, and what was not.

`benchmarks/pages.py` writes this page from the files that `benchmarks/gpu.py` wrote to `benchmarks/results`; no number
is typed by hand. How it was measured: [benchmarks](benchmarks.md). What the kernels do: [kernel design](kernels.md).
Each table names the commits that were measured; the kernels may have changed since.
"""


def page(results: Path) -> str:
    """The page; without files it says so."""
    parts, published = [HEAD], read(results / "published.csv")
    for folder in sorted(path for path in results.glob("*-sm-*") if path.is_dir()):
        ops = [row for op, *_ in OPS for row in read(folder / f"{op}.csv")]
        any_rows = ops or read(folder / "verify.csv") or read(folder / "kernels.csv")
        if any_rows:
            parts.append(f"## {any_rows[0]['device']}\n")
        predicted = [
            r
            for r in read(results / "audit" / "prediction.csv")
            if any_rows and r["device"] in any_rows[0]["device"] and r["kernel"] == "all"
        ]
        if any_rows and not ops:
            parts.append("No op has been timed against peers on it yet.\n")
        parts += verified(read(folder / "verify.csv")) + summary(ops) + shapes(ops, predicted)
        parts += models(read(folder / "swapped.csv"), published) + kernels(read(folder / "kernels.csv"))
        parts += counters(read(folder / "counters.csv"))
    if len(parts) == 1:
        parts.append("No GPU has run them yet: `python benchmarks/gpu.py` does.\n")
    return "\n".join(parts)


def line(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def header(*names: str) -> tuple[str, str]:
    return line(*names), line(*["---"] * len(names))


def verified(rows: list[Row]) -> list[str]:
    """How many comparisons with float64 were right."""
    if not rows:
        return []
    groups: dict[tuple[str, str], list[Row]] = collections.defaultdict(list)
    for row in rows:
        groups[row["op"], row["dtype"]].append(row)
    lines = [
        f"### Values and gradients against float64\n\n{where(rows)}. The criterion: [numerics](numerics.md).\n",
        *header("op", "dtype", "compared", "wrong", "largest error ÷ allowed"),
    ]
    for (op, dtype), each in groups.items():
        wrong = sum(row["ok"] != "True" for row in each)
        near = max((float(r["error"]) / float(r["allowed"]) for r in each if r["allowed"]), default=0.0)
        lines.append(line(op, dtype, len(each), wrong, f"{100 * near:.0f} %"))
    return ["\n".join(lines) + "\n"]


def summary(rows: list[Row]) -> list[str]:
    """Each op against the best peer: means over its shapes."""
    mine = [row for row in rows if row["provider"] in OURS and row["speedup_median"]]
    if not mine:
        return []
    groups: dict[tuple[str, ...], list[Row]] = collections.defaultdict(list)
    for row in mine:
        groups[row["op"], row["dtype"], row["batch"], row["mode"]].append(row)
    lines = [
        f"### Against the best peer\n\n{where(mine)}. Device time; the floor is the larger of bytes over the measured "
        "copy rate and FLOPs over that of a large product. By the wall clock: of one call after another.\n",
        *header("op", "dtype", "batch", "mode", "shapes", "times as fast: mean", "worst", "best", "of the floor: mean",
                "by the wall clock: mean"),
    ]  # fmt: skip
    for (op, dtype, batch, mode), each in groups.items():
        ratios = [float(row["speedup_median"]) for row in each]
        floors = [float(row["fraction_of_floor"]) for row in each]
        walls = [w for row in each if (w := wall_ratio(row, rows))]
        wall = f"{geomean(walls):.2f}×" if walls else "–"
        cells = (
            op, dtype, batch, MODE[mode], len(each), f"{geomean(ratios):.2f}×", f"{min(ratios):.2f}×",
            f"{max(ratios):.2f}×", f"{100 * geomean(floors):.0f} %", wall,
        )  # fmt: skip
        lines.append(line(*cells))
    return ["\n".join(lines) + "\n"]


def same(row: Row, other: Row) -> bool:
    return all(row[key] == other[key] for key in SAME)


def wall_ratio(row: Row, rows: list[Row]) -> float | None:
    """The quickest peer by the wall clock over this row."""
    peers = [float(r["wall_us"]) for r in rows if same(r, row) and r["provider"] not in OURS and r.get("wall_us")]
    return min(peers) / float(row["wall_us"]) if peers and row.get("wall_us") else None


def shapes(rows: list[Row], predicted: list[Row]) -> list[str]:
    """Every shape: times of all, and the prediction from the data sheet."""
    mine = [row for row in rows if row["provider"] in OURS and row["median_us"]]
    if not mine:
        return []
    lines = [
        "### Every shape\n\nMicroseconds on the device. Predicted: from machine code, see "
        "[benchmarks](benchmarks.md#predicted-times).\n",
        *header("op", "shape", "batch", "mode", "median", "predicted", "eager", "sdpa", "compiled", "times as fast",
                "wall clock", "best peer's"),
    ]  # fmt: skip
    for row in mine:
        peers = {r["provider"]: r for r in rows if same(r, row) and r["provider"] not in OURS}
        compiled = next((r for name, r in peers.items() if name.startswith("compile(") and r["median_us"]), None)
        walls = [float(r["wall_us"]) for r in peers.values() if r.get("wall_us")]
        cells = (
            row["op"], f"{row['model']} {row['label']}", row["batch"], MODE[row["mode"]], us(row),
            expected(row, predicted), us(peers.get("eager")), us(peers.get("sdpa")), us(compiled),
            f"{float(row['speedup_median']):.2f}×" if row["speedup_median"] else "–",
            f"{float(row['wall_us']):.4g}" if row.get("wall_us") else "–", f"{min(walls):.4g}" if walls else "–",
        )  # fmt: skip
        lines.append(line(*cells))
    return ["\n".join(lines) + "\n"]


def us(row: Row | None) -> str:
    return f"{float(row['median_us']):.4g}" if row and row["median_us"] else "–"


def expected(row: Row, predicted: list[Row]) -> str:
    """The model's prediction, of both passes for a call with its backward."""
    keys = ("op", "model", "label", "batch", "dtype", "layout")
    same = [p for p in predicted if all(p[key] == row[key] for key in keys)]
    of = [p for p in same if p["backend"] == row["provider"]]
    wanted = ("fwd",) if row["mode"] == "fwd" else ("fwd", "bwd")
    found = [float(p["predicted_us"]) for p in of if p["mode"] in wanted]
    return f"{sum(found):.3g}" if len(found) == len(wanted) else "–"


def models(rows: list[Row], published: list[Row]) -> list[str]:
    """Whole models, original and swapped, and what others publish of them."""
    if not rows:
        return []
    lines = [
        f"### Whole models\n\n{where(rows)}. Device time, and pictures a second by the wall clock.\n",
        *header("model", "size", "batch", "dtype", "mode", "who", "median", "times the original", "pictures a second"),
    ]
    for r in rows:
        cells = (
            r["model"], r["size"], r["batch"], r["dtype"], MODE[r["mode"]], r["provider"],
            f"{float(r['median_us']) / 1e3:.2f} ms", f"{float(r['speedup_median']):.2f}×",
            f"{float(r['images_s']):,.0f}" if r.get("images_s") else "–",
        )  # fmt: skip
        lines.append(line(*cells))
    same = [p for p in published if any((r["model"], r["size"]) == (p["model"], p["size"]) for r in rows)]
    if same:
        lines += ["\nPublished by timm, compiled, under autocast to float16:\n"]
        lines += header("model", "size", "batch", "GPU", "torch", "mode", "pictures a second")
    for p in same:
        cells = (p["model"], p["size"], p["batch"], p["device"], p["torch"], MODE[p["mode"]])
        lines.append(line(*cells, f"[{float(p['images_s']):,.0f}]({p['source']})"))
    return ["\n".join(lines) + "\n"]


def kernels(rows: list[Row]) -> list[str]:
    """What each call spends its time on."""
    if not rows:
        return []
    calls: dict[tuple[str, ...], list[Row]] = collections.defaultdict(list)
    for row in rows:
        if row["mode"] == "full":
            key = ("op", "backend", "model", "label", "batch", "dtype", "layout")
            calls[tuple(row[name] for name in key)].append(row)
    lines = [
        f"### Kernels of forward and backward\n\n{where(rows)}. Microseconds of each kernel, by the profiler.\n",
        *header("op", "backend", "shape", "batch", "dtype", "layout", "all", "times the floor", "kernels"),
    ]
    for (op, backend, model, label, batch, dtype, layout), each in calls.items():
        total, floor = sum(float(row["us"]) for row in each), float(each[0]["floor_of_call_us"])
        parts = ", ".join(f"`{row['kernel']}` {float(row['us']):.3g}{times(row)}" for row in each)
        cells = (
            op, backend, f"{model} {label}", batch, dtype, layout.replace("_", " "), f"{total:.4g}",
            f"{total / floor:.1f}", parts,
        )  # fmt: skip
        lines.append(line(*cells))
    return ["\n".join(lines) + "\n"]


def times(row: Row) -> str:
    return f" ({row['launches']} launches)" if int(row["launches"]) > 1 else ""


def counters(rows: list[Row]) -> list[str]:
    """What each kernel waits for."""
    if not rows:
        return []
    # The first files were made with its default.
    clocks = "which left the clocks alone" if all(r.get("clocks") for r in rows) else "at the clock that it sets"
    lines = [
        f"### Hardware counters\n\n{where(rows)}. By Nsight Compute, {clocks}. Busy: of the peak of "
        "the processors, of the memory. Warps: of as many as a processor holds, on average.\n",
        *header("op", "kernel", "programs", "microseconds", "processors busy", "memory busy", "warps", "registers",
                "instructions of a warp"),
    ]  # fmt: skip
    for r in rows:
        cells = (
            r["op"], f"`{r['kernel']}`", r["grid"], f"{float(r['ns']) / 1e3:.4g}", f"{float(r['sm_percent']):.0f} %",
            f"{float(r['dram_percent']):.0f} %", f"{float(r['occupancy_percent']):.0f} %",
            f"{float(r['registers']):.0f}", f"{float(r['warp_instructions']) / 1e6:.1f} M",
        )  # fmt: skip
        lines.append(line(*cells))
    return ["\n".join(lines) + "\n"]
