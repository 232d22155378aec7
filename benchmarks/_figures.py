"""Tables of the CSV files under benchmarks/results, for the README and the pages: no number there is typed by hand."""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from mvkernels import files
from mvkernels.bench.rows import geomean

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
GROUPS = {"N<=16": "N ≤ 16", "N<=64": "17 to 64", "N<=255": "65 to 255", "N>=256": "N ≥ 256", "all": "all"}
LAYOUTS = {"channels_first": "channels first", "channels_last": "channels last", "all": "all"}
# op, what its shapes are told apart by: the heading, the column of the files, its values
OPS = (
    ("patch_attention", "tokens of a group", "size_class", GROUPS),
    ("window_attention", "tokens of a window", "size_class", GROUPS),
    ("patch_transformer_layer", "tokens of a group", "size_class", GROUPS),
    ("mobile_to_former", "layout", "layout", LAYOUTS),
    ("former_to_mobile", "layout", "layout", LAYOUTS),
    ("relu_linear_attention", "layout", "layout", LAYOUTS),
    ("multiscale_linear_attention", "layout", "layout", LAYOUTS),
    ("inverted_residual", "layout", "layout", LAYOUTS),
    ("conv3x3", "layout", "layout", LAYOUTS),
    ("pointwise", "layout", "layout", LAYOUTS),
)
OURS = ("cpp", "triton", "cuda")
MODE = {"fwd": "forward", "bwd": "backward", "full": "forward + backward"}

HEADING = "times as fast as the best of {} at each shape, geometric mean of medians"

Row = dict[str, str]


def read(path: Path) -> list[Row]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def where(rows: list[Row]) -> str:
    """On what these were measured; rows of a file may be of several days and commits."""
    row = rows[0]
    dates = sorted({r["date"] for r in rows})
    commits = ", ".join(f"`{commit}`" for commit in dict.fromkeys(r["commit"] for r in rows))
    days = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    threads = "" if not row["device"] or row["capability"].startswith("sm_") else f", {row['threads']} thread(s)"
    return (
        f"{row['device']} ({row['capability']}){threads}, torch {row['torch']}, {days}, "
        f"{'commit' if len({r['commit'] for r in rows}) == 1 else 'commits'} {commits}"
    )


def op_table(rows: list[Row], op: str, heading: str, column: str, classes: dict[str, str]) -> list[str]:
    """Speed-up of the first own backend by class of shapes, and memory against eager."""
    mine = [row for row in rows if row["provider"] in OURS and row["speedup_median"]]
    if not mine:
        return []
    *first, last = peers(rows)
    title = HEADING.format(" and ".join(filter(None, (", ".join(first), last))))
    lines = [f"`{op}`, {title}, allocator {mine[0].get('allocator', 'default')}. {where(mine)}.", ""]
    lines += [f"| backend | dtype | {heading} | shapes | forward | worst | forward + backward | worst | peak memory |"]
    lines += ["| --- | --- | --- | --- | --- | --- | --- | --- | --- |"]
    for backend, dtype in dict.fromkeys((row["provider"], row["dtype"]) for row in mine):
        chosen = [row for row in mine if (row["provider"], row["dtype"]) == (backend, dtype)]
        for klass, shown in classes.items():
            rows_of = {
                mode: [r for r in chosen if r["mode"] == mode and klass in ("all", r[column])]
                for mode in ("fwd", "full")
            }
            if not rows_of["fwd"] and not rows_of["full"]:
                continue
            compiled = any(r["provider"].startswith("compile") for r in rows if r["dtype"] == dtype)
            held = dtype if compiled else f"{dtype}, without torch.compile"
            cells = [backend, held, shown, str(max(map(len, rows_of.values())))]
            for of_mode in rows_of.values():
                speedups = [float(row["speedup_median"]) for row in of_mode]
                cells += [f"{geomean(speedups):.2f}×", f"{min(speedups):.2f}×"] if speedups else ["–", "–"]
            cells.append(memory(rows_of["full"], rows))
            lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def others(rows: list[Row]) -> list[str]:
    """Who else was timed: the best peer of a row may be one of these."""
    usual = ("eager", "sdpa", "reference", *OURS)
    found = {r["provider"] for r in rows if r.get("median_us") and not r["provider"].startswith("compile")}
    return sorted(found.difference(usual))


