"""The parts of benchmarks/digits.py that its figure rests on; the training itself takes minutes and is no test."""

from __future__ import annotations

import csv
import functools
import importlib.util
import json
from pathlib import Path

import pytest

import mvmodels
from mvmodels import registry, vit
from mvmodels.vit import VisionTransformer
from tests.models.agreement import need_cpp

pytest.importorskip("sklearn")
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "digits.py"
_spec = importlib.util.spec_from_file_location("digits", SCRIPT)
assert _spec is not None and _spec.loader is not None
digits = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(digits)


@pytest.fixture
def tiny(monkeypatch):
    """A network of a few thousand parameters, and a tenth of the digits."""
    build = functools.partial(VisionTransformer, vit.Size(32, 1, 2, 2, ()), False, image_size=32)
    monkeypatch.setitem(registry.MODELS, "tiny", registry.ModelInfo("tiny", build, "", 1, 0.0, "", "", None))

    class Fewer(digits.Digits):
        def __len__(self):
            return 192

    monkeypatch.setattr(digits, "Digits", Fewer)


def test_one_of_each_family():
    chosen = digits.smallest()
    papers = {mvmodels.model_info(name).paper for name in mvmodels.list_models()}
    assert {mvmodels.model_info(name).paper for name in chosen} == papers and len(chosen) == len(papers)
    assert {"mobile_former_26m", "vit_c_1gf", "irregular_vit_tiny"} <= set(chosen)


def test_curves(tiny, tmp_path, capsys):
    """The backends agree, the same run repeats, and rows of others stay in the file."""
    need_cpp()
    path, plot = tmp_path / "out" / "digits.csv", tmp_path / "out" / "digits.png"
    command = ["--model", "tiny", "--epochs", "2", "--batch", "32", "--size", "32", "--wanted", "0", "--json", "--csv"]
    assert digits.main([*command, str(path), "--backend", "reference", "--plot", str(plot)]) == 0
    first = json.loads(capsys.readouterr().out)
    assert [row["epoch"] for row in first] == [1, 2] and first[1]["loss"] < first[0]["loss"]
    assert plot.stat().st_size > 10_000
    assert digits.main([*command, str(path), "--backend", "cpp"]) == 0
    second = json.loads(capsys.readouterr().out)
    for a, b in zip(first, second):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
    assert digits.main([*command, str(path), "--backend", "reference"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert [(r["loss"], r["accuracy"]) for r in again] == [(r["loss"], r["accuracy"]) for r in first]
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["backend"], r["epoch"]) for r in rows] == [(b, e) for b in ("cpp", "reference") for e in "12"]
    assert tuple(rows[0]) == digits.COLUMNS and all(r["model"] == "tiny" for r in rows)


def test_less_than_wanted(tiny, capsys):
    command = [
        "--model",
        "tiny",
        "--epochs",
        "1",
        "--batch",
        "96",
        "--size",
        "32",
        "--backend",
        "reference",
        "--wanted",
        "1.01",
    ]
    assert digits.main(command) == 1
    assert "below 101%: tiny on reference" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", ["--epochs 0", "--backend fastest", "--model mobile_former_27m"])
def test_bad_usage(arguments, capsys):
    try:
        status = digits.main(arguments.split())
    except SystemExit as stopped:
        status = stopped.code
    assert status == 2 and arguments.split()[1] in capsys.readouterr().err.splitlines()[-1]
