"""A processor held to fewer instructions than it has, for this library and all that it is compared with."""

from __future__ import annotations

import getpass
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

HELD = {
    "avx2": {
        "MVKERNELS_CPU_ISA": "avx2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "OPENBLAS_CORETYPE": "Haswell",  # NumPy's, which Triton's interpreter computes with
    },
    "baseline": {
        "MVKERNELS_CPU_ISA": "baseline",
        "ATEN_CPU_CAPABILITY": "default",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "OPENBLAS_CORETYPE": "Prescott",
    },
}
"""Environment variables by instruction set. Each library reads its own when it is loaded."""


def hold(isa: str | None, arguments: Sequence[str]) -> None:
    """Run ``python <arguments>`` in place of this process, held to ``isa``; returns if it is, or if that is None."""
    if isa is None or all(os.environ.get(name) == value for name, value in HELD[isa].items()):
        return
    sys.stdout.flush()
    sys.stderr.flush()
    # Inductor keys its cache by what the processor has: code for other vectors would be taken from it, and write beyond
    # its arrays.
    usual = str(Path(tempfile.gettempdir()) / f"torchinductor_{getpass.getuser()}")
    cache = {"TORCHINDUCTOR_CACHE_DIR": f"{os.environ.get('TORCHINDUCTOR_CACHE_DIR', usual)}_{isa}"}
    os.execve(sys.executable, [sys.executable, *arguments], {**os.environ, **HELD[isa], **cache})
