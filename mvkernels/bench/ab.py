"""``mvkernels bench --ab COMMIT``: this checkout against another commit, in pairs of processes that take turns.

The speed of a machine changes between two runs, so the two processes of a pair are sampled in turns, in a random order.
And it depends on where a process finds its memory: the same code can be a third faster in one process than in the next.
So there are several pairs, one after the other. The ratio is that of each side's best pair, and a side is called
slower only if it was in every pair.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mvkernels import report
from mvkernels.bench import timing
from mvkernels.bench.compare import TOLERANCE
from mvkernels.bench.measuring import Options, candidates, work
from mvkernels.bench.rows import geomean

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PAIRS = 6


@dataclass
class Side:
    """One shape: medians of each side's best pair, in microseconds, and the ratio here / there, above 1 if slower."""

    op: str
    shape: str
    batch: int
    dtype: str
    layout: str
    mode: str
    provider: str
    there_us: float | None = None
    here_us: float | None = None
    ratio: float | None = None
    ratio_low: float | None = None
    """The lowest and the highest ratio of a pair."""
    ratio_high: float | None = None
    pairs: int = 0
    verdict: str = ""
    """"slower", "faster", "same", or why there is no time."""
    failed: bool = False

    @property
    def regressed(self) -> bool:
        return self.verdict == "slower" or self.failed


def run(options: Options, commit: str, tolerance: float = TOLERANCE) -> list[Side]:
    """Measure all shapes of the options on both sides. Raises UsageError if the other commit cannot be set up."""
    rows: list[tuple[Side, dict[str, Any], list[tuple[float, float]]]] = []
    for item in work(options):
        op, case, layout, batch, dtype, mode = item
        for backend in candidates(item, options):
            request = {
                "op": op.name, "model": case.model, "label": case.label, "layout": layout, "batch": batch,
                "dtype": dtype, "mode": mode, "backend": backend, "device": options.device, "threads": options.threads,
            }  # fmt: skip
            rows.append((Side(op.name, f"{case.model} {case.label}", batch, dtype, layout, mode, backend), request, []))
    with checkout(commit) as other:
        progress = report.Progress(PAIRS * len(rows))
        for pair in range(PAIRS):
            with worker(ROOT) as here, worker(other) as there:
                for row, request, medians in rows:
                    progress.step(f"{row.op} {row.shape} batch {row.batch} {row.dtype} {row.mode}")
                    if pair and not medians:
                        continue  # the first pair had no time
                    request["checked"] = pair > 0
                    both = _measure(row, {"here": here, "there": there}, request, options)
                    if both is not None:
                        medians.append(both)
        progress.close()
    for row, _, medians in rows:
        if not row.verdict:  # else it says why a pair had no time
            _judge(row, medians, tolerance)
    return [row for row, _, _ in rows]


def _measure(
    row: Side, sides: dict[str, _Worker], request: dict[str, Any], options: Options
) -> tuple[float, float] | None:
    """The medians here and there of one pair of processes, or None, with the reason in the row."""
    answers = {name: side.ask(request) for name, side in sides.items()}
    for name, answer in answers.items():
        if "why" in answer:
            row.verdict, row.failed = f"no time {name}: {answer['why']}", name == "here"
            return None
    samples: dict[str, list[float]] = {name: [] for name in sides}
    order, shuffle = list(sides), random.Random(0).shuffle
    end = time.perf_counter() + 2 * options.min_time / PAIRS
    while not (_enough(len(samples["here"]), options) and (options.rounds or time.perf_counter() >= end)):
        shuffle(order)
        for name in order:
            samples[name].append(sides[name].ask("sample"))
    here, there = (timing.Times(tuple(samples[name])).median for name in ("here", "there"))
    return here, there


def _judge(row: Side, medians: Sequence[tuple[float, float]], tolerance: float) -> None:
    here, there = min(h for h, _ in medians), min(t for _, t in medians)
    ratios = [h / t for h, t in medians]
    row.here_us, row.there_us, row.ratio, row.pairs = here * 1e6, there * 1e6, here / there, len(medians)
    row.ratio_low, row.ratio_high = min(ratios), max(ratios)
    slower, faster = row.ratio_low > 1 + tolerance, row.ratio_high < 1 / (1 + tolerance)
    row.verdict = "slower" if slower else "faster" if faster else "same"


def _enough(count: int, options: Options) -> bool:
    return count >= (options.rounds or 15)


