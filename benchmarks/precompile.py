"""Compiles, without a GPU, what benchmarks/gpu.py will ask Triton for: its ``--cache``. Minutes of a GPU are spared.

    python benchmarks/precompile.py --out cache.tar.xz --processes 2
    python benchmarks/gpu.py --cache cache.tar.xz ...               # on the machine with the GPU

Triton finds a compiled kernel by a hash of its own files, the kernel's source, the launch and the options. So both
machines need the same version of Triton; its compiled half differs from one version of Python to another, which
``--key`` makes up for: a file with what ``triton.runtime.cache.triton_key()`` gives on the other machine. A kernel
that is not found is compiled there, as ever.

Launches go through the library's own planning and Triton's own launcher, over a libcuda that does nothing
(tests/triton/fake_cuda), on CPU tensors whose values nobody looks at.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from mvkernels import files, report
from mvkernels.commands import command
from mvkernels.report import UsageError
from tests.devices import PRETENDED
from tests.triton.fake_cuda import driver as fake_cuda

HERE = Path(__file__).resolve().parent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.tar.xz")
    parser.add_argument("--arch", default="sm_90", choices=list(PRETENDED))
    parser.add_argument("--key", type=Path, metavar="FILE", help="default: that of the Triton at hand")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", default="", metavar="TEXT", help="only jobs whose name has this")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        compile_share(options)
        return 0
    if options.processes < 1:
        raise UsageError("--processes: want 1 or more")
    files.check(options.out)
    if options.key:
        try:
            options.key.read_text()
        except ValueError:
            raise UsageError(f"--key: {options.key} is no text") from None
    if not shutil.which("xz"):
        raise UsageError("xz is not installed: it packs what was compiled")
    with tempfile.TemporaryDirectory() as place:
        cache = Path(place) / "triton"
        environment = os.environ | fake_cuda.build(Path(place), os.environ.get("CC", "cc"))
        environment |= {
            "TRITON_CACHE_DIR": str(cache),
            "TRITON_STORE_BINARY_ONLY": "1",
            "PYTHONPATH": os.pathsep.join(
                [
                    str(HERE.parent),
                    str(HERE.parent / "python"),
                    str(HERE),
                    *filter(None, [os.environ.get("PYTHONPATH")]),
                ]
            ),
        }
        environment.pop("TRITON_INTERPRET", None)
        line = [sys.executable, *sys.argv]
        workers = [subprocess.Popen([*line, "--worker", str(k)], env=environment) for k in range(options.processes)]
        status = max([worker.wait() for worker in workers], key=abs)
        # Launchers are C code for this Python, and sources are not looked at.
        leave = ("--exclude=*.so", "--exclude=*.source")
        packed = Path(place) / "cache.tar.xz"
        subprocess.run(["tar", "-C", place, *leave, "-I", "xz -T0 -1", "-cf", str(packed), cache.name], check=True)
        with packed.open("rb") as source, files.replacing(options.out) as kept:
            shutil.copyfileobj(source, kept)
    return int(bool(status))


def compile_share(options: argparse.Namespace) -> None:
    """Every N-th job, N being the number of processes."""
    pretend(options.arch, options.key.read_text().strip() if options.key else None)
    chosen = [(name, job) for name, job in jobs() if options.only in name]
    if not chosen:
        raise SystemExit(f"precompile: no job has {options.only!r} in its name")
    for name, job in chosen[options.worker :: options.processes]:
        try:
            job()
        except Exception as error:  # one that does not compile is refused there too
            print(f"{name}: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr)


def pretend(arch: str, key: str | None) -> None:
    """From here on CPU tensors are that GPU's, and random values are none."""
    import torch
    from triton.runtime import cache

    from mvkernels.dispatch.registry import OPS
    from mvkernels.triton import configs

    fake_cuda.pretend(arch)
    if key is not None:
        cache.triton_key = lambda: key
    configs.device_of = lambda *_: PRETENDED[arch]  # type: ignore[assignment]
    for op in (OPS[name] for name in report.ops_with(["triton"])):
        op.why_not["triton"] = lambda *_, **__: None  # type: ignore[index]

    def empty(*size: Any, generator: Any = None, **how: Any) -> torch.Tensor:
        return torch.empty(*size, **how)

    torch.randn, torch.randn_like = empty, torch.empty_like  # type: ignore[assignment]
    torch.set_num_threads(1)


def jobs() -> Iterator[tuple[str, Callable[[], Any]]]:
    """What gpu.py runs: shapes that are timed, configurations that are tried, shapes that are verified."""
    import _gpu_plan as plan
    import torch

    from mvkernels import bench, testing, tune, verify
    from mvkernels.dispatch.registry import OPS

    def call(op: Any, make: Callable[[], dict[str, Any]]) -> None:
        arguments = testing.normalised(op, make())
        function = partial(op.function, backend="triton")
        with torch.no_grad():
            out = function(**arguments)
        if op.has_backward("triton"):
            testing.run(function, arguments, list(testing.tensors_in(arguments)), torch.empty_like(out))

    done: set[tuple[str, str]] = set()
    timed = bench.Options(report.ops_with(["triton"]), "full", batches=(128, 1), dtypes=("bfloat16",),
                          layouts=("channels_last",), labels=plan.SHAPES)  # fmt: skip
    for op, case, layout, batch, dtype, _ in bench.work(timed):
        make = partial(case.make, batch=batch, dtype=getattr(torch, dtype), layout=layout)
        yield f"time {op.name} {case.label} {batch}", partial(call, op, make)
        if op.name in plan.TUNED and batch == 128:
            few = partial(case.make, batch=32, dtype=torch.bfloat16, layout=layout)
            yield f"tune {op.name} {case.label}", lambda op=op, few=few: tune.compile_case(op, few(), done)
    for name in plan.DTYPES:
        for op in (OPS[each] for each in report.ops_with(["triton"])):
            for shape, strides, verified in verify.inputs(op, "small"):
                make = partial(verified, getattr(torch, name), "cpu")
                yield f"verify {op.name} {shape} {strides} {name}", partial(call, op, make)


if __name__ == "__main__":
    sys.exit(command.run("precompile", main))