def memory(mine: list[Row], rows: list[Row]) -> str:
    """Peak memory of forward + backward as a share of eager's at the same shape, geometric mean."""
    shape = ("op", "model", "label", "batch", "dtype", "layout", "mode")
    eager = {tuple(r[k] for k in shape): r["peak_bytes"] for r in rows if r["provider"] == "eager" and r["peak_bytes"]}
    ratios = [
        float(row["peak_bytes"]) / float(eager[key])
        for row in mine
        if row["peak_bytes"] and (key := tuple(row[k] for k in shape)) in eager
    ]
    return f"{geomean(ratios):.2f} of eager's" if ratios else "–"


def models(
    rows: list[Row],
    title: str,
    first: str,
    ours: str | None = None,
    counted: Mapping[str, Callable[[Row], str]] | None = None,
) -> list[str]:
    """A line for each model, size, batch and mode: the time of ``first``, and how many times as fast the others are.

    ``ours``: whose time there has to be for a line. ``counted``: further columns, heading → cell of a row.
    """
    counted = counted or {}
    same = ("model", "size", "batch", "dtype", "layout", "mode")
    others = [who for who in dict.fromkeys(row["provider"] for row in rows) if who != first]
    headings = ("model", *counted, "input", "batch", "mode", first, *others)
    lines = []
    for key in dict.fromkeys(tuple(row[name] for name in same) for row in rows):
        of = {row["provider"]: row for row in rows if tuple(row[name] for name in same) == key}
        if ours is not None and ours not in of:
            continue
        shown = ", ".join((f"{key[1]}²", *form(key[4], key[3])))
        cells = [f"`{key[0]}`", *(cell(of[first]) for cell in counted.values()), shown, key[2]]
        cells += [{"fwd": "inference", "full": "training step"}[key[5]]]
        cells += [f"{float(of[first]['median_us']) / 1e3:.1f} ms"]
        cells += [f"{float(of[who]['speedup_median']):.2f}×" if who in of else "–" for who in others]
        lines.append(f"| {' | '.join(cells)} |")
    if not lines:
        return []
    if ours is not None:
        lines += means(rows, first, others, len(counted))
    return [
        f"{title}. {where(rows)}.", "", f"| {' | '.join(headings)} |", "| --- " * len(headings) + "|", *lines, "",
    ]  # fmt: skip


def form(layout: str, dtype: str) -> list[str]:
    """What a line says of these two: nothing where they are the usual ones."""
    return ["channels last"] * (layout == "channels_last") + [dtype] * (dtype != "float32")


def means(rows: list[Row], first: str, others: list[str], skipped: int) -> list[str]:
    """A line for each batch, layout, dtype and mode that some models share: the geometric mean, of who ran on all."""
    groups: dict[tuple[str, ...], dict[tuple[str, str], dict[str, Row]]] = {}
    for row in rows:
        group = groups.setdefault((row["batch"], row["layout"], row["dtype"], row["mode"]), {})
        group.setdefault((row["model"], row["size"]), {})[row["provider"]] = row
    lines = []
    for (batch, layout, dtype, mode), models in groups.items():
        if len(models) < 3:
            continue
        shown = ", ".join(form(layout, dtype))
        cells = [f"**geometric mean of {len(models)} rows**", *[""] * skipped, shown, batch]
        cells += [{"fwd": "inference", "full": "training step"}[mode], ""]
        for who in others:
            speedups = [float(of[who]["speedup_median"]) for of in models.values() if who in of]
            cells.append(f"{geomean(speedups):.2f}×" if len(speedups) == len(models) else "–")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def machines(results: Path) -> list[Path]:
    """The folders of processors; GPUs have a page of their own."""
    others = ("audit", "digits", "neon", "ptx", "release")
    found = sorted(path for path in results.glob("*") if path.is_dir() and path.name not in others)
    return [path for path in found if "-sm-" not in path.name and any(path.glob("*.csv"))]


