"""docs/models.md shows what the registry says, and the benchmark of all models runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_page_shows_the_registry():
    found = run("models_table.py", "--check")
    assert found.returncode == 0, found.stderr


def test_the_benchmark_measures_a_model():
    found = run("models.py", "--model", "mobilevit_xxs", "--size", "32", "--rounds", "1", "--no-compile", "--no-file")
    assert found.returncode == 0, found.stderr
    lines = [line.split() for line in found.stdout.splitlines() if line.startswith("mobilevit_xxs")]
    assert [line[6] for line in lines] == ["reference", "fused"] and {line[1] for line in lines} == {"1272024"}


def test_the_benchmark_knows_no_such_model():
    found = run("models.py", "--model", "resnet*", "--no-file")
    assert found.returncode == 2 and found.stderr.splitlines()[-1].endswith("no model is called resnet*")
