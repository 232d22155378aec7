"""What the matrix of versions makes of an environment that cannot be had, of old rows, and of counts."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from release import common, matrix

COUNTS = {"passed": 3, "failed": 0, "skipped": 1, "complete": "yes"}
OPTIONS = argparse.Namespace(tests=["tests/ops/test_vmap.py"], seconds=60)


def row(python: str, torch: str, **more: str) -> dict[str, str]:
    return {"python": python, "torch": torch, **more}


def test_rows_of_other_pairs_stay(tmp_path: Path) -> None:
    file = tmp_path / "matrix.csv"
    file.write_text("python,torch,status\n3.12.1,2.9.1,a\n3.9,2.10.0,b\n3.10.13,2.10.0+cu128,c\n")
    rows = matrix.merged([row("3.10.14", "2.10.0+cpu", status="new")], file)
    assert [(each["python"], each["status"]) for each in rows] == [("3.9", "b"), ("3.10.14", "new"), ("3.12.1", "a")]
    assert len(matrix.merged([row("3.10.14", "2.11.0")], file)) == 4
    assert matrix.merged([row("3.10", "2.10.0")], tmp_path / "none.csv") == [row("3.10", "2.10.0")]


def test_what_cannot_be_had_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert matrix.cell(Path("a.whl"), "3.99", "2.10.0", tmp_path, OPTIONS) == {
        "python": "3.99",
        "torch": "2.10.0",
        "status": "not to be had: no Python 3.99",
    }
    (tmp_path / "tree").mkdir()
    monkeypatch.setattr(matrix, "run", lambda line, *_: "venv" in line)
    (tmp_path / "log").write_text(
        "ERROR: Could not find it\nERROR: No matching distribution found for torch==9\nnotice\n"
    )
    found = matrix.cell(Path("a.whl"), sys.executable, "9", tmp_path, OPTIONS)
    assert found["status"] == "not to be had: No matching distribution found for torch==9"

    def slow(line: list[str], log: Path, seconds: int) -> bool:
        if "pip" in line:
            raise subprocess.TimeoutExpired(line, seconds)
        return True

    monkeypatch.setattr(matrix, "run", slow)
    found = matrix.cell(Path("a.whl"), sys.executable, "2.10.0", tmp_path, OPTIONS)
    assert found["status"] == f"not to be had: pip was not done after {matrix.INSTALLING} s"


@pytest.mark.parametrize(
    ("extension", "tests", "triton", "status", "reached"),
    [
        (("avx2", ""), {}, {}, "passed", "no"),
        (("none", "needs torch 2.10"), {}, {}, "needs torch 2.10", "no"),
        (("avx2", ""), {"failed": 1}, {}, "tests fail", "no"),
        (("avx2", ""), {}, {"failed": 1}, "tests fail", "no"),
        (("avx2", ""), {"complete": "no"}, {}, "passed", "yes"),
        (("avx2", ""), {}, {"complete": "no", "passed": 0}, "no test ran", "yes"),
    ],
)
def test_what_a_pair_comes_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extension: tuple[str, str],
    tests: dict[str, Any], triton: dict[str, Any], status: str, reached: str,
) -> None:  # fmt: skip
    about = {"file": str(tmp_path / "a.py"), "python": "3.12.1", "torch": "2.10.0+cpu"}
    about |= dict(zip(("extension", "reason"), extension))
    monkeypatch.setattr(matrix, "install", lambda *_: Path(sys.executable))
    monkeypatch.setattr(matrix, "ABOUT", f"import json; print(json.dumps({about!r}))")

    def tested(*given: Any, **environment: str) -> dict[str, Any]:
        assert given[:2] == (Path(sys.executable), tmp_path) and all(isinstance(each, str) for each in given[2])
        assert ("interpreter and not slow" in given[2]) == (environment == {"TRITON_INTERPRET": "1"})
        return COUNTS | (triton if environment else tests)

    monkeypatch.setattr(matrix, "tested", tested)
    found = matrix.cell(Path("a.whl"), "3.12", "2.10.0", tmp_path, OPTIONS)
    assert (found["status"], found["limit_reached"], found["torch"]) == (status, reached, "2.10.0+cpu")
    assert {*found} <= {*matrix.COLUMNS}
    about["file"] = str(matrix.ROOT / "mvkernels/__init__.py")
    monkeypatch.setattr(matrix, "ABOUT", f"import json; print(json.dumps({about!r}))")
    with pytest.raises(common.Failed, match="which was not installed here"):
        matrix.cell(Path("a.whl"), "3.12", "2.10.0", tmp_path, OPTIONS)


def test_a_run_of_tests_is_counted_and_stopped(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    script = "def test_a(): pass\ndef test_b(): assert not __import__('os').environ.get('MVKERNELS_BACKEND')\n"
    (tmp_path / "tree/test_it.py").write_text(script)
    (tmp_path / f"tree/{matrix.PROFILE}.py").write_text(matrix.PLUGIN)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MVKERNELS_BACKEND", "cpp")  # what is set for the checkout is not for the copy
        patch.setenv("PYTHONPATH", "/nonexistent")
        found = matrix.tested(Path(sys.executable), tmp_path, ["test_it.py"], 100)
    assert found == {"passed": 2, "failed": 0, "skipped": 0, "complete": "yes"}
    (tmp_path / "tree/test_it.py").write_text("import time\ndef test_a(): pass\ndef test_b(): time.sleep(100)\n")
    (tmp_path / "log-tests").unlink()
    found = matrix.tested(Path(sys.executable), tmp_path, ["test_it.py"], 15)
    assert (found["passed"], found["complete"]) == (1, "no")


def test_the_tests_are_copied_without_the_package(tmp_path: Path) -> None:
    matrix.copy_tests(tmp_path / "tree")
    assert (tmp_path / "tree" / matrix.INTERPRETED[-1]).exists() and not (tmp_path / "tree/mvkernels").exists()
    assert not list((tmp_path / "tree").rglob("*.csv"))


def test_an_interpreter_by_its_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert matrix.interpreter(sys.executable) == Path(sys.executable)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    for version in ("3.12.9", "3.12.10", "3.1.2"):
        (tmp_path / f"versions/{version}/bin").mkdir(parents=True)
        (tmp_path / f"versions/{version}/bin/python").touch()
    assert "3.12.10" in matrix.interpreter("3.12").parts
    stand_in = tmp_path / "python3.12"
    stand_in.write_text("#!/bin/sh\necho Python 3.12.3\n")
    stand_in.chmod(0o755)
    assert matrix.interpreter("3.12") == stand_in
    stand_in.write_text("#!/bin/sh\nexit 127\n")
    assert "3.12.10" in matrix.interpreter("3.12").parts
    with pytest.raises(common.Failed, match=r"no Python 3\.11"):
        matrix.interpreter("3.11")


def test_errors_are_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["no-such.whl", "--python", "3.12", "--torch", "2.10.0"]
    assert matrix.main(arguments) == 2
    assert capsys.readouterr().err == "release.matrix: no-such.whl: no such wheel\n"