def summary(folder: Path, of_ops: bool = True) -> list[str]:
    """What a machine's files come to: one row an op (float32, all shapes) unless only whole models are wanted, and
    one for whole models in each way to run them."""
    lines, sources = [], []
    for op, *_ in OPS if of_ops else ():
        rows = [r for r in read(folder / f"{op}.csv") if r["dtype"] == "float32"]
        mine = [r for r in rows if r["provider"] in OURS and r["speedup_median"]]
        if not mine:
            continue
        cells = [f"`{op}`", f"the best of {', '.join(peers(rows))}", f"{len({shape_of(r) for r in mine})} shapes"]
        for mode in ("fwd", "full"):
            found = [float(r["speedup_median"]) for r in mine if r["mode"] == mode]
            cells.append(f"{geomean(found):.2f}× (worst {min(found):.2f}×)" if found else "–")
        cells.append(memory([r for r in mine if r["mode"] == "full"], rows))
        lines.append(f"| {' | '.join(cells)} |")
        sources += mine
    swapped = [r for r in read(folder / "swapped.csv") if r["batch"] == "1" and r["layout"] == "contiguous"]
    for who, of, shown in (
        ("swapped", "original", "the original"),
        ("swapped, compiled", "original, compiled", "the original, compiled"),
        ("swapped", "original, onnx", "the original in ONNX Runtime"),
        ("swapped, inference", "original", "the original"),
        ("swapped, inference, compiled", "original, compiled", "the original, compiled"),
        ("swapped, inference", "original, onnx", "the original in ONNX Runtime"),
        ("swapped, inference", "original, openvino", "the original in OpenVINO"),
    ):
        cells = [f"whole models, {who}", shown, ""]
        count = 0
        for mode in ("fwd", "full"):
            found = list(ratios(swapped, mode, who, of).values())
            count = max(count, len(found))
            cells.append(f"{geomean(found):.2f}× (worst {min(found):.2f}×)" if found else "–")
        if count:
            cells[2] = f"{count} model{'s' * (count > 1)}"
            lines.append(f"| {' | '.join(cells)} | – |")
    if not lines:
        return []
    head = ["what", "compared with", "measured on", "forward", "forward + backward", "peak memory"]
    return [f"{where(sources + swapped)}.", "", f"| {' | '.join(head)} |", "| --- " * len(head) + "|", *lines, ""]


def peers(rows: list[Row]) -> list[str]:
    """Who was timed beside this library."""
    timed = {r["provider"] for r in rows}
    usual = [shown for name, shown in (("eager", "eager"), ("sdpa", "SDPA")) if name in timed]
    compiled = ["torch.compile"] if any(name.startswith("compile") for name in timed) else []
    return [*usual, *compiled, *others(rows)]


def shape_of(row: Row) -> tuple[str, ...]:
    return tuple(row[key] for key in ("model", "label", "batch", "layout"))


def ratios(rows: list[Row], mode: str, who: str, of: str) -> dict[str, float]:
    """How many times as fast as ``of`` each model is as ``who``, where both were timed."""
    found: dict[str, float] = {}
    for name in dict.fromkeys(f"{r['model']} {r['size']}" for r in rows):
        times = {
            r["provider"]: float(r["median_us"])
            for r in rows
            if f"{r['model']} {r['size']}" == name and r["mode"] == mode
        }
        if who in times and of in times:
            found[name] = times[of] / times[who]
    return found


def files_are(texts: dict[Path, str], check: bool, script: str) -> int:
    """Write the files, or with ``check`` say which are not so."""
    status = 0
    for path, text in texts.items():
        if not check:
            path.parent.mkdir(parents=True, exist_ok=True)
            files.write(path, text)
        elif not path.exists() or path.read_text() != text:
            print(f"{path.name} is not as {script} writes it: run that", file=sys.stderr)
            status = 1
    return status
