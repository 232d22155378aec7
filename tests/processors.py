"""PyTorch, the libraries under it and this one, held to what another processor has."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

from _held import HELD as PROCESSORS  # noqa: E402


def python(processor: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter on that processor, with one thread."""
    command = [sys.executable, *arguments]
    # Inductor's cache does not tell processors apart that are held to less than they have: code of the one crashed the
    # other (seen in torch 2.13).
    with tempfile.TemporaryDirectory() as cache:
        environment = {
            **os.environ,
            **PROCESSORS[processor],
            "OMP_NUM_THREADS": "1",
            "TORCHINDUCTOR_CACHE_DIR": cache,
            **environment,
        }
        return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
