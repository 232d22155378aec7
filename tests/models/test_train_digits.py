"""The parts of examples/train_digits.py that its figure rests on; the training itself is a minute and no test."""

from __future__ import annotations

import argparse
import csv
import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mvkernels import report

pytest.importorskip("sklearn")
SCRIPT = Path(__file__).parents[2] / "examples" / "train_digits.py"
_spec = importlib.util.spec_from_file_location("train_digits", SCRIPT)
assert _spec is not None and _spec.loader is not None
train_digits = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(train_digits)


def test_held_out_digits_are_not_trained_on():
    (pictures, _), (others, other_labels) = train_digits.digits(8)
    assert pictures.shape == (1347, 1, 8, 8) and others.shape == (450, 1, 8, 8)
    assert pictures.min() == -1 and pictures.max() == 1
    assert (other_labels.bincount() - 45).abs().max() <= 2  # as many of each digit
    # Together they are the data set, each picture once.
    rows = torch.cat((pictures, others)).flatten(1).tolist()
    data = importlib.import_module("sklearn.datasets").load_digits()
    assert sorted(rows) == sorted((torch.from_numpy(data.data).float() / 8 - 1).tolist())


def test_the_curve_repeats(monkeypatch):
    """The same weights and batches each time: two runs on one backend differ in their times alone."""
    data = train_digits.digits(8)
    monkeypatch.setattr(train_digits, "digits", lambda size: tuple((x[:64], y[:64]) for x, y in data))
    settings = {"model": "mobile_former_26m", "epochs": 2, "batch": 32, "lr": 1e-3, "size": 8, "seed": 0}
    runs = [
        train_digits.train(argparse.Namespace(**settings), backend, report.Progress(2))
        for backend in ("reference", "reference")
    ]
    assert [(r["loss"], r["accuracy"]) for r in runs[0]] == [(r["loss"], r["accuracy"]) for r in runs[1]]
    assert runs[0][1]["loss"] < runs[0][0]["loss"]
    assert set(runs[0][0]) == set(train_digits.COLUMNS)


def test_rows_of_other_backends_stay(tmp_path):
    path = tmp_path / "digits.csv"
    rows = [{**dict.fromkeys(train_digits.COLUMNS, "1"), "backend": name} for name in ("reference", "cpp")]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, train_digits.COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    merged = train_digits.merge(path, [{**rows[1], "epoch": 2}])
    assert [(r["backend"], r["epoch"]) for r in merged] == [("reference", "1"), ("cpp", 2)]


@pytest.mark.parametrize("arguments", [["--epochs", "0"], ["--backend", "fastest"]], ids=str)
def test_bad_usage(arguments):
    found = subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=False)
    assert found.returncode == 2 and arguments[1] in found.stderr.splitlines()[-1]
