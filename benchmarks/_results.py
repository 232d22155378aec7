"""Where figures go, and the columns that all files share."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from _figures import read

from mvkernels import files, report

ROOT = Path(os.environ.get("MVKERNELS_RESULTS", Path(__file__).parent / "results"))


def folder(device: str = "cpu") -> Path:
    """benchmarks/results/<device>, made if need be."""
    path = ROOT / report.slug(report.machine(device))
    path.mkdir(parents=True, exist_ok=True)
    return path


def write(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write rows, and say where. A column that some rows lack, of an older file say, is empty there."""
    columns = dict.fromkeys(column for row in sorted(rows, key=len, reverse=True) for column in row)
    files.write_csv(path, list(columns), rows)
    print(f"written: {path}", file=sys.stderr)


def show(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """Print some columns of the rows as a table."""
    print(report.table([tuple(row[column] for column in columns) for row in rows], columns))


def merge(rows: Sequence[Mapping[str, Any]], path: Path, same: Sequence[str]) -> None:
    """Write rows into a file in place of those with the same values in the columns ``same``; the others stay."""
    new = {tuple(str(row[key]) for key in same) for row in rows}
    kept = [row for row in read(path) if tuple(row[key] for key in same) not in new]
    write(sorted([*kept, *rows], key=lambda row: [str(row[key]).zfill(5) for key in same]), path)


def replace(rows: Sequence[Mapping[str, Any]], path: Path, key: str) -> None:
    """Write rows into a file in the places of those with the same value in the column ``key``, new ones at the end."""
    new = {str(row[key]): row for row in rows}
    write([*(new.pop(row[key], row) for row in read(path)), *new.values()], path)


def stem(name: str, threads: int | str) -> str:
    """A file for each count of threads, one being the figure that pages quote."""
    return name if int(threads) == 1 else f"{name}_{threads}_threads"


def keep_pages() -> None:
    """Run the script again with freed memory kept by the process, unless it is."""
    report.restart_keeping_pages(sys.argv)
