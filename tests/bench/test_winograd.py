"""The errors of conv3x3's algorithms: what the script counts, and the table that the page makes of it."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from mvkernels.dispatch import extension
from mvkernels.dispatch.registry import OPS

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
pytestmark = [
    pytest.mark.skipif(not BENCHMARKS.exists(), reason="needs a checkout"),
    pytest.mark.skipif(extension.module is None, reason=extension.reason),
]


def test_every_algorithm_that_can_run_has_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    numerics, pages = importlib.import_module("numerics"), importlib.import_module("pages")
    rows = numerics.winograd()
    for case in OPS["conv3x3"].suite("full"):
        found = {row["algorithm"]: row for row in rows if row["shape"] == f"{case.model} {case.label}"}
        strided = case.shape["stride"] == 2
        assert list(found) == ["pytorch", "direct"] + ["F(2 x 2)", "F(4 x 4)"] * (not strided)
        assert [row["taken"] for row in found.values()].count(True) == 1 and found["direct"]["taken"] == strided
        errors = {name: float(row["rms_error"]) for name, row in found.items()}
        assert all(1e-8 < error < 3e-6 for error in errors.values())
        if not strided:  # what the op's page says of them
            assert errors["F(2 x 2)"] < 2 * errors["direct"] and 2 < errors["F(4 x 4)"] / errors["F(2 x 2)"] < 4
    machine = {"device": "cpu", "capability": "avx2", "threads": "1", "torch": "2", "date": "today", "commit": "a"}
    results = importlib.import_module("_results")
    results.write([{**machine, **row} for row in rows], tmp_path / "somewhere" / "winograd.csv")
    text = pages.block("winograd", tmp_path)
    assert "| shape | pytorch | direct | F(2 x 2) | F(4 x 4) |" in text
    assert all(text.count(f"| {row['shape']} |") == 1 for row in rows)
