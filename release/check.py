"""Checks distributions before they are published: one line a check, exit status 1 if one fails.

    python -m release.check [FILES] [--python PATH] [--complete] [--glibc 28] [--write]

Without files: whether the tree is clean and its versions agree, which is worth to know before anything is built.
With `--python`, an interpreter that has torch, wheels for this machine are also installed and used.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

from release import binary, common, contents, installed
from release.common import ROOT, Failed

RESULT = "benchmarks/results/release/wheels.csv"
COLUMNS = ("name", "bytes", "limit", "tag", "date", "commit", "compiler", "torch")


def report(name: str, check: Callable[..., str], *arguments: object) -> bool:
    """Run a check and print its line."""
    try:
        found, ok = check(*arguments), True
    except (Failed, OSError, ValueError, subprocess.SubprocessError) as error:
        found, ok = str(error), False
    print(f"{'ok' if ok else 'failed':8}{name:12}{found}", flush=True)
    return ok


def tool(module: str, *arguments: str) -> str:
    """The last line that a tool prints; raises Failed with it."""
    line = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    last = ((done.stdout.strip() or done.stderr.strip()).splitlines() or [""])[-1].strip()
    if done.returncode:
        raise Failed(f"{module}: {last}")
    return last or "no objection"


def of_file(name: str, wheel: Path, check: Callable[..., object], *arguments: object) -> object:
    """What a check of a file in a wheel finds."""
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as files:
        return check(Path(files.extract(f"mvkernels/{name}", folder)), *arguments)


of_extension = partial(of_file, "_C.abi3.so")


def kernels(wheel: Path) -> str:
    """The instruction sets of a wheel, of which it has to have all of its platform's."""
    platform = contents.platforms(wheel)[0]
    machine = next((name for name in binary.INSTRUCTION_SETS if platform.endswith(name)), None)
    if machine is None:
        raise Failed(f"{platform}: not known which instruction sets it has")
    return str(of_extension(wheel, binary.instruction_sets, machine))


def checked(file: Path, version: str, python: Path | None, glibc: int | None) -> bool:
    """Run every check of one file."""
    print(f"{file.name}:")
    done = [report("name", contents.named, file, version), report("size", contents.size, file)]
    if file.suffix != ".whl":
        return all([*done, report("contents", contents.sdist_contents, file)])
    done.append(report("contents", contents.wheel_contents, file))
    done.append(report("licence", contents.licence, file, (ROOT / "LICENSE").read_text()))
    done.append(report("tag", contents.tag, file, glibc))
    if not contents.is_pure(file):
        done.append(report("symbols", of_extension, file, binary.symbols, binary.listed()))
        done.append(report("onnxruntime", of_file, "libmvkernels_onnxruntime.so", file, binary.standalone))
        done.append(report("kernels", kernels, file))
        done.append(report("abi3", tool, "abi3audit", "--strict", str(file)))
    if python is not None:
        done.append(report("installed", installed.installed, file, python, version))
    return all(done)


def row(file: Path, commit: str) -> dict[str, str | int]:
    """What is kept of a distribution."""
    wheel = file.suffix == ".whl"
    info = of_extension(file, binary.build_info) if wheel and not contents.is_pure(file) else {}
    assert isinstance(info, dict)
    return {
        "name": file.name,
        "bytes": file.stat().st_size,
        "limit": contents.MOST_BYTES,
        "tag": file.stem.split("-", 2)[2] if wheel else "",
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "commit": commit,
        "compiler": info.get("compiler", ""),
        "torch": info.get("torch", ""),
    }


def write(files: list[Path], root: Path = ROOT) -> str:
    """The rows of a clean commit, in place of those of another."""
    common.clean(root)
    rows, to = [row(file, common.commit(root)) for file in files], root / RESULT
    to.parent.mkdir(parents=True, exist_ok=True)
    with to.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    return f"{len(rows)} rows in {RESULT}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--python", type=Path, help="an interpreter with torch, to use the wheels with")
    parser.add_argument("--complete", action="store_true", help="the files have to be all that a release has")
    parser.add_argument("--glibc", type=int, metavar="N", help="the newest glibc 2.N that a wheel may need")
    parser.add_argument("--write", action="store_true", help=f"write {RESULT} if all checks pass")
    options = parser.parse_args(arguments)
    files = sorted(options.files)
    done = [report("tree", common.clean)]
    done.append(report("version", lambda: contents.version(ROOT, common.git(ROOT, "tag", "--points-at", "HEAD"))))
    if files:
        done.append(report("metadata", tool, "twine", "check", "--strict", *map(str, files)))
    if options.complete:
        done.append(report("complete", contents.complete, files))
    if all(done):  # else the version that the names are to have may not be known
        done += [checked(file, common.version(), options.python, options.glibc) for file in files]
    if options.write:
        done.append(all(done) and report("written", write, files))
    return 0 if all(done) else 1


if __name__ == "__main__":
    sys.exit(main())
