"""The tables of docs/compatibility.md: what the wheels are, and beside which versions they were tested."""

from __future__ import annotations

from pathlib import Path

from _figures import Row, read

NO_WHEELS = "No sizes are committed yet: `make release-check` builds the wheels and writes them."
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
