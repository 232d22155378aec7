"""What a result of the GPU plan depends on, so that another run can go on from it."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from mvkernels import report

SOURCE = ("mvkernels/**/*.py", "mvkernels/*.so", "python/**/*.py", "csrc/**/*.*", "tests/**/*.py", "benchmarks/*.py")
ROOT = Path(__file__).resolve().parents[1]


def identity() -> list[str]:
    """What a result depends on: code, device, versions."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return [fingerprint(ROOT), device, f"torch {torch.__version__}", f"triton {report.version_of('triton') or 'none'}"]


def fingerprint(root: Path) -> str:
    """Of the code below a checkout: a commit would not tell one uncommitted change from another."""
    found = hashlib.sha256()
    for path in sorted(path for pattern in SOURCE for path in root.glob(pattern) if path.is_file()):
        found.update(f"{path.relative_to(root).as_posix()} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return found.hexdigest()
