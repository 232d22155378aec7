"""The tables of docs/kernels.md: of every call and GPU kernel the floor, the predicted time, and what limits it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from _figures import MODE, Row, read
from _gpu_page import header, line

BATCH = "128"
SAME = ("op", "model", "label", "batch", "layout", "mode")
LIMIT = {
    "issue": "issue of instructions", "arithmetic": "arithmetic units", "special": "exponentials",
    "matrix": "matrix units", "shared": "shared memory", "first_cache": "first-level cache",
    "second_cache": "second-level cache", "memory": "memory", "latency": "waiting", "launch": "launch",
}  # fmt: skip


def block(results: Path) -> str:
    """All of it."""
    before = read(results / "audit" / "prediction_before.csv")
    now = [row for row in read(results / "audit" / "prediction.csv") if row["device"] == "H100"]
    if not now:
        return "Nothing is predicted yet: `python benchmarks/predict.py` does it.\n"
    dates = ", ".join(sorted({row["date"] for row in now}))
    commits = ", ".join(f"`{commit}`" for commit in sorted({row["commit"] for row in now}))
    first = ", ".join(f"`{commit}`" for commit in sorted({row["commit"] for row in before}))
    about = f"H100, bfloat16, channels last, batch {BATCH}, microseconds. {dates}, commits {commits}; before: {first}."
    return "\n".join([about, "", *calls(before, now), "", *kernels(now), ""])


def calls(before: list[Row], now: list[Row]) -> Iterator[str]:
    """A line for each pass of each call."""
    yield from header("op", "shape", "pass", "floor", "before", "Triton", "CUDA C++", "times the floor", "limited by")
    was = {tuple(row[name] for name in SAME): row for row in before if row["kernel"] == "all"}
    of: dict[tuple[str, ...], dict[str, Row]] = defaultdict(dict)
    for row in now:
        if row["kernel"] == "all" and row["batch"] == BATCH:
            of[tuple(row[name] for name in SAME)][row["backend"]] = row
    for key, rows in sorted(of.items()):
        best = min(rows.values(), key=lambda row: float(row["predicted_us"]))
        old = was.get(key)
        yield line(
            best["op"], f"{best['model']} {best['label']}", MODE[best["mode"]], us(best["floor_us"]),
            us(old["predicted_us"]) if old else "–",
            *(us(rows[each]["predicted_us"]) if each in rows else "–" for each in ("triton", "cuda")),
            f"{float(best['ratio']):.1f}", LIMIT[best["decides"]],
        )  # fmt: skip


def kernels(now: list[Row]) -> Iterator[str]:
    """A line for each kernel, at the shape where it is furthest from the time that the bytes it touches take."""
    furthest: dict[tuple[str, ...], Row] = {}
    for row in now:
        key = row["op"], row["kernel"]  # of two backends some are the same
        ours = row["kernel"] != "all" and not row["kernel"].startswith("aten::")
        if not ours or row["batch"] != BATCH or not float(row["floor_us"]):
            continue
        if key not in furthest or above(row) > above(furthest[key]):
            furthest[key] = row
    yield from header("op", "kernel", "where it is furthest", "bytes once", "predicted", "limited by", "registers",
                      "warps of a processor")  # fmt: skip
    for (op, kernel), row in sorted(furthest.items()):
        resident = int(row["warps"]) * int(row["blocks_per_processor"])
        shape = f"{row['model']} {row['label']}, {MODE[row['mode']]}"
        yield line(op, f"`{kernel}`", shape, us(row["floor_us"]), us(row["predicted_us"]), LIMIT[row["decides"]],
                   row["registers"], resident)  # fmt: skip


def above(row: Row) -> float:
    """Microseconds above the floor."""
    return float(row["predicted_us"]) - float(row["floor_us"])


def us(text: str) -> str:
    return f"{float(text):.3g}" if float(text) < 1000 else f"{float(text):,.0f}"
