"""What the compiled extension asks of the machine it is loaded on: libraries, and symbols of torch."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from release.contents import Failed

OF_TORCH = re.compile(r"(aoti_torch|torch)_\w+")
# Beside torch's C interface: Python's limited API (abi3audit looks at which), and what gcc's and C's libraries define.
OTHERS = re.compile(r"_?Py\w+|_ITM_\w+|__gmon_start__|\w+@@?(GLIBC|GLIBCXX|CXXABI|GCC)_[\d.]+")
LIBRARIES = {"libtorch_cpu.so", "libstdc++.so.6", "libm.so.6", "libgcc_s.so.1", "libc.so.6", "libpthread.so.0"}
LOADER = re.compile(r"ld-linux-[a-z0-9-]+\.so\.\d")
LIST = Path(__file__).parent / "torch_symbols.txt"


def _lines(*command: str) -> list[str]:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def undefined(library: Path) -> set[str]:
    return {line.split()[-1] for line in _lines("nm", "-D", "--undefined-only", str(library)) if line.split()}


def needed(library: Path) -> set[str]:
    text = "\n".join(_lines("readelf", "-dW", str(library)))
    return set(re.findall(r"\(NEEDED\).*\[([^\]]+)\]", text))


def listed(file: Path = LIST) -> set[str]:
    """The functions of torch that the extension may use: those that torch 2.10, its oldest, has."""
    return {line for line in file.read_text().splitlines() if line and not line.startswith("#")}


def symbols(library: Path, allowed: set[str]) -> str:
    """Only symbols of torch's C interface that every torch has, of Python's and of the compiler's libraries."""
    found = undefined(library)
    of_torch = {name for name in found if OF_TORCH.fullmatch(name)}
    if other := sorted(name for name in found - of_torch if not OTHERS.fullmatch(name)):
        raise Failed(f"undefined symbols of no known library: {', '.join(other[:5])}")
    if new := sorted(of_torch - allowed):
        raise Failed(f"not in {LIST.name}, so not known of the oldest torch: {', '.join(new)}")
    if other := sorted(name for name in needed(library) - LIBRARIES if not LOADER.fullmatch(name)):
        raise Failed(f"needs other libraries: {', '.join(other)}")
    return f"{len(of_torch)} of torch, all known of the oldest"
