"""The tables of docs/compatibility.md: what the wheels are, beside which versions they were tested, and ARM."""

from __future__ import annotations

from pathlib import Path

from _figures import Row, read

NO_WHEELS = "No sizes are committed yet: `make release-check` builds the wheels and writes them."
NO_ARM = "No results are committed yet: `make neon` writes them."
NO_MATRIX = "No versions are committed yet: `python -m release.matrix` tests a wheel beside them."


def _when(rows: list[Row]) -> str:
    commits = ", ".join(f"`{commit}`" for commit in dict.fromkeys(row["commit"] for row in rows))
    return f"{', '.join(sorted({row['date'] for row in rows}))}, commit {commits}"


def wheels(results: Path) -> str:
    """What one machine built."""
    rows = read(results / "release/wheels.csv")
    if not rows:
        return NO_WHEELS + "\n"
    (limit,) = {row["limit"] for row in rows}
    built = next((row for row in rows if row["compiler"]), None)
    by = f", built by {built['compiler']} beside torch {built['torch']}" if built else ""
    lines = [
        f"{_when(rows)}{by}. Each may have {float(limit) / 1e6:g} MB.",
        "",
        "| file | tag | MB |",
        "| --- | --- | --- |",
    ]
    lines += [f"| `{row['name']}` | {row['tag'] or 'source'} | {float(row['bytes']) / 1e6:.2f} |" for row in rows]
    return "\n".join([*lines, ""])


def matrix(results: Path) -> str:
    """The versions of Python and torch beside which a wheel was installed and tested."""
    rows = read(results / "release/matrix.csv")
    if not rows:
        return NO_MATRIX + "\n"
    heads = ["Python", "torch", "C++ kernels", "passed", "failed", "skipped", "in Triton's interpreter", "result"]
    lines = [f"{_when(rows)}.", "", f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    for row in rows:
        counts = [row[name] or "–" for name in ("passed", "failed", "skipped")]
        triton = f"{row['triton_passed']} passed, {row['triton_failed']} failed" if row["triton_passed"] else "–"
        result = row["status"] + (", not all ran in the time" if row["limit_reached"] == "yes" else "")
        cells = [row["python"], row["torch"], row["extension"] or "–", *counts, triton, result]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def arm_tests(results: Path) -> str:
    """The tests that ran on emulated processors."""
    rows = read(results / "neon/tests.csv")
    if not rows:
        return NO_ARM + "\n"
    first = rows[0]
    lines = [
        f"{_when(rows)}, {first['emulated']} emulated by {first['qemu']}, torch {first['torch']}.",
        "",
        "| tests | passed | failed | skipped | all of the file |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        whole = "yes" if row["complete"] == "yes" else "no: its time was up"
        lines.append(f"| `{row['file']}` | {row['passed']} | {row['failed']} | {row['skipped']} | {whole} |")
    total = [str(sum(int(row[name]) for row in rows)) for name in ("passed", "failed", "skipped")]
    return "\n".join([*lines, f"| together | {' | '.join(total)} | |", ""])


def arm_code(results: Path) -> str:
    """What the innermost loops with multiply-adds are made of, by source."""
    rows = [row for row in read(results / "neon/code.csv") if int(row["fmla"])]
    if not rows:
        return NO_ARM + "\n"
    lines = [
        f"{_when(rows)}, {rows[0]['compiler']}.",
        "",
        "| source | loops | multiply-adds | by element | loops that spill |",
        "| --- | --- | --- | --- | --- |",
    ]
    for source in dict.fromkeys(row["source"] for row in rows):
        own = [row for row in rows if row["source"] == source]
        fmla, element = (sum(int(row[name]) for row in own) for name in ("fmla", "by_element"))
        spilling = sum(int(row["spills"]) > 0 for row in own)
        lines.append(f"| `{source}` | {len(own)} | {fmla} | {element} | {spilling} |")
    return "\n".join([*lines, ""])
