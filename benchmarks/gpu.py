"""Everything on CUDA tensors, for whoever has a GPU: correctness first, then tuning, then times.

Results go to benchmarks/results/<device>. Each step is noted when it has ended well, so that a run which was cut off
goes on where it stopped; a change of the code, committed or not, or of torch or triton starts from the beginning, and
one of results or of measured configurations does not. Where anything is wrong it stops, with status 1: no time is taken
of kernels that are not right. Without a GPU it says so, status 2; ``--dry-run`` lists the steps and needs none.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from _results import ROOT as RESULTS

from mvkernels import command, files, report
from mvkernels.registry import OPS

HERE = Path(__file__).resolve().parent
NOTES = HERE / "out" / "gpu.json"
MODELS = ("transformers:mobilevit_s", "timm:efficientvit_b1")
OWN_MODEL = "mobile_former_294m"
SOURCE = ("mvkernels/**/*.py", "mvkernels/*.so", "python/**/*.py", "csrc/**/*.*", "tests/**/*.py", "benchmarks/*.py")


@dataclass(frozen=True)
class Step:
    """A command, and how many minutes are set aside for it."""

    name: str
    command: tuple[str, ...]
    minutes: float
    environment: dict[str, str] = field(default_factory=dict)
    needs: str = ""
    """A program without which the step is left out, and the report says so."""


def steps() -> list[Step]:
    """What is run, in this order."""
    return [*correctness(), *tuning(), *times()]


def python(*arguments: str) -> tuple[str, ...]:
    return (sys.executable, *arguments)


def correctness() -> Iterator[Step]:
    tests = python("-m", "pytest", "-q", "-x", "-m", "not interpreter")
    yield Step("info", python("-m", "mvkernels", "info"), 0.5)
    yield Step("tests of the ops", (*tests, "tests/ops"), 8)
    allowed = {"MVKERNELS_TEST_TF32": "1"}
    yield Step(
        "tests of the ops, tf32 allowed",
        (*tests, "tests/ops", "-k", "device or (test_patch_transformer_layer and any_shape)"),
        6,
        allowed,
    )
    yield Step("tests of everything else", (*tests, "-n", "8", "--ignore", "tests/ops"), 9)
    for op in OPS:
        verify = python("-m", "mvkernels", "verify", "--op", op, "--device", "cuda", "--suite", "full")
        yield Step(f"verify {op}", verify, 4)
    yield Step("tests of fused layers", (*tests, "tests/nn/test_fused_layer.py"), 2)
    for tool in ("memcheck", "racecheck"):
        sanitized = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "1")
        one = (*tests, "tests/ops/test_device.py", "-k", "one_shape")
        # Each tensor an allocation of its own: in a block that PyTorch keeps, what is read past an end is not seen.
        alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        yield Step(tool, (*sanitized, *one), 9, alone, needs="compute-sanitizer")


def tuning() -> Iterator[Step]:
    for op in OPS:
        for dtype in ("bfloat16", "float16", "float32"):
            yield Step(f"tune {op} {dtype}", python("-m", "mvkernels", "tune", "--op", op, "--dtype", dtype), 9)


def times() -> Iterator[Step]:
    for op in OPS:
        # Third parties are FlexAttention, and the packages' own code.
        script = python(str(HERE / f"{op}.py"), "--device", "cuda", "--against", "eager,sdpa,compile,thirdparty")
        for dtype in ("bfloat16", "float32"):
            for batch in ("1", "32", "128"):
                yield Step(f"time {op} {dtype} {batch}", (*script, "--dtype", dtype, "--batch", batch), 5)
    for model in MODELS:
        for dtype in ("bfloat16", "float32"):
            script = python(str(HERE / "swapped.py"), "--device", "cuda", "--model", model, "--dtype", dtype)
            yield Step(f"time {model} {dtype}", (*script, "--batch", "1", "32", "128", "--channels-last"), 8)
    for dtype in ("bfloat16", "float32"):
        script = python(str(HERE / "models.py"), "--device", "cuda", "--model", OWN_MODEL, "--dtype", dtype)
        batches = ("--batch", "1", "32", "128", "--mode", "fwd", "full", "--channels-last")
        yield Step(f"time {OWN_MODEL} {dtype}", (*script, *batches), 8)
    # A whole step of training with the layers fused, where no dropout is in the way, against the compiled original.
    layers = python(str(HERE / "swapped.py"), "--device", "cuda", "--model", "timm:mobilevit_s", "--dtype", "bfloat16")
    yield Step("time fused layers", (*layers, "--fused-layers", "--batch", "128", "--channels-last"), 8)
    yield Step("tables", python(str(HERE / "readme_table.py")), 0.2)
    yield Step("pages", python(str(HERE / "pages.py")), 0.2)


def done() -> dict[str, Any]:
    """Step → seconds, of an earlier run of this code on this device."""
    if not NOTES.exists():
        return {}
    notes = json.loads(NOTES.read_text())
    return notes["done"] if notes["of"] == identity() else {}


def identity() -> list[str]:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return [fingerprint(HERE.parent), device, f"torch {torch.__version__}", f"triton {_version('triton')}"]


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def fingerprint(root: Path) -> str:
    """Of the code below a checkout: a commit would not tell one uncommitted change from another."""
    found = hashlib.sha256()
    for path in sorted(path for pattern in SOURCE for path in root.glob(pattern) if path.is_file()):
        found.update(f"{path.relative_to(root).as_posix()} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return found.hexdigest()


def note(seconds: dict[str, Any]) -> None:
    files.write(NOTES, json.dumps({"of": identity(), "done": seconds}, indent=1) + "\n")


def run(step: Step) -> int:
    environment = {**os.environ, "MVKERNELS_TEST_DEVICE": "cuda", **step.environment}
    environment.pop("TRITON_INTERPRET", None)
    print("$", *step.command[1:], flush=True)
    return subprocess.run(step.command, cwd=HERE.parent, env=environment, check=False).returncode


def minutes_of(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} minutes, want more than 0")
    return value


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="list the steps, their minutes, and which are done")
    parser.add_argument("--only", default="", metavar="TEXT", help="only steps whose name has this")
    parser.add_argument("--minutes", type=minutes_of, metavar="M", help="begin no step that may end later than this")
    parser.add_argument("--again", action="store_true", help="also what has ended well before")
    options = parser.parse_args()
    chosen = [step for step in steps() if options.only in step.name]
    if not chosen:
        parser.error(f"no step has {options.only!r} in its name")
    again = {step.name for step in chosen} if options.again else set()
    ended = {name: seconds for name, seconds in done().items() if name not in again}
    if options.dry_run:
        rows = [(s.name, s.minutes, "done" if s.name in ended else "", " ".join(s.command[1:])) for s in chosen]
        print(report.table(rows, ("step", "minutes", "", "command")))
        print(f"{sum(s.minutes for s in chosen if s.name not in ended):.0f} minutes at most, results under {RESULTS}")
        return 0
    if not torch.cuda.is_available():
        print(f"gpu: no CUDA device is available to torch {torch.__version__}; nothing was run", file=sys.stderr)
        return 2
    return go(chosen, ended, options.minutes)


def go(chosen: list[Step], ended: dict[str, Any], minutes: float | None) -> int:
    """Run the steps that have not ended well yet. 1: one failed; 3: no time for the next."""
    start = time.monotonic()
    for step in chosen:
        if step.name in ended:
            continue
        if step.needs and not shutil.which(step.needs):
            print(f"gpu: left out: {step.name}, which needs {step.needs}", file=sys.stderr)
            continue
        begun = time.monotonic()
        if minutes is not None and begun - start + 60 * step.minutes > 60 * minutes:
            print(f"gpu: no time for {step.name}; run it again to go on from there", file=sys.stderr)
            return 3
        if run(step):
            print(f"gpu: failed: {step.name}", file=sys.stderr)
            return 1
        ended[step.name] = round(time.monotonic() - begun, 1)
        note(ended)
    return 0


if __name__ == "__main__":
    sys.exit(command.run("gpu", main))
