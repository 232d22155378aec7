"""What the commands print: tables, progress, one-line errors, and the machine that they ran on."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

from mvkernels.version import __version__


class UsageError(Exception):
    """A request that is invalid or cannot be done. A command prints the message, one line, and exits with status 2."""


class Progress:
    """A progress bar on stderr. It is shown in a terminal only, not in a log file."""

    def __init__(self, total: int, stream: TextIO | None = None) -> None:
        self.total, self.done = max(total, 1), 0
        self.stream = stream or sys.stderr
        self.shown = self.stream.isatty()

    def step(self, what: str = "") -> None:
        """Say what is being done now, and count one more as begun."""
        if self.shown:
            filled = 24 * self.done // self.total
            bar = f"[{'#' * filled}{'.' * (24 - filled)}] {self.done}/{self.total} {what}"
            self.stream.write(f"\r\x1b[K{bar[:110]}")
            self.stream.flush()
        self.done += 1

    def close(self) -> None:
        if self.shown:
            self.stream.write("\r\x1b[K")
            self.stream.flush()


def table(rows: Iterable[Sequence[Any]], header: Sequence[str]) -> str:
    """Columns aligned, numbers to the right. No column is ever cut."""
    lines = [[str(cell) for cell in header], *([_cell(cell) for cell in row] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    numeric = [all(_is_number(line[i]) for line in lines[1:]) and len(lines) > 1 for i in range(len(header))]
    out = []
    for number, line in enumerate(lines):
        cells = [cell.rjust(w) if right else cell.ljust(w) for cell, w, right in zip(line, widths, numeric)]
        out.append("  ".join(cells).rstrip())
        if number == 0:
            out.append("  ".join("-" * w for w in widths))
    return "\n".join(out)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _is_number(text: str) -> bool:
    return text in {"", "-"} or re.fullmatch(r"[-+]?[\d.,]+(e[-+]?\d+)?[x%]?|inf|nan", text) is not None


def megabytes(count: int | None) -> str:
    return "-" if count is None else f"{count / 1e6:.2f}"


def microseconds(seconds: float | None) -> str:
    """A time in microseconds with three significant figures."""
    if seconds is None:
        return "-"
    us = seconds * 1e6
    return f"{us:.0f}" if us >= 100 else f"{us:.3g}"


def cpu_name() -> str:
    """The processor's name as its maker gives it."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    for key in ("model name", "Model", "Hardware"):
        found = re.search(rf"^{key}\s*: (.+)$", text, re.MULTILINE)
        if found:
            return found.group(1).strip()
    return platform.machine()


def machine(device: str = "cpu") -> dict[str, str]:
    """The columns that say where a figure comes from."""
    import torch

    from mvkernels.dispatch import extension

    kind = torch.device(device).type
    if kind == "cuda":
        name = torch.cuda.get_device_name(device)
        major, minor = torch.cuda.get_device_capability(device)
        capability = f"sm_{major}{minor}"
    else:
        name = cpu_name() if kind == "cpu" else kind
        capability = extension.instruction_set() or torch.backends.cpu.get_cpu_capability().lower()
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "device": name,
        "capability": capability,
        "torch": torch.__version__,
        "mvkernels": __version__,
        "commit": commit(),
        "threads": str(torch.get_num_threads()),
        "allocator": "kept" if pages_are_kept() else "default",
    }


def check_device(device: str) -> None:
    """Raise UsageError unless tensors with values can be made on the device."""
    import torch

    try:
        torch.empty(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from None


def check_backends(op: str, backends: Sequence[str], device: str) -> None:
    """Raise UsageError with the reason if one of the backends cannot run the op on this device."""
    from mvkernels.dispatch.backend import can_run
    from mvkernels.dispatch.registry import OPS

    arguments = OPS[op].suite("small")[0].make(device=device)
    for backend in backends:
        able, reason = can_run(op, backend, **arguments)
        if not able:
            raise UsageError(f"{op}: backend {backend} cannot run: {reason}")


def ops_with(backends: Sequence[str]) -> list[str]:
    """The ops that are meant where none is named: those with a kernel on each of these backends; all if none has."""
    from mvkernels.dispatch.registry import OPS

    return [n for n, op in OPS.items() if all(b == "reference" or b in op.why_not for b in backends)] or list(OPS)


def version_of(package: str) -> str:
    """The version of an installed package; empty if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def slug(where: dict[str, str]) -> str:
    """A folder name for results of this machine."""
    name = re.sub(r"\((r|tm|c)\)|\bprocessor\b|\bcpu\b", " ", where["device"], flags=re.IGNORECASE)
    return re.sub(r"[^a-z0-9.]+", "-", f"{name} {where['capability']}".lower()).strip("-")


def commit() -> str:
    """The commit of a checkout, "-dirty" after it where files differ; empty for an installed package.

    What a benchmark writes into benchmarks/results is no difference: the first file would mark all later rows.
    ``MVKERNELS_COMMIT`` says it of a copy of a checkout, whose ``.git`` is not there or another commit's.
    """
    root = Path(__file__).resolve().parents[1]
    if "MVKERNELS_COMMIT" in os.environ:
        return os.environ["MVKERNELS_COMMIT"]
    if not (root / ".git").exists():
        return ""
    git = ["git", "-C", str(root)]
    describe = [*git, "describe", "--always", "--abbrev=10", "--exclude=*"]
    compare = [*git, "diff", "--quiet", "HEAD", "--", ".", ":(exclude)benchmarks/results"]
    try:
        name = subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
        return name + ("-dirty" if subprocess.run(compare, capture_output=True, check=False).returncode else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


# glibc maps every large temporary anew and the kernel clears its pages at each call: a benchmark then
# times page faults. With these two, freed pages stay with the process. They are read at its start.
KEEP_PAGES = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(8 << 30)}


def pages_are_kept() -> bool:
    return all(os.environ.get(name) == value for name, value in KEEP_PAGES.items())


def launched(arguments: Sequence[str]) -> list[str]:
    """What followed ``python`` when this command was started with ``arguments``: "-m mvkernels", or the script's path.

    Not always "-m mvkernels", which would find a checkout in the working directory before the installed package.
    """
    started, count = sys.orig_argv[1:], len(arguments)
    if count and started[-count:] != list(arguments):
        return ["-m", "mvkernels", *arguments]  # called from Python
    return started


def restart_keeping_pages(arguments: Sequence[str]) -> None:
    """Run ``python <arguments>`` in place of this process with pages kept; returns if they are, or cannot be."""
    if pages_are_kept() or sys.platform != "linux":
        return
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, *arguments], {**os.environ, **KEEP_PAGES})


def short(value: Any) -> str:
    """``torch.float32`` as ``float32``."""
    return str(value).removeprefix("torch.")
