"""Compiles the files of csrc/cuda with nvcc into what the package ships: `make cuda`, and a build of the package.

Of every ``csrc/cuda/<folder>/<name>.cu`` cubins for the architectures of TARGETS and PTX for all others go to
``mvkernels/cuda/data/<folder>.<name>.<target>.xz``, and what they were made of to ``manifest.json`` beside them.
Nothing is compiled if the sources, the flags and nvcc are those of the manifest. nvcc is the one that ``NVCC`` names,
else that of ``CUDA_HOME``, of the search path, of NVIDIA's Python packages.

    python csrc/cuda/compile.py [--jobs N] [--output FOLDER]

Exit status 1 if there is no nvcc, a file does not compile, or all together are larger than MOST_BYTES. What was made of
other sources is removed then: kernels and the launches of the package have to be of one version.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
DATA = HERE.parents[1] / "mvkernels" / "cuda" / "data"
TARGETS = {
    "sm_80": ("-cubin", "-arch=sm_80"),
    "sm_90a": ("-cubin", "-arch=sm_90a"),
    "sm_100": ("-cubin", "-arch=sm_100"),
    "compute_80": ("-ptx", "-arch=compute_80"),
}
MOST_BYTES = 4_000_000
_LZMA = {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME}
PACKED = {"-cubin": _LZMA | {"lc": 0, "lp": 4, "pb": 4}, "-ptx": _LZMA | {"pb": 0}}
"""How files are compressed: an instruction is 16 bytes, and text has no such steps."""
FLAGS = ("-std=c++17", "-I", str(HERE))
STRICT = ("-Xptxas", "--warn-on-spills", "--Werror", "all-warnings")
"""What is shipped keeps all that it has in registers."""


class NoCompiler(RuntimeError):
    """There is no nvcc."""


def sources() -> list[Path]:
    """What is compiled, each file on its own."""
    return sorted(HERE.glob("*/*.cu"))


def module_of(source: Path) -> str:
    """The name by which launches know a file: ``attention/forward``."""
    return source.relative_to(HERE).with_suffix("").as_posix()


def nvcc() -> str:
    """The compiler's path; raises NoCompiler."""
    wanted = os.environ.get("NVCC")
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    packages = [str(path) for each in sys.path for path in Path(each or ".").glob("nvidia/*/bin/nvcc")]
    tried = [wanted] if wanted else [*(f"{home}/bin/nvcc" for home in homes), "nvcc", *packages]
    for each in tried:
        if found := shutil.which(each):
            return found
    raise NoCompiler(f"no nvcc: looked for {', '.join(tried)}")


def state() -> str:
    """A hash of all that the result depends on but nvcc: sources, headers, flags."""
    found = hashlib.sha256(repr((TARGETS, FLAGS[:-1], STRICT)).encode())
    for path in sorted([*HERE.rglob("*.cu"), *HERE.rglob("*.cuh")]):
        found.update(path.relative_to(HERE).as_posix().encode() + b"\0" + path.read_bytes())
    return found.hexdigest()


def state_of(data: Path) -> str | None:
    """The :func:`state` of what a folder was made of; None if it has nothing."""
    state = manifest_of(data).get("state")
    return state if isinstance(state, str) else None


def manifest_of(data: Path) -> dict[str, object]:
    """What a folder says of itself; empty if there is nothing, or nothing that can be read."""
    try:
        found = json.loads((data / "manifest.json").read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def clear(data: Path) -> None:
    """Remove what was compiled to a folder, first what says that it is there."""
    for each in (data / "manifest.json", *data.glob("*.xz")):
        each.unlink(missing_ok=True)


def compiled(source: Path, target: str, *more: str) -> bytes:
    """A cubin or PTX; raises RuntimeError with what nvcc says. ``more``: further flags."""
    with tempfile.TemporaryDirectory() as folder:
        to = Path(folder) / "out"
        line = [nvcc(), *TARGETS[target], *FLAGS, *more, "-o", str(to), str(source)]
        done = subprocess.run(line, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{source.name} for {target}:\n{done.stderr or done.stdout}")
        return to.read_bytes()


def _bare(ptx: bytes) -> bytes:
    """Without comments, indentation and empty lines, which the driver has no use for."""
    lines = (line.strip() for line in ptx.splitlines())
    return b"\n".join(line for line in lines if line and not line.startswith(b"//")) + b"\n"


def build(data: Path, jobs: int) -> dict[str, int]:
    """Compile everything to a folder; bytes of each file. Raises NoCompiler or RuntimeError."""
    version = subprocess.run([nvcc(), "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release (\d+\.\d+)", version)
    if release is None:
        raise RuntimeError(f"nvcc --version does not say its release: {' '.join(version.split())}")
    manifest = {"cuda": release[1], "nvcc": version.strip().splitlines()[-1], "state": state()}
    before = manifest_of(data)
    if {name: before.get(name) for name in manifest} == manifest:
        return before["files"]  # type: ignore[return-value]
    clear(data)
    data.mkdir(parents=True, exist_ok=True)

    def one(job: tuple[Path, str]) -> tuple[str, int]:
        source, target = job
        name = f"{module_of(source).replace('/', '.')}.{target}.xz"
        code, form = compiled(source, target, *STRICT), TARGETS[target][0]
        packed = lzma.compress(_bare(code) if form == "-ptx" else code, filters=[PACKED[form]])
        (data / name).write_bytes(packed)
        return name, len(packed)

    with ThreadPoolExecutor(jobs) as pool:
        files = dict(pool.map(one, [(source, target) for source in sources() for target in TARGETS]))
    if sum(files.values()) > MOST_BYTES:
        raise RuntimeError(f"{sum(files.values())} bytes are more than the package is to grow by, {MOST_BYTES}")
    (data / "manifest.json").write_text(json.dumps(manifest | {"files": files}, indent=1) + "\n")
    return files


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="default: all cores")
    parser.add_argument("--output", type=Path, default=DATA, metavar="FOLDER")
    options = parser.parse_args()
    try:
        files = build(options.output, max(1, options.jobs))
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        if state_of(options.output) != state():
            clear(options.output)
        print(f"compile.py: {error}", file=sys.stderr)
        return 1
    print(f"{len(files)} files, {sum(files.values()) / 1e6:.2f} MB in {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
