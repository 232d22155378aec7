"""Ten minutes on a GPU: are the kernels right there, how fast are they, and which launch configurations suit it.

Steps that only compile and compare run side by side, those that time run alone. Each has its own limit, and none that
fails stops the others: the last line says how many ended well, and the status is 1 if one did not. Results go to
benchmarks/results/<device> and mvkernels/configs; after every step all of it is packed into OUT/results.tar.gz beside
the logs, and what is new in Triton's cache into another OUT/cache.*.tar.xz, so that a run which is cut off leaves its
part. So does one that is told to end (SIGTERM, Ctrl-C): the steps under way are, too.

    python benchmarks/gpu.py --minutes 9.5 --out DIR
    python benchmarks/gpu.py --minutes 5 --out OTHER --resume DIR

With ``--resume`` the results, logs and cache of DIR are taken over; files of the checkout that differ are kept in
OUT/replaced. What DIR had not begun or not finished is run first, then what had failed or had taken too long. Nothing
needs to be installed but PyTorch, Triton, NumPy, timm, and for the tests pytest, pytest-xdist and hypothesis.
``--rehearse`` runs the same steps where there is no GPU, with short limits: `verify` in float32 on Triton's
interpreter, the rest on the kernels for CPUs or the reference. Steps that need a GPU then end badly or are left out,
and say so.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import json
import lzma
import math
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout need not be installed

import _counters
import torch
from _gpu_plan import COUNTED, Step, steps
from _identity import identity
from _results import merge

from mvkernels import files, report
from mvkernels.commands import command
from mvkernels.dispatch.registry import OPS
from mvkernels.triton import configs

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
WORK = HERE / "out" / "gpu"
"""Logs and compilers' caches."""


