"""``make demo``, small."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_the_demo_verifies_and_leaves_its_figures(tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    command = [sys.executable, "examples/demo.py", "--size", "64", "--min-time", "0.001", "--output", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'python'}"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    assert "All verified." in run.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"patch_attention.csv", "timings.png"}
