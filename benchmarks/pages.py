"""Writes docs/performance.md, docs/performance/, docs/gpu.md and tables of docs/numerics.md, docs/kernels.md and
docs/compatibility.md from the files of benchmarks/results.

``--check`` changes nothing and exits with 1 if the pages are not what the files say.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import _figures
import _gpu_page
import _prediction_page
import _release_page
from _figures import MODE, OPS, RESULTS, ROOT, Row, files_are, geomean, machines, op_table, read, where
from parts import NAMES as SHARES

from mvkernels.commands import command
from mvkernels.dispatch import registry

BEGIN, END = "<!-- {}: begin (written by benchmarks/pages.py) -->\n", "<!-- {}: end -->"
WRITTEN = """
Written by `benchmarks/pages.py` from the files under `benchmarks/results`; no number is typed by hand. How it was
measured, and what each column is: [benchmarks]({}benchmarks.md). On your machine: `make bench`.
"""


def performance(results: Path) -> dict[str, str]:
    """The pages by their place in docs/: a summary, a page for each op, whole models, and what a call costs."""
    pages = {f"performance/{op}.md": op_page(results, op) for op, *_ in OPS}
    pages["performance/models.md"] = models_page(results)
    pages["performance/calls.md"] = calls_page(results)
    parts = [
        "# Performance\n",
        "See how fast the ops and swapped models are on the machines that were measured.",
        WRITTEN.format(""),
    ]
    for folder in machines(results):
        found = _figures.summary(folder)
        found += where_kernels_go(read(folder / "parts.csv"))
        parts += [f"## {folder.name}\n", *found] if found else []
    links = {f"performance/{op}.md": f"`{op}`" for op, *_ in OPS}
    links |= {"performance/models.md": "whole models", "performance/calls.md": "call overhead and threads"}
    links["gpu.md"] = "on a GPU"
    parts += ["Shape by shape: " + ", ".join(f"[{text}]({link})" for link, text in links.items()) + ".", ""]
    return {"performance.md": "\n".join(parts), **pages}


def where_kernels_go(rows: list[Row]) -> list[str]:
    """The shares of a kernel's time, and how near it comes to its floor, by op and class of shapes."""
    if not rows:
        return []
    fma, exp, copy = (
        f"{min(found):.{digits}f} to {max(found):.{digits}f}" if len(found := {float(r[name]) for r in rows}) > 1
        else f"{found.pop():.{digits}f}"
        for name, digits in (("fma_gflop_s", 0), ("exp_g_s", 1), ("copy_gb_s", 0))
    )  # fmt: skip
    lines = [
        f"Where the time of a kernel goes, without Python: {where(rows)}. Each number is a mean over shapes, batch 1, "
        "float32. The floor is what the FLOPs and exponentials take one after the other at the rates of this run "
        f"({fma} GFLOP/s, {exp} exponentials a ns), or the bytes at {copy} GB/s if that is "
        "longer. [What the parts are](benchmarks.md#parts-of-a-kernel).\n",
        f"| op | shapes | mode | {' | '.join(SHARES)} | of the floor | worst |",
        "| --- " * (5 + len(SHARES)) + "|",
    ]
    for op, _, column, classes in OPS:
        for klass, shown in classes.items():
            for mode in ("fwd", "bwd"):
                of = [r for r in rows if (r["op"], r["mode"]) == (op, mode) and klass == r[column]]
                if not of:
                    continue
                means = [f"{100 * sum(float(r[share]) for r in of) / len(of):.0f} %" for share in SHARES]
                floors = [float(r["fraction_of_floor"]) for r in of]
                cells = [f"`{op}`", f"{shown}: {len(of)}", MODE[mode], *means]
                cells += [f"{100 * geomean(floors):.0f} %", f"{100 * min(floors):.0f} %"]
                lines.append(f"| {' | '.join(cells)} |")
    return ["\n".join(lines) + "\n"]


def op_page(results: Path, op: str) -> str:
    """An op's tables of every machine: by class of shapes, then shape by shape."""
    classes = next(rest for name, *rest in OPS if name == op)
    opening = f"No times of `{op}` are committed yet."
    if "triton" in registry.OPS[op].why_not:
        opening += " Values and gradients checked on a GPU: [GPU](../gpu.md)."
    tables: list[str] = []
    for folder in machines(results):
        for file in sorted(folder.glob(f"{op}*.csv")):
            rows = read(file)
            if not rows or file.stem.removeprefix(op)[:1] not in ("", "_"):
                continue
            opening = f"See how fast `{op}` is at each shape of its suite, and against whom."
            tables += op_table(rows, op, *classes) + shapes(file.stem, rows)
    return "\n".join([f"# Performance of {op}\n", opening, WRITTEN.format("../"), *tables])


