"""Installs a wheel beside several versions of Python and torch, and runs tests on what was installed: `make matrix`.

    python -m release.matrix WHEEL --python 3.10 3.11 --torch 2.10.0 2.13.0

Every Python is tried with every torch, in an environment of its own under build/release/matrix, which is removed
afterwards: some builds of torch are gigabytes. The tests are copied, so that the package of this checkout is not the
one that is imported. benchmarks/results/release/matrix.csv gets a row for each pair; those of other pairs stay.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from mvkernels import files, report
from release import common
from release.common import ROOT, Failed
from release.neon import outcomes

PLACE = ROOT / "build/release/matrix"
RESULT = ROOT / "benchmarks/results/release/matrix.csv"
COLUMNS = (
    *("python", "torch", "extension", "passed", "failed", "skipped", "triton_passed", "triton_failed", "limit_reached"),
    *("status", "date", "commit", "wheel"),
)
PACKAGES = ("pytest", "hypothesis", "expecttest", "numpy")
MARKS = "not interpreter and not slow"
# Triton's interpreter takes its time: a test of each file shows that kernels and launches fit this Triton.
INTERPRETED = ("-m", "interpreter and not slow", "--one-a-file", "tests/ops")
INSTALLING = 1200
"""Seconds for pip at most."""
PROFILE = "without_shrinking"
"""A plugin of pytest: a failure is to be counted, and not to take minutes while Hypothesis looks for a smaller one."""
PLUGIN = """
from hypothesis import Phase, settings
settings.register_profile("matrix", phases=[Phase.explicit, Phase.generate])
settings.load_profile("matrix")
"""
ABOUT = """
import json, platform, torch, mvkernels
from mvkernels.dispatch import extension
print(json.dumps({"file": mvkernels.__file__, "python": platform.python_version(), "torch": torch.__version__,
                  "extension": extension.instruction_set() or "none", "reason": extension.reason}))
"""

Row = dict[str, str | int]


def interpreter(version: str) -> Path:
    """A Python of that version: a path, `python3.12` of the search path, or one of pyenv's."""
    if os.sep in version:
        return Path(version)
    if found := shutil.which(f"python{version}"):
        done = subprocess.run([found, "--version"], capture_output=True, text=True, check=False)
        if done.stdout.startswith(f"Python {version}."):  # pyenv's stand-ins for versions that are off only complain
            return Path(found)
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    several = sorted(
        root.glob(f"versions/{version}*/bin/python"), key=lambda path: [*map(int, re.findall(r"\d+", path.parts[-3]))]
    )
    if not several:
        raise Failed(f"no Python {version}")
    return several[-1]


def run(line: list[str], log: Path, seconds: int, **environment: str) -> bool:
    """Append what a command prints to a log; False if it fails. Raises TimeoutExpired."""
    kept = {
        name: value for name, value in os.environ.items() if name != "PYTHONPATH" and not name.startswith("MVKERNELS_")
    }
    with log.open("a") as out:
        done = subprocess.run(
            line, cwd=log.parent / "tree", env=kept | environment, stdout=out, stderr=out, timeout=seconds, check=False
        )
    return done.returncode == 0


def last_error(log: Path) -> str:
    """The line in which pip says what is wrong."""
    lines = [line for line in log.read_text().splitlines() if line.startswith("ERROR: ")]
    return " ".join((lines or ["ERROR: pip failed"])[-1].removeprefix("ERROR: ").split())[:150]


def install(wheel: Path, version: str, torch: str, folder: Path) -> Path:
    """An environment with the wheel and that torch; its Python. Raises Failed where there is none to be had."""
    found, log = interpreter(version), folder / "log"
    run([str(found), "-m", "venv", str(folder / "venv")], log, INSTALLING)
    python = folder / "venv/bin/python"
    wanted = "torch" if torch == "newest" else f"torch=={torch}"
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--only-binary=:all:", "--no-cache-dir"]
    try:
        installed = run([*pip, str(wheel.resolve()), wanted, *PACKAGES], log, INSTALLING)
    except subprocess.TimeoutExpired:
        raise Failed(f"pip was not done after {INSTALLING} s") from None
    if not installed:
        raise Failed(last_error(log))
    return python


def tested(python: Path, folder: Path, arguments: list[str], seconds: int, **environment: str) -> dict[str, int | str]:
    """Counts of a run of pytest, which ends when the time is up."""
    log = folder / f"log-{'interpreted' if environment else 'tests'}"
    line = [str(python), "-u", "-m", "pytest", "-o", "addopts=", "-v", "-p", "no:cacheprovider", "--color=no"]
    line += ["-p", PROFILE]
    with contextlib.suppress(subprocess.TimeoutExpired):
        run([*line, *arguments], log, seconds, COLUMNS="400", **environment)
    return outcomes(log.read_text())


