"""Faults planted into every sum and addition of every op are reported by the criterion."""

from pathlib import Path

import pytest

from mvkernels.dispatch.registry import OPS

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("name", OPS)
def test_planted_faults_are_found(name, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import _faults

    op = OPS[name]
    case = min(op.suite("small"), key=lambda case: case.shape["height"] * case.shape["width"])
    planted = [row for row in _faults.plant(op, case.make()) if row["effect"]]
    assert {row["fault"] for row in planted} >= {"term", "half", "tf32", "scale", "row"}
    missed = [(row["fault"], row["place"], row["share"]) for row in planted if not row["share"] > 1]
    assert not missed, missed
