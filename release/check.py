"""Checks distributions before they are published: one line a check, exit status 1 if one fails.

python -m release.check dist/*.whl dist/*.tar.gz
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from release import binary, contents

ROOT = Path(__file__).resolve().parents[1]


def report(name: str, check: Callable[..., str], *arguments: object) -> bool:
    """Run a check and print its line."""
    try:
        found, ok = check(*arguments), True
    except (contents.Failed, OSError, subprocess.SubprocessError) as error:
        found, ok = str(error), False
    print(f"{'ok' if ok else 'failed':8}{name:12}{found}", flush=True)
    return ok


def tool(module: str, *arguments: str) -> str:
    """The last line that a tool prints; raises Failed with it."""
    line = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    last = ((done.stdout.strip() or done.stderr.strip()).splitlines() or [""])[-1].strip()
    if done.returncode:
        raise contents.Failed(f"{module}: {last}")
    return last


def extension(wheel: Path) -> str:
    """The symbols of the extension in a wheel."""
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as files:
        library = files.extract("mvkernels/_C.abi3.so", folder)
        return binary.symbols(Path(library), binary.listed())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    files = parser.parse_args().files
    line = ["git", "tag", "--points-at", "HEAD"]
    tags = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    done = [report("version", contents.version, ROOT, tags)]
    done.append(report("metadata", tool, "twine", "check", "--strict", *map(str, files)))
    for file in files:
        done.append(report("size", contents.size, file))
        if file.suffix != ".whl":
            done.append(report("contents", contents.sdist_contents, file))
            continue
        done.append(report("contents", contents.wheel_contents, file))
        done.append(report("licence", contents.licence, file, (ROOT / "LICENSE").read_text()))
        done.append(report("tag", contents.tag, file))
        if not contents.is_pure(file):
            done.append(report("symbols", extension, file))
            done.append(report("abi3", tool, "abi3audit", "--strict", str(file)))
    return 0 if all(done) else 1


if __name__ == "__main__":
    sys.exit(main())