def cell(wheel: Path, version: str, torch: str, folder: Path, options: argparse.Namespace) -> Row:
    """What became of one pair."""
    row: Row = {"python": version, "torch": torch}
    try:
        python = install(wheel, version, torch, folder)
    except Failed as error:
        return {**row, "status": f"not to be had: {error}"}
    done = subprocess.run([str(python), "-I", "-c", ABOUT], capture_output=True, text=True, check=False)
    if done.returncode:
        return {**row, "status": f"cannot be imported: {(done.stderr.strip().splitlines() or [''])[-1][:150]}"}
    about = json.loads(done.stdout)
    if not Path(about["file"]).is_relative_to(folder):
        raise Failed(f"imported {about['file']}, which was not installed here")
    # What compiles most goes last: it is slow, and what the time does not reach should be the least.
    tests = [path.relative_to(folder / "tree") for path in (folder / "tree").glob("tests/ops/test_*.py")]
    tests = [str(path) for path in sorted(tests, key=lambda path: ("contract" in path.name, path))]
    found = tested(python, folder, ["-m", MARKS, *(options.tests or tests)], options.seconds)
    triton = tested(python, folder, [*INTERPRETED], options.seconds, TRITON_INTERPRET="1")
    row |= {name: about[name] for name in ("python", "torch", "extension")}
    row |= {name: found[name] for name in ("passed", "failed", "skipped")}
    row |= {"triton_passed": triton["passed"], "triton_failed": triton["failed"]}
    row["limit_reached"] = "no" if found["complete"] == triton["complete"] == "yes" else "yes"
    ran = found["passed"] and triton["passed"]
    failed = found["failed"] or triton["failed"]
    return {**row, "status": "no test ran" if not ran else "tests fail" if failed else about["reason"] or "passed"}


def key(row: Row | dict[str, str]) -> tuple[str, str]:
    """A pair: the first two numbers of Python's version, torch's without how it was built."""
    return ".".join(str(row["python"]).split(".")[:2]), str(row["torch"]).partition("+")[0]


def merged(rows: list[Row], to: Path) -> list[Row | dict[str, str]]:
    """The rows, and those of other pairs that are in the file."""
    old = list(csv.DictReader(to.open(newline=""))) if to.exists() else []
    new = {key(row) for row in rows}
    return sorted([*(row for row in old if key(row) not in new), *rows], key=lambda row: [
        int(number) for part in key(row) for number in re.findall(r"\d+", part)
    ])  # fmt: skip


def copy_tests(to: Path) -> None:
    """The tests and what they read of this tree, without the package."""
    shutil.copytree(ROOT / "tests", to / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "benchmarks", to / "benchmarks", ignore=shutil.ignore_patterns("results", "__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", to)
    (to / f"{PROFILE}.py").write_text(PLUGIN)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--python", nargs="+", required=True, metavar="VERSION", help="3.12, or a path")
    parser.add_argument("--torch", nargs="+", required=True, metavar="VERSION", help="2.10.0, or newest")
    parser.add_argument("--tests", nargs="+", metavar="FILE", help="default: all of tests/ops")
    parser.add_argument("--seconds", type=int, default=900, help="for each run of tests (default: %(default)s)")
    parser.add_argument("--no-file", action="store_true", help="write no file")
    options = parser.parse_args(arguments)
    rows: list[Row] = []
    try:
        if not options.wheel.exists():
            raise Failed(f"{options.wheel}: no such wheel")
        if not options.no_file:
            common.clean()
        here = {"date": report.machine()["date"], "commit": common.commit(), "wheel": options.wheel.name}
        for version, torch in ((version, torch) for version in options.python for torch in options.torch):
            folder = PLACE / f"{version.strip(os.sep).replace(os.sep, '-')}-{torch}"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            copy_tests(folder / "tree")
            try:
                rows.append({**cell(options.wheel, version, torch, folder, options), **here})
            finally:
                shutil.rmtree(folder / "venv", ignore_errors=True)
            print(*rows[-1].values(), flush=True)
            if not options.no_file:  # at once: the next pair may take long
                files.write_csv(RESULT, COLUMNS, merged(rows, RESULT))
    except Failed as error:
        print(f"release.matrix: {error}", file=sys.stderr)
        return 2
    return 1 if any(row.get("failed") or row.get("triton_failed") or not row.get("passed") for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
