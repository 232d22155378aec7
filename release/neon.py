"""Builds the C++ kernels for aarch64, runs their tests in emulation, and reads their machine code: ``make neon``.

Needs Debian's packages g++-aarch64-linux-gnu and qemu-user. Python and PyTorch for aarch64 are fetched once and
unpacked under build/neon. Python runs emulated, so setup.py finds the target's own paths and flags; the compiler that
it calls is this machine's.

Emulation says nothing of time, and no time is written: the files in benchmarks/results/neon have counts.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

from mvkernels import files, report
from release.common import ROOT
from release.neon_code import disassembled, loops

PLACE = ROOT / "build/neon"
RESULTS = ROOT / "benchmarks/results/neon"
TORCH = "2.10.0"  # the oldest that the extension runs on; later wheels for aarch64 may bring CUDA with them
DEBS = ["python3.11", "libpython3.11-dev", "libgomp1", "libstdc++6"]
# Without dependencies, since pip would take those of the machine that it runs on.
WHEELS = [
    f"torch=={TORCH}",
    *("numpy", "filelock", "typing_extensions", "sympy", "mpmath", "networkx", "jinja2", "markupsafe", "fsspec"),
    *("setuptools", "pytest", "iniconfig", "packaging", "pluggy", "pygments", "hypothesis", "sortedcontainers"),
    *("attrs", "expecttest"),
]
PYTHON = PLACE / "root/usr/bin/python3.11"
CPU = "cortex-a76"  # PyTorch's wheel does not load on an older one: it has instructions that Armv8.0 lacks
FILES = [
    *("former_to_mobile", "mobile_to_former", "relu_linear_attention", "linear_attention_cpp", "inverted_residual"),
    *("patch_attention_unequal", "patch_transformer_layer", "packed", "patch_attention", "window_attention"),
    *("multiscale_linear_attention", "conv3x3", "pointwise"),
]
# What compiles needs a compiler on the target, and what is slow on a processor is much slower emulated.
MARKS = "not interpreter and not slow"
NAMES = "not compile and not compiling and not inductor and not export and not threads"


def run(*command: str | Path, log: Path | None = None, environment: dict[str, str] | None = None) -> None:
    out = log.open("w") if log else None
    subprocess.run([*map(str, command)], cwd=ROOT, env={**os.environ, **(environment or {})}, stdout=out, check=True)


def emulated(cpu: str, *paths: Path) -> dict[str, str]:
    return {
        "QEMU_LD_PREFIX": str(PLACE / "root"),
        "QEMU_CPU": cpu,
        "PYTHONPATH": os.pathsep.join(map(str, [*paths, PLACE / "site"])),
        "OMP_NUM_THREADS": "1",
    }


def prepare() -> None:
    """Python, its libraries and PyTorch for aarch64. apt's own state stays as it is."""
    if not PYTHON.exists():
        (PLACE / "apt/state/lists/partial").mkdir(parents=True, exist_ok=True)
        (PLACE / "apt/cache/archives/partial").mkdir(parents=True, exist_ok=True)
        (PLACE / "apt/status").touch()
        apt = PLACE / "apt"
        (PLACE / "apt.conf").write_text(
            'APT::Architecture "arm64"; APT::Architectures { "arm64"; };\n'
            f'Dir::State "{apt}/state"; Dir::State::status "{apt}/status"; Dir::Cache "{apt}/cache";\n'
        )
        settings = {"APT_CONFIG": str(PLACE / "apt.conf")}
        run("apt-get", "-q", "update", environment=settings)
        run("apt-get", "-q", "-y", "install", "--download-only", "--no-install-recommends", *DEBS, environment=settings)
        for package in sorted((PLACE / "apt/cache/archives").glob("*.deb")):
            run("dpkg", "-x", package, PLACE / "root")
    if not (PLACE / "site/torch").exists():
        tags = [f"--platform=manylinux_2_{n}_aarch64" for n in (28, 17)] + ["--platform=manylinux2014_aarch64"]
        tags += ["--python-version=311", "--implementation=cp", "--abi=cp311", "--abi=none"]
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-compile", "--only-binary=:all:"]
        run(*pip, *tags, "--target", PLACE / "site", *WHEELS)