class Run:
    """The steps under one deadline, and what has become of them."""

    def __init__(self, out: Path, minutes: float | None, device: str, work: Path = WORK) -> None:
        """``minutes`` None: as long as it takes."""
        self.out, self.work, self.device = out, work, device
        self.done: dict[str, float] = {}
        self.failed: list[str] = []
        """Of earlier runs: what did not end well, though there was time."""
        self.running: list[subprocess.Popen[bytes]] = []
        self.ended = False
        self.cached: set[str] = set()
        self.began = time.monotonic()
        self.limit = math.inf if minutes is None else 60 * minutes
        self.status: dict[str, str] = {}
        self.logs = work / "logs"
        shutil.rmtree(self.logs, ignore_errors=True)
        self.logs.mkdir(parents=True)
        self.out.mkdir(parents=True, exist_ok=True)
        self.environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(
                [str(HERE.parent), str(HERE.parent / "python"), *filter(None, [os.environ.get("PYTHONPATH")])]
            ),
            "PYTHONUNBUFFERED": "1",
            "HF_HUB_OFFLINE": "1",
            "MVKERNELS_TEST_DEVICE": device,
            "TRITON_CACHE_DIR": str(work / "cache" / "triton"),
            "TRITON_STORE_BINARY_ONLY": "1",
            "TORCHINDUCTOR_CACHE_DIR": str(work / "cache" / "inductor"),
        }
        self.environment.pop("TRITON_INTERPRET", None)
        self.results = RESULTS
        if device == "cpu":  # a rehearsal is no measurement
            self.results = work / "results"
            self.environment["MVKERNELS_RESULTS"] = str(self.results)
        self.results = self.results / report.slug(report.machine(device))
        self.results.mkdir(parents=True, exist_ok=True)

    def left(self) -> float:
        return self.limit - (time.monotonic() - self.began)

    def all(self, chosen: Sequence[Step], cores: int) -> None:
        """Every step that has not ended well before; those that had failed come last."""
        todo = [step for step in chosen if step.name not in self.done]
        for again in (False, True):
            part = [step for step in todo if (step.name in self.failed) == again]
            # Those beside each other first, all at once; but what the plan has before all of them.
            first = next((i for i, step in enumerate(part) if step.beside), 0)
            self.alone(part[:first])
            self.together([step for step in part if step.beside], cores)
            self.alone([step for step in part[first:] if not step.beside])

    def alone(self, chosen: Sequence[Step]) -> None:
        """One after the other; nothing is packed meanwhile."""
        for step in chosen:
            self.note(*self.one(step))

    def together(self, chosen: Sequence[Step], workers: int) -> None:
        with concurrent.futures.ThreadPoolExecutor(max(workers, 1)) as pool:
            for future in concurrent.futures.as_completed([pool.submit(self.one, step) for step in chosen]):
                self.note(*future.result())

    def end(self) -> None:
        """Begin nothing more, and end what is under way: for signals."""
        self.ended, self.limit = True, 0.0
        for process in list(self.running):
            threading.Thread(target=stop, args=(process,)).start()

    def one(self, step: Step) -> tuple[Step, str, float]:
        """Run a step: (step, "ok" or what went wrong, seconds)."""
        if step.needs and not shutil.which(step.needs):
            return step, f"left out: needs {step.needs}", 0.0
        seconds = min(step.seconds, self.left() - 6)
        if seconds < 4:
            return step, NO_TIME, 0.0
        begun = time.monotonic()
        with self.log(step).open("w") as log:
            stdout = self.log(step).with_suffix(".json").open("w") if "--json" in step.command else log
            process = subprocess.Popen(
                step.command, cwd=HERE.parent, env=self.environment_of(step), stdout=stdout,
                stderr=log if stdout is not log else subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            self.running.append(process)
            if self.ended:  # meanwhile
                stop(process)
            try:
                code = process.wait(seconds)
                what = CUT_OFF if self.ended else "ok" if code == 0 else f"status {code}"
            except subprocess.TimeoutExpired:
                what = CUT_OFF if self.ended or seconds < step.seconds else "too long"
                stop(process)
            self.running.remove(process)
            if stdout is not log:
                stdout.close()
        return step, what, time.monotonic() - begun

    def environment_of(self, step: Step) -> dict[str, str]:
        # Beside others a process has a core: PyTorch would start a thread for each that the machine has.
        threads = {"OMP_NUM_THREADS": "1"} if step.beside else {}
        return {**self.environment, **threads, **step.environment}

    def log(self, step: Step) -> Path:
        return self.logs / f"{step.name.replace(' ', '_').replace(':', '_').replace(',', '')}.log"

    def note(self, step: Step, what: str, seconds: float) -> None:
        self.status[step.name] = what
        if what == "ok":
            self.done[step.name] = round(seconds, 1)
        lines = self.log(step).read_text(errors="replace").strip().splitlines() if self.log(step).exists() else []
        last = lines[-1][:110] if lines and what != "ok" else ""
        print(f"{time.monotonic() - self.began:5.0f} s  {step.name:44} {what:10} {seconds:5.0f} s  {last}", flush=True)
        if what != NO_TIME:
            self.pack()

    def pack(self) -> None:
        """Everything but the caches, in one file, which is whole at any moment."""
        failed = {name for name, what in self.status.items() if what not in ("ok", CUT_OFF, NO_TIME)}
        failed |= set(self.failed) - set(self.done)
        notes = {"of": identity(), "done": self.done, "failed": sorted(failed), "status": self.status}
        files.write(self.work / "notes.json", json.dumps(notes, indent=1) + "\n")
        packed = self.work / "packing.tar.gz"
        with tarfile.open(packed, "w:gz", compresslevel=1) as tar:
            tar.add(self.logs, arcname="logs")
            tar.add(self.work / "notes.json", arcname="notes.json")
            tar.add(self.results, arcname=f"benchmarks/results/{self.results.name}")
            tar.add(configs.CONFIGS, arcname="mvkernels/configs")
        self.move(packed, "results.tar.gz")
        self.pack_cache()

    def pack_cache(self) -> None:
        """What is new in Triton's cache, for a later run with the same versions of everything: its ``--cache``."""
        cache = self.work / "cache"
        new = {
            str(path.relative_to(cache))
            for path in cache.glob("triton/*/*")
            if path.is_file() and not path.name.startswith("tmp")
        } - self.cached
        if new and shutil.which("xz"):
            packed, names = self.work / "packing.tar.xz", self.work / "packing.txt"
            names.write_text("\n".join(sorted(new)))
            line = ["tar", "-C", str(cache), "-I", "xz -T0 -1", "-cf", str(packed), "-T", str(names)]
            if subprocess.run(line, check=False).returncode == 0:
                self.cached |= new
                self.move(packed, self.next_part())

    def next_part(self) -> str:
        numbers = [int(part.name.split(".")[1]) for part in self.out.glob("cache.[0-9]*.tar.xz")]
        return f"cache.{max(numbers, default=-1) + 1:03}.tar.xz"

    def move(self, file: Path, name: str) -> None:
        """To the folder of what is kept, which may be on another disk: whole at any moment."""
        with file.open("rb") as source, files.replacing(self.out / name) as kept:
            shutil.copyfileobj(source, kept)

    def unpack_cache(self, packed: Path) -> None:
        """A file, or all that a folder has. It is not packed again."""
        parts = sorted(packed.glob("cache*.tar.xz")) if packed.is_dir() else [packed]
        if not parts:
            raise report.UsageError(f"--cache: {packed} has no cache.*.tar.xz")
        for each in parts:
            try:
                with tarfile.open(each) as tar:
                    tar.extractall(self.work / "cache", filter="data")
                    self.cached |= set(tar.getnames())
            except DAMAGED as error:
                raise report.UsageError(f"--cache: {each}: {error}") from None

    def take_over(self, earlier: Path) -> None:
        """The results and logs of an earlier run of this code on this device, and what is left to do."""
        try:
            with tarfile.open(earlier / "results.tar.gz") as tar:
                packed = tar.extractfile("notes.json")
                assert packed is not None
                notes = json.load(packed)
                if differ := [f"{now}, not {was}" for now, was in zip(identity(), notes["of"]) if now != was]:
                    print(f"gpu: {earlier} is of other code or another device, so that all is run: {differ[0]}",
                          file=sys.stderr)  # fmt: skip
                    if earlier.resolve() == self.out:
                        shutil.copyfile(self.out / "results.tar.gz", self.out / "results.earlier.tar.gz")
                    return
                with tempfile.TemporaryDirectory() as folder:
                    tar.extractall(folder, filter="data")
                    places = {f"benchmarks/results/{self.results.name}": self.results, "logs": self.logs}
                    if self.device != "cpu":  # a rehearsal tunes nothing
                        places["mvkernels/configs"] = configs.CONFIGS
                    for name, place in places.items():
                        replace(Path(folder) / name, place, self.out / "replaced" / name)
        except (OSError, KeyError, ValueError, *DAMAGED) as error:
            raise report.UsageError(f"nothing to resume in {earlier}: {error}") from None
        self.done, self.failed = dict(notes["done"]), list(notes["failed"])
        parts = sorted(earlier.glob("cache.*.tar.xz"))
        for part in parts if earlier.resolve() != self.out else []:
            self.move(part, self.next_part())
        if parts:
            self.unpack_cache(earlier)
        else:  # what was compiled there is not here
            self.done = {name: taken for name, taken in self.done.items() if not name.startswith("compile ")}

    def verified(self) -> None:
        """One table of what `verify` found, of all its steps."""
        rows: list[dict[str, Any]] = []
        for path in sorted(self.logs.glob("verify_*.json")):
            try:
                found = json.loads(path.read_text())
            except ValueError:  # cut off
                continue
            rows += [{**report.machine(self.device), **row} for row in found["rows"]]
        if rows:
            merge(rows, self.results / "verify.csv", ("op", "backend", "dtype", "shape", "strides"))

    def counted(self) -> None:
        """One table of the hardware counters of all kernels."""
        rows = [
            {
                **report.machine(self.device),
                "op": op,
                "layout": COUNTED[op][0],
                "batch": 128,
                "dtype": "bfloat16",
                "clocks": "free",
                **row,
            }
            for op in OPS
            if (log := self.logs / f"counters_{op}.log").exists()
            for row in _counters.rows(log.read_text(errors="replace"))
        ]
        if rows:
            merge(rows, self.results / "counters.csv", ("op", "kernel", "grid", "layout", "batch", "dtype"))


CUT_OFF, NO_TIME = "cut off", "no time"
DAMAGED = (tarfile.TarError, EOFError, lzma.LZMAError, zlib.error)


def replace(source: Path, place: Path, kept: Path) -> None:
    """Copy files; those there that differ are kept."""
    for file in (path for path in source.rglob("*") if path.is_file()):
        old = place / file.relative_to(source)
        if old.exists() and old.read_bytes() != file.read_bytes():
            beside = kept / file.relative_to(source)
            while beside.exists():
                beside = beside.with_name(f"{beside.name}.old")
            beside.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(old, beside)
        old.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, old)


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a step with all that it started: asked first, so that it can keep the rows it has."""
    for how, seconds in ((signal.SIGTERM, 3.0), (signal.SIGKILL, 30.0)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, how)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)


def minutes_of(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} minutes, want more than 0")
    return value


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="list the steps and the seconds that each may take")
    parser.add_argument("--only", nargs="+", default=[], metavar="TEXT", help="only steps whose name has one of these")
    parser.add_argument(
        "--leave-out", nargs="+", default=[], metavar="TEXT", help="no step whose name has one of these"
    )
    parser.add_argument("--minutes", type=minutes_of, metavar="M", help="when all of it must have ended")
    parser.add_argument("--out", type=Path, default=WORK, metavar="DIR", help="default: benchmarks/out/gpu")
    parser.add_argument("--resume", type=Path, metavar="DIR", help="the --out of an earlier run")
    parser.add_argument("--cache", type=Path, metavar="PLACE",
                        help="the --out of an earlier run, or a file of precompile.py")  # fmt: skip
    parser.add_argument("--rehearse", action="store_true", help="without a GPU: the same steps at a batch of one")
    options = parser.parse_args()
    device, cores = ("cpu" if options.rehearse else "cuda"), max(os.cpu_count() or 1, 5)
    chosen = [
        step
        for step in steps(options.rehearse, cores, options.cache is not None)
        if (not options.only or any(text in step.name for text in options.only))
        and not any(text in step.name for text in options.leave_out)
    ]
    if not chosen:
        parser.error("no step has such a name")
    if options.dry_run:
        rows = [(s.name, s.seconds, "beside others" if s.beside else "alone", " ".join(s.command[1:])) for s in chosen]
        print(report.table(rows, ("step", "seconds at most", "", "command")))
        return 0
    if device == "cuda" and not torch.cuda.is_available():
        print(f"gpu: no CUDA device is available to torch {torch.__version__}; nothing was run", file=sys.stderr)
        return 2
    run = Run(options.out.resolve(), options.minutes, device)
    if options.resume:
        run.take_over(options.resume)
    if options.cache:
        run.unpack_cache(options.cache)
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, lambda *_: run.end())
    run.all(chosen, cores if device == "cuda" else 1)
    run.verified()
    run.counted()
    run.pack()
    well = sum(what == "ok" for what in run.status.values())
    print(f"{well} of {len(run.status)} steps ended well; {run.out / 'results.tar.gz'}")
    return int(well < len(run.status))


if __name__ == "__main__":
    sys.exit(command.run("gpu", main))
