"""What every script of a release asks: where the tree is, its version, and whether it is what is committed.

Only Python's own library is imported here: the checks run in an environment without torch.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Measured files are written one after the other and committed together, so they do not make a tree unclean.
NO_DIFFERENCE = ":(exclude)benchmarks/results"


class Failed(Exception):
    """A check did not pass, or something cannot be made; the message is the reason, one line."""


def version(root: Path = ROOT) -> str:
    """The library's version, which mvkernels/version.py alone says."""
    path = root / "mvkernels/version.py"
    found = re.search(r'^__version__ = "([^"]+)"$', path.read_text() if path.exists() else "", re.MULTILINE)
    if found is None:
        raise Failed("mvkernels/version.py names no version")
    return found[1]


def git(root: Path, *arguments: str) -> list[str]:
    """The lines that git prints."""
    line = ["git", "-C", str(root), *arguments]
    return subprocess.run(line, capture_output=True, text=True, check=True).stdout.splitlines()


def commit(root: Path = ROOT) -> str:
    """The commit, without a word on whether the tree is clean: :func:`clean` is asked before."""
    return git(root, "describe", "--always", "--abbrev=10", "--exclude=*")[0]


def clean(root: Path = ROOT) -> str:
    """What is built is what is committed: no file differs from HEAD, and git knows every file or ignores it."""
    if changed := git(root, "status", "--porcelain", "--", ".", NO_DIFFERENCE):
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        raise Failed(f"{changed[0][3:]}{more}: not committed")
    return f"commit {commit(root)}"
