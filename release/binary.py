"""What the compiled extension asks of the machine it is loaded on, and what it says of its build."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

from release import macho
from release.common import Failed

OF_TORCH = re.compile(r"(aoti_torch|torch)_\w+")
# Beside torch's C interface: Python's limited API (abi3audit looks at which), and what gcc's and C's libraries define.
OTHERS = re.compile(r"_?Py\w+|_ITM_\w+|__gmon_start__|\w+@@?(GLIBC|GLIBCXX|CXXABI|GCC)_[\d.]+")
LIBRARIES = {"libtorch_cpu.so", "libstdc++.so.6", "libm.so.6", "libgcc_s.so.1", "libc.so.6", "libpthread.so.0"}
LOADER = re.compile(r"ld-linux-[a-z0-9-]+\.so\.\d")
OF_MACOS = {"/usr/lib/libSystem.B.dylib", "/usr/lib/libc++.1.dylib"}
# By the end of a wheel's platform: those of setup.py, of which a wheel has to have every one.
INSTRUCTION_SETS = {"x86_64": ["baseline", "avx2", "avx512"], "aarch64": ["neon"], "arm64": ["neon"]}
INFO = re.compile(rb'\{"torch": "[^\0]*?\}')
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


def build_info(library: Path) -> dict[str, Any]:
    """What ``mvkernels._C.build_info()`` says, read from the file: a binary for another machine cannot be asked."""
    found = INFO.search(library.read_bytes())
    if found is None:
        raise Failed(f"{library.name} does not say how it was built")
    return json.loads(found[0])


def instruction_sets(library: Path, machine: str) -> str:
    """The kernels of every instruction set are in."""
    found = build_info(library)["instruction_sets"]
    if found != INSTRUCTION_SETS[machine]:
        raise Failed(f"kernels for {', '.join(found)}, want {', '.join(INSTRUCTION_SETS[machine])}")
    return ", ".join(found)


def symbols(library: Path, allowed: set[str]) -> str:
    """Only symbols of torch's C interface that every torch has, of Python's and of the compiler's libraries."""
    with library.open("rb") as file:
        if macho.is_one(file.read(4)):
            return _symbols_of_macos(library, allowed)
    found = undefined(library)
    of_torch = {name for name in found if OF_TORCH.fullmatch(name)}
    if other := sorted(name for name in found - of_torch if not OTHERS.fullmatch(name)):
        raise Failed(f"undefined symbols of no known library: {', '.join(other[:5])}")
    if new := sorted(of_torch - allowed):
        raise Failed(f"not in {LIST.name}, so not known of the oldest torch: {', '.join(new)}")
    if other := sorted(name for name in needed(library) - LIBRARIES if not LOADER.fullmatch(name)):
        raise Failed(f"needs other libraries: {', '.join(other)}")
    return f"{len(of_torch)} of torch, all known of the oldest"


def standalone(library: Path) -> str:
    """Nothing of torch and nothing of Python: it is loaded where neither is."""
    with library.open("rb") as file:
        macos = macho.is_one(file.read(4))
    libraries, found = macho.asked(library) if macos else (needed(library), undefined(library))
    if other := sorted(name for name in found if OF_TORCH.fullmatch(name) or re.match(r"_?Py", name)):
        raise Failed(f"{library.name} asks for torch or Python: {', '.join(other[:5])}")
    known = OF_MACOS if macos else LIBRARIES - {"libtorch_cpu.so"}
    if other := sorted(name for name in libraries - known if not LOADER.fullmatch(name)):
        raise Failed(f"{library.name} needs other libraries: {', '.join(other)}")
    return f"{library.name} asks for neither torch nor Python"


def _symbols_of_macos(library: Path, allowed: set[str]) -> str:
    """No symbol has a version there, so of C++ only names inside torch can be told from those of its library."""
    libraries, found = macho.asked(library)
    of_torch = {name for name in found if OF_TORCH.fullmatch(name)}
    if other := sorted(name for name in found if re.match(r"_ZNK?(2at|3c10|5torch)", name)):
        raise Failed(f"C++ of torch, which differs between its versions: {', '.join(other[:5])}")
    if new := sorted(of_torch - allowed):
        raise Failed(f"not in {LIST.name}, so not known of the oldest torch: {', '.join(new)}")
    if other := sorted(libraries - OF_MACOS):
        raise Failed(f"needs other libraries: {', '.join(other)}")
    return f"{len(of_torch)} of torch, all known of the oldest"