@contextmanager
def files_of(commit: str) -> Iterator[Path]:
    """The files of a commit in a temporary folder."""
    if not (ROOT / ".git").exists():
        raise report.UsageError("--ab needs a git checkout, but mvkernels is an installed package here")
    try:
        found = _git("rev-parse", "--verify", "--quiet", f"{commit}^{{commit}}").strip()
    except (OSError, subprocess.CalledProcessError):
        raise report.UsageError(f"--ab {commit}: there is no such commit in this repository") from None
    with tempfile.TemporaryDirectory(prefix="mvkernels-ab-") as folder:
        path = Path(folder) / "checkout"
        # Not a worktree: that would be written into the repository, and stay there if this process is killed.
        try:
            _git("archive", "--format=tar", f"--output={folder}/checkout.tar", found)
        except subprocess.CalledProcessError as error:
            raise report.UsageError(f"--ab {commit}: {_last_line(error)}") from None
        with tarfile.open(f"{folder}/checkout.tar") as files:
            files.extractall(path, filter="data")
        yield path


@contextmanager
def checkout(commit: str) -> Iterator[Path]:
    """The same with the extension that belongs to it: copied if its sources are those here. Without one here, none."""
    with files_of(commit) as path:
        if built := list((ROOT / "mvkernels").glob("_C*.so")):
            arguments = ["diff", "--quiet", commit, "--", "csrc", "setup.py"]
            if subprocess.run(["git", "-C", str(ROOT), *arguments], check=False).returncode == 0:
                for file in built:
                    shutil.copy2(file, path / "mvkernels")
            else:
                build(path, commit)
        yield path


def build(path: Path, commit: str, **environment: str) -> Path:
    """Build the extension of a commit's checkout in place. Raises UsageError if that cannot be done."""
    print(f"building the extension of {commit[:10]}", file=sys.stderr)
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    try:
        subprocess.run(command, cwd=path, check=True, capture_output=True, text=True, env={**os.environ, **environment})
    except subprocess.CalledProcessError as error:
        raise report.UsageError(f"--ab {commit}: {_last_line(error)}") from None
    built = next((path / "mvkernels").glob("_C*.so"), None)
    if built is None:
        raise report.UsageError(f"--ab {commit[:10]}: the C++ extension of that commit could not be built")
    return built


def _git(*arguments: str) -> str:
    return subprocess.run(["git", "-C", str(ROOT), *arguments], check=True, capture_output=True, text=True).stdout


def _last_line(error: subprocess.CalledProcessError) -> str:
    lines = (error.stderr or error.stdout or str(error)).strip().splitlines()
    return lines[-1] if lines else str(error)


class _Worker:
    def __init__(self, process: subprocess.Popen[str], path: Path) -> None:
        self.process, self.path = process, path

    def ask(self, request: Any) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            print(json.dumps(request), file=self.process.stdin, flush=True)
            return json.loads(self.process.stdout.readline())
        except (BrokenPipeError, json.JSONDecodeError):
            raise report.UsageError(f"--ab: the process of {self.path} has ended; its error is printed above") from None


@contextmanager
def worker(path: Path) -> Iterator[_Worker]:
    """A process on a checkout. Waiting threads of one side must not run against the other's: they sleep."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(path), str(path / "python")))}
    environment |= {"OMP_WAIT_POLICY": "passive"}
    command = [sys.executable, str(HERE / "worker.py"), str(path), str(HERE / "timing.py")]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=path
    ) as process:
        try:
            yield _Worker(process, path)
        finally:
            process.kill()


def text(rows: Sequence[Side], commit: str) -> str:
    """A table of the rows, and a summary."""
    lines = [
        (
            r.op, r.shape, r.batch, r.dtype, r.layout, r.mode, r.provider, _us(r.there_us), _us(r.here_us),
            None if r.ratio is None else f"{r.ratio:.3f}x",
            None if r.ratio is None else f"{r.ratio_low:.3f}..{r.ratio_high:.3f}", r.pairs, r.verdict,
        )
        for r in rows
    ]  # fmt: skip
    header = ("op", "shape", "batch", "dtype", "layout", "mode", "provider", f"{commit[:12]} us", "here us",
              "here/there", "of a pair", "pairs", "verdict")  # fmt: skip
    ratios = [r.ratio for r in rows if r.ratio is not None]
    total = f"{len(rows)} rows, {len(rows) - len(ratios)} without a time, {sum(r.regressed for r in rows)} regressed"
    if ratios:
        total += f", geometric mean of here/there {geomean(ratios):.3f}"
    return f"{report.table(lines, header)}\n\n{total}"


def _us(value: float | None) -> str:
    return "-" if value is None else report.microseconds(value * 1e-6)


def as_json(rows: Sequence[Side]) -> list[dict[str, Any]]:
    return [asdict(row) for row in rows]