def build() -> None:
    """The extension in build/neon/lib, beside a copy of the tests."""
    for name in ("lib", "objects"):
        shutil.rmtree(PLACE / name, ignore_errors=True)
    (PLACE / "log").mkdir(exist_ok=True)
    include = PLACE / "root/usr/include"
    settings = {
        "MVKERNELS_REQUIRE_EXT": "1",
        "MVKERNELS_SKIP_CUDA": "1",
        "CC": "aarch64-linux-gnu-gcc",
        "CXX": "aarch64-linux-gnu-g++",
        "LDSHARED": "aarch64-linux-gnu-gcc -shared",
        "LDCXXSHARED": "aarch64-linux-gnu-g++ -shared",
        "CPATH": f"{include}:{include}/python3.11",
        "MAX_JOBS": "1",
    }
    where = [f"--build-temp={PLACE}/objects", f"--build-lib={PLACE}/lib"]
    settings.update(emulated(CPU))
    run("qemu-aarch64", PYTHON, "setup.py", "build", *where, log=PLACE / "log/build", environment=settings)
    shutil.copytree(ROOT / "tests", PLACE / "lib/tests")
    shutil.copytree(ROOT / "benchmarks", PLACE / "lib/benchmarks", ignore=shutil.ignore_patterns("results"))
    shutil.copy(ROOT / "pyproject.toml", PLACE / "lib")


def outcomes(log: str) -> dict[str, int | str]:
    """Counts of what ``pytest -v`` printed, also where it was stopped before its end."""
    done = Counter(re.findall(r"\b(PASSED|FAILED|ERROR|SKIPPED)\b.*\[ *\d+%\]", log))
    end = re.search(r"^=+ .*\b(?:passed|failed|error|skipped)\b.* in [\d.]+s.*=+$", log, re.MULTILINE)
    return {
        "passed": done["PASSED"],
        "failed": done["FAILED"] + done["ERROR"],
        "skipped": done["SKIPPED"],
        "complete": "yes" if end else "no",
    }


def tested(cpu: str, seconds: int) -> list[dict[str, int | str]]:
    """Runs each file of tests, for so long at most."""
    rows: list[dict[str, int | str]] = []
    for name in FILES:
        log = PLACE / f"log/{name}"
        command = ["qemu-aarch64", str(PYTHON), "-u", "-m", "pytest", "-o", "addopts=", "-v", "-p", "no:cacheprovider"]
        command += ["--color=no", "-m", MARKS, "-k", NAMES, f"tests/ops/test_{name}.py"]
        environment = {**os.environ, **emulated(cpu, PLACE / "lib"), "COLUMNS": "400"}
        # What was done till the time is up is counted, and that it is not all.
        with log.open("w") as out, contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(command, cwd=PLACE / "lib", env=environment, stdout=out, check=False, timeout=seconds)
        rows.append({"file": f"tests/ops/test_{name}.py", "emulated": cpu, **outcomes(log.read_text())})
        print(*rows[-1].values(), flush=True)
    return rows


def audited() -> list[dict[str, int | str]]:
    rows: list[dict[str, int | str]] = []
    for file in sorted((PLACE / "objects/neon/csrc/cpu").glob("*/*.o")):
        for loop in loops(disassembled(file)):
            rows.append({"source": f"csrc/cpu/{file.parent.name}/{file.stem}.cpp", **vars(loop)})
    return rows


def first_line(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]


def write(name: str, rows: list[dict[str, int | str]], where: dict[str, str]) -> None:
    RESULTS.mkdir(parents=True, exist_ok=True)
    files.write_csv(RESULTS / f"{name}.csv", [*rows[0], *where], ({**row, **where} for row in rows))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", default=CPU, help="the processor that qemu emulates (default: %(default)s)")
    parser.add_argument("--seconds", type=int, default=600, help="for each file of tests (default: %(default)s)")
    parser.add_argument("--code", action="store_true", help="build and read the machine code only")
    arguments = parser.parse_args()
    for program in ("aarch64-linux-gnu-g++", "aarch64-linux-gnu-objdump", "qemu-aarch64"):
        if not shutil.which(program):
            parser.exit(2, f"no {program}: install g++-aarch64-linux-gnu and qemu-user\n")
    here = report.machine()
    where = {
        "date": here["date"],
        "compiler": first_line("aarch64-linux-gnu-g++", "--version"),
        "commit": here["commit"],
    }
    prepare()
    build()
    write("code", audited(), where)
    if arguments.code:
        return 0
    rows = tested(arguments.cpu, arguments.seconds)
    write("tests", rows, {**where, "qemu": first_line("qemu-aarch64", "--version"), "torch": TORCH})
    return 1 if any(row["failed"] or not row["passed"] for row in rows) else 0


if __name__ == "__main__":
    raise SystemExit(main())
