"""What is asked of an installed wheel, and that each answer can be wrong."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from release import installed
from release.common import Failed

SETS = ["baseline", "avx2", "avx512"]


def found(folder: Path, **changes: Any) -> dict[str, Any]:
    right = {"file": str(folder / "mvkernels/__init__.py"), "version": "1.0.0", "seconds": 0.03, "network": []}
    right |= {"error": 3e-7, "reason": "", "build_info": {"instruction_sets": SETS}, "instruction_set": "avx2"}
    return right | changes


def test_what_is_right(tmp_path: Path) -> None:
    installed.judged(found(tmp_path), tmp_path, "1.0.0", SETS)
    installed.judged(found(tmp_path, build_info={}, instruction_set=""), tmp_path, "1.0.0", [])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"file": "/elsewhere/mvkernels/__init__.py"}, "imported 1.0.0 of /elsewhere"),
        ({"version": "0.9.0"}, "imported 0.9.0"),
        ({"build_info": {}, "reason": "not built"}, "kernels for None.*: not built"),
        ({"build_info": {"instruction_sets": SETS[:2]}}, "kernels for .'baseline', 'avx2'., want"),
        ({"network": ["socket.connect"]}, "asks the network: socket.connect"),
        ({"error": 1e-3}, "avx2: error 1.0e-03"),
        ({"error": float("nan")}, "avx2: error nan"),
    ],
)
def test_what_is_wrong(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(Failed, match=reason):
        installed.judged(found(tmp_path, **changes), tmp_path, "1.0.0", SETS)


def test_a_wheel_of_another_machine_is_not_tried(tmp_path: Path) -> None:
    for tag in ("cp310-abi3-macosx_11_0_x86_64", "cp310-abi3-manylinux_2_28_riscv64"):
        wheel = tmp_path / f"mvkernels-1.0.0-{tag}.whl"
        assert "another machine" in installed.installed(wheel, Path(sys.executable), "1.0.0")
    assert installed.of_this_machine(tmp_path / "mvkernels-1.0.0-py3-none-any.whl")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("import socket; socket.getaddrinfo('localhost', 80)", "asks the network: socket"),
        ("import time; end = time.process_time() + 0.6\nwhile time.process_time() < end: pass", "takes 0.[67]"),
        ("raise ImportError('broken')", "broken"),
    ],
    ids=["network", "slow", "broken"],
)
def test_a_wheel_that_does_what_it_should_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, reason: str
) -> None:
    """Of a package that has no more than the probe uses."""
    wheel = tmp_path / "mvkernels-1.0.0-py3-none-any.whl"
    package = f"__version__ = '1.0.0'\ndef patch_attention(q, k, v, size, backend=None): return q\n{line}\n"
    extension = "module, reason = None, ''\ndef build_info(): return {}\ndef instruction_set(): return ''\n"
    about = "mvkernels-1.0.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as files:
        files.writestr("mvkernels/__init__.py", package)
        files.writestr("mvkernels/dispatch/extension.py", extension)
        files.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: mvkernels\nVersion: 1.0.0\n")
        files.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        files.writestr(f"{about}/RECORD", "")
    monkeypatch.setattr(installed, "without_network", lambda: [])  # what is asked counts, not what is answered
    with pytest.raises(Failed, match=reason):
        installed.installed(wheel, Path(sys.executable), "1.0.0")
