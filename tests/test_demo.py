"""``make demo``, small."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from mvkernels.report import UsageError

ROOT = Path(__file__).parents[1]


def test_the_demo_verifies_and_leaves_its_figures(tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    command = [sys.executable, "examples/demo.py", "--size", "64", "--min-time", "0.001", "--output", str(tmp_path)]
    command.append("--no-others")  # torch.compile alone takes a minute
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'python'}"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    assert "All verified." in run.stdout
    assert "\nswapped, inference  " in run.stdout and "compiled" not in run.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"patch_attention.csv", "timings.png"}


@pytest.fixture
def demo(monkeypatch):
    spec = importlib.util.spec_from_file_location("demo", ROOT / "examples" / "demo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def compile_(model):
        raise RuntimeError("there is no compiler. Set CXX")

    monkeypatch.setattr(torch, "compile", compile_)
    return module


def test_the_demo_says_what_it_leaves_out(demo, monkeypatch, capsys):
    def require(target):
        raise UsageError(f"{target}: onnxruntime is not installed")

    monkeypatch.setattr(demo.export, "require", require)
    assert demo.others(nn.Conv2d(3, 4, 3).eval(), torch.randn(1, 3, 8, 8), 1) == {}
    said = capsys.readouterr().out
    assert "Without compiled: there is no compiler\n" in said
    assert "Without ONNX Runtime: onnx: onnxruntime is not installed\n" in said


def test_the_demo_runs_the_original_in_onnx_runtime(demo, capsys):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval(), torch.randn(1, 3, 8, 8)
    found = demo.others(model, x, 1)
    assert list(found) == ["original, ONNX Runtime"]
    with torch.no_grad():
        torch.testing.assert_close(found["original, ONNX Runtime"](x), model(x))
