"""The kernels of csrc/cuda as PTX, compiled once for each state of their sources."""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def _compile() -> Any:
    spec = importlib.util.spec_from_file_location("compile", ROOT / "csrc" / "cuda" / "compile.py")
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


compiler = _compile()
"""The script that compiles what the package ships."""


def why_not() -> str:
    """Why nothing can be compiled here; empty if it can."""
    try:
        compiler.nvcc()
    except compiler.NoCompiler as error:
        return str(error)
    return ""


@cache
def file_of(module: str, target: str) -> Path:
    """A file of csrc/cuda, which launches know as ``module``, compiled for a target with lines of the source."""
    kept = ROOT / "build" / "cuda" / compiler.state()[:16] / f"{module.replace('/', '.')}.{target}"
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        made = kept.with_suffix(f".{os.getpid()}")
        made.write_bytes(compiler.compiled(compiler.HERE / f"{module}.cu", target, "-lineinfo"))
        made.replace(kept)
    return kept


def ptx_of(module: str) -> str:
    """The PTX of a file."""
    return file_of(module, "compute_80").read_text()