def models_page(results: Path) -> str:
    """Whole models: those of other packages swapped, mvmodels' own, their exports, and where the time goes."""
    parts = ["# Performance of whole models\n", "See how fast whole models are, swapped and in other runtimes."]
    parts.append(WRITTEN.format("../"))
    for folder in machines(results):
        for path in (folder / "swapped.csv", *sorted(folder.glob("swapped_*_threads.csv"))):
            title = "Whole models of other packages, times as fast as the original"
            swapped = _figures.models(read(path), title, "original", "swapped")
            several = path.stem.removeprefix("swapped").replace("_", " ")
            if swapped:
                parts += [f"## Models of other packages, {folder.name}{several and ',' + several}\n", *swapped]
        parts += every_model(read(folder / "models.csv")) + exports(read(folder / "export.csv"))
        parts += where_time_goes(read(folder / "where.csv"))
    return "\n".join(parts)


def calls_page(results: Path) -> str:
    """What a call costs before any arithmetic, and what a second thread gains."""
    parts = [
        "# Call overhead and threads\n",
        "See how long a call takes before any arithmetic starts, and how much several threads gain.",
    ]
    parts.append(WRITTEN.format("../"))
    for folder in machines(results):
        parts += threads(read(folder / "threads.csv")) + overhead(read(folder / "overhead.csv"))
    return "\n".join(parts)


def shapes(name: str, rows: list[Row]) -> list[str]:
    """Every shape: this library's median, who was next, and how near the floor and, where it was measured, the peak."""
    mine = [row for row in rows if row["speedup_median"]]
    if not mine:
        return []
    lines = [f"## {name}, {mine[0]['device']}\n", f"{where(mine)}, allocator {mine[0]['allocator']}.\n"]
    heads = ["shape", "batch", "dtype", "layout", "mode", "backend", "median", "95 %", "best peer", "times as fast"]
    heads += ["of the floor"]
    peak = any(row.get("fraction_of_fma") for row in mine)  # older files have no such column
    heads += ["of the FMA peak"] * peak
    lines += [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    for r in mine:
        low, high = r.get("median_low_us"), r.get("median_high_us")
        interval = f"{float(low):.4g} to {float(high):.4g}" if low and high else "–"
        cells = [
            f"{r['model']} {r['label']}", r["batch"], r["dtype"], r["layout"].replace("_", " "), MODE[r["mode"]],
            r["provider"], f"{float(r['median_us']):.4g} µs", interval, r["best_peer"],
            f"{float(r['speedup_median']):.2f}×", f"{100 * float(r['fraction_of_floor']):.0f} %",
        ]  # fmt: skip
        if peak:
            of_peak = r.get("fraction_of_fma")
            cells.append(f"{100 * float(of_peak):.0f} %" if of_peak else "–")
        lines.append(f"| {' | '.join(cells)} |")
    return ["\n".join(lines) + "\n"]


def every_model(rows: list[Row]) -> list[str]:
    """The models of mvmodels: what is counted, and the times."""
    if not rows:
        return []
    counted = {
        "parameters": lambda row: f"{int(row['params']):,}",
        "multiply-adds": lambda row: f"{float(row['macs_m']):,.0f} M",
    }
    title = "Times as fast as with every op on the reference, in eager mode"
    lines = _figures.models(rows, title, "reference", counted=counted)
    return ["\n".join([f"## Models of mvmodels, {rows[0]['device']}\n", *lines])]


def exports(rows: list[Row]) -> list[str]:
    """The swapped model's export against the original's, in the runtime that each was made for."""
    if not rows:
        return []
    lines = [f"## Exports, {rows[0]['device']}\n", f"{where(rows)}.\n"]
    lines += [
        "| model | input | runtime | export of | file | nodes delegated or fused | error | median | as fast as the "
        "original's |"
    ]
    lines += ["| --- " * 9 + "|"]
    for r in rows:
        share = f"{100 * float(r['delegated_share']):.0f} %" if r["delegated_share"] else r.get("fused_nodes") or "–"
        cells = (
            r["model"],
            f"{r['size']}²",
            r.get("runtime") or r["target"],
            r["provider"],
            f"{int(r['bytes']) / 1e6:.2f} MB",
            share,
        )
        cells += (r["error"], f"{float(r['median_us']) / 1e3:.2f} ms", f"{float(r['speedup_median']):.2f}×")
        lines.append(f"| {' | '.join(cells)} |")
    return ["\n".join(lines) + "\n"]


def where_time_goes(rows: list[Row]) -> list[str]:
    """Whole models by part, beside the time of the parts' FLOPs at the rate of a matrix product."""
    if not rows:
        return []
    parts = list(dict.fromkeys(row["part"] for row in rows))
    lines = [f"## Where the time of a model goes, {rows[0]['device']}\n", f"{where(rows)}.\n"]
    lines += [
        "Milliseconds inside the kernels of each part, under a profiler that adds a little to all. The last column is "
        "what the original's FLOPs (convolutions and products) take at the rate of PyTorch's large matrix product in "
        "the same run. Where that is not the processor's peak, this library's kernels can take less.\n"
    ]
    lines += [
        f"| model | layout | as | whole | {' | '.join(parts)} | at that rate |",
        "| --- " * (5 + len(parts)) + "|",
    ]
    for key in dict.fromkeys((r["model"], r["layout"], r["provider"]) for r in rows):
        mine = [r for r in rows if (r["model"], r["layout"], r["provider"]) == key]
        cells = [f"`{key[0]}`", key[1].replace("_", " "), key[2], f"{float(mine[0]['median_us']) / 1e3:.1f}"]
        cells += [f"{float(r['kernels_us']) / 1e3:.1f}" for r in mine]
        cells.append(f"{sum(float(r['floor_us']) for r in mine) / 1e3:.1f}")
        lines.append(f"| {' | '.join(cells)} |")
    return ["\n".join(lines) + "\n"]


def threads(rows: list[Row]) -> list[str]:
    """Scaling, by op and batch."""
    if not rows:
        return []
    lines = [
        f"## Threads, {rows[0]['device']}\n",
        "| op | batch | threads | shapes | speed-up over one thread | worst |",
    ]
    lines += ["| --- | --- | --- | --- | --- | --- |"]
    for op, batch in dict.fromkeys((r["op"], r["batch"]) for r in rows):
        found = [float(r["scaling_median"]) for r in rows if (r["op"], r["batch"]) == (op, batch)]
        count = next(r["threads"] for r in rows if r["op"] == op)
        lines.append(f"| {op} | {batch} | {count} | {len(found)} | {geomean(found):.2f}× | {min(found):.2f}× |")
    return ["\n".join(lines) + "\n"]


def overhead(rows: list[Row]) -> list[str]:
    """What a call costs beside PyTorch's own attention in the same state, and an import. Older files have no ops."""
    if not rows:
        return []
    lines = [f"## Call overhead, {rows[0]['device']}\n"]
    calls = [row for row in rows if row.get("provider") == "mvkernels"]
    if calls:
        states = list(dict.fromkeys((r["state"], r["compiled"]) for r in calls))
        heads = [state + (", compiled" if compiled == "True" else "") for state, compiled in states]
        lines += ["Least time of a call, and how many times that of `scaled_dot_product_attention`.\n"]
        lines += [f"| op | shape | {' | '.join(heads)} |", "| --- " * (2 + len(states)) + "|"]
        for op, shape in dict.fromkeys((r["op"], r["shape"]) for r in calls):
            found = {(r["state"], r["compiled"]): r for r in calls if (r["op"], r["shape"]) == (op, shape)}
            cells = [
                f"{float(r['min_us']):.3g} µs, {float(r['of_sdpa_min']):.2f}×" if r else "–"
                for r in map(found.get, states)
            ]
            lines.append(f"| {op} | {shape} | {' | '.join(cells)} |")
        lines += [""]
    others = [row for row in rows if not row.get("provider")]
    if others:
        lines += ["| what | median |", "| --- | --- |"]
        lines += [f"| {row['what']} | {float(row['median_us']):.4g} µs |" for row in others]
    return ["\n".join(lines) + "\n"]


def errors(rows: list[Row]) -> list[str]:
    """What the kernels err."""
    columns = "PyTorch's | expected | of allowed"
    lines = [f"| op | dtype | backend | output | {columns} | gradients | {columns} |", "| --- " * 11 + "|"]
    for r in rows:
        cells = [r["op"], r["dtype"], r["backend"]]
        for what in ("out", "grad"):
            if not r[f"{what}_error"]:  # of a kernel without a backward
                cells += ["–"] * 4
                continue
            cells += [f"{float(r[f'{what}_{which}']):.1e}" for which in ("error", "error_pytorch", "error_expected")]
            cells.append(f"{100 * float(r[f'{what}_share_of_allowed']):.0f} %")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def winograd(rows: list[Row]) -> list[str]:
    """What each way to compute a 3 x 3 convolution errs at each shape."""
    names = list(dict.fromkeys(row["algorithm"] for row in rows))
    lines = [f"| shape | {' | '.join(names)} |", "| --- " * (1 + len(names)) + "|"]
    for shape in dict.fromkeys(row["shape"] for row in rows):
        found = {row["algorithm"]: row for row in rows if row["shape"] == shape}
        cells = []
        for name in names:
            row = found.get(name)
            mark = "**" if row and row["taken"] == "True" else ""
            cells.append(f"{mark}{row['max_error']} ({row['rms_error']}){mark}" if row else "–")
        lines.append(f"| {shape} | {' | '.join(cells)} |")
    return lines


def faults(rows: list[Row]) -> list[str]:
    """Which planted faults the criterion finds."""
    names = list(dict.fromkeys(row["fault"] for row in rows))
    lines = [f"| op | dtype | {' | '.join(names)} |", "| --- " * (2 + len(names)) + "|"]
    for op, dtype in dict.fromkeys((row["op"], row["dtype"]) for row in rows):
        found = {row["fault"]: row for row in rows if (row["op"], row["dtype"]) == (op, dtype)}
        cells = [f"{found[n]['found']} of {found[n]['planted']}" if n in found else "–" for n in names]
        lines.append(f"| {op} | {dtype} | {' | '.join(cells)} |")
    counted = [
        sum(int(row[column]) for row in rows if row["dtype"] == "float32")
        for column in ("planted", "found", "found_by_pytorch")
    ]
    return [*lines, "", "In float32 {:,} planted, {:,} found; {:,} by PyTorch's own error alone.".format(*counted)]


NO_ERRORS = "No errors are committed yet: `python benchmarks/numerics.py` takes them."
NO_FAULTS = "No faults are committed yet: `python benchmarks/faults.py` plants them."
BLOCKS = {
    "faults": ("faults.csv", faults, NO_FAULTS),
    "errors": ("numerics.csv", errors, NO_ERRORS),
    "winograd": ("winograd.csv", winograd, NO_ERRORS),
}
"""Of the numerics page: the file of each block, its table, and what it says without the file."""


def block(name: str, results: Path) -> str:
    """A block of the numerics page: the table of each machine's file."""
    file, table, missing = BLOCKS[name]
    lines = []
    for folder in machines(results):
        rows = read(folder / file)
        if rows:
            lines += [f"{where(rows)}.", "", *table(rows), ""]
    return "\n".join(lines or [missing, ""])


def pages(results: Path) -> dict[Path, str]:
    """Every page, and what is to stand in it."""
    docs = ROOT / "docs"
    numerics, kernels, compatibility = (docs / f"{name}.md" for name in ("numerics", "kernels", "compatibility"))
    of_release = {"wheels": _release_page.wheels(results), "matrix": _release_page.matrix(results)}
    of_release |= {"arm tests": _release_page.arm_tests(results), "arm code": _release_page.arm_code(results)}
    return {
        **{docs / name: page for name, page in performance(results).items()},
        docs / "gpu.md": _gpu_page.page(results),
        numerics: filled(numerics.read_text(), {name: block(name, results) for name in BLOCKS}),
        kernels: filled(kernels.read_text(), {"predictions": _prediction_page.block(results)}),
        compatibility: filled(compatibility.read_text(), of_release),
    }


def filled(text: str, blocks: dict[str, str]) -> str:
    """A page with its blocks as they are to be."""
    for name, block in blocks.items():
        begin, end = BEGIN.format(name), END.format(name)
        before, rest = text.split(begin)
        text = before + begin + block + end + rest.split(end, 1)[1]
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    return files_are(pages(RESULTS), options.check, "benchmarks/pages.py")


if __name__ == "__main__":
    sys.exit(command.run("pages", main))
