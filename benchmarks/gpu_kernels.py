"""Which kernels a call launches on a GPU, and how long each of them takes there: the device's own clock, by PyTorch's
profiler, from cold caches.

For every shape of the suite, the forward alone and forward with backward. Beside the times stands the floor of the
call (see `mvkernels bench`). ``--share K/N`` measures every N-th shape and writes nothing, so that N processes can
compile what one will measure; values are not looked at here, `mvkernels verify` does that.
"""

from __future__ import annotations

import argparse
import collections
import re
import statistics
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from _op import SAME
from _results import folder, merge

from mvkernels import bench, report, testing
from mvkernels.bench import timing
from mvkernels.commands import command
from mvkernels.dispatch.backend import can_run
from mvkernels.dispatch.registry import Cost

ROUNDS = 7
LARGEST = 1 << 28
"""Elements of a call's first tensor: larger calls are left out (they take longer to make than to measure)."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", nargs="+", default=[])
    parser.add_argument("--backend", default="triton", choices=("triton", "cuda"))
    parser.add_argument("--suite", default="full", choices=("small", "full"))
    parser.add_argument("--shape", nargs="+", default=[], metavar="PART", help="only shapes whose name has this in it")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 128])
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"])
    parser.add_argument("--layout", nargs="+", default=[], choices=("channels_last", "channels_first"))
    parser.add_argument("--share", type=command.share, metavar="K/N")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise report.UsageError("needs a CUDA or ROCm device, and there is none")
    asked = bench.Options(
        ops=options.op or report.ops_with([options.backend]),
        suite=options.suite, labels=options.shape, batches=options.batch, dtypes=options.dtype,
        layouts=options.layout, device="cuda", modes=("fwd", "full"),
    )  # fmt: skip
    rates: dict[str, timing.Rates] = {}
    for number, item in enumerate(bench.work(asked)):
        if options.share and number % options.share[1] != options.share[0]:
            continue
        try:
            prepared = call_of(item, options.backend)
            if options.share:
                if prepared is not None:
                    prepared[0]()
                continue
            dtype = item[4]
            if dtype not in rates:
                rates[dtype] = timing.measure_rates("cuda", getattr(torch, dtype))
            found = [] if prepared is None else list(rows(item, options.backend, *prepared, rates[dtype]))
        except Exception as error:  # one shape that fails is said, and the others are measured
            print(f"{item[0].name} {item[1].label} {item[2:]}: {type(error).__name__}: {error}", file=sys.stderr)
            continue
        if found:
            merge_kernels(found)
    return 0


def call_of(item: bench.Item, backend: str) -> tuple[Callable[[], Any], list[Cost]] | None:
    """The call, and the floor of each of its passes; None for one that is too large, or not for CUDA C++."""
    op, case, layout, batch, dtype, mode = item
    alone = case.make(batch=1, dtype=torch.float32, device="meta", layout=layout)
    if batch * next(iter(testing.tensors_in(alone).values())).numel() > LARGEST:
        return None
    arguments = case.make(batch=batch, dtype=getattr(torch, dtype), device="cuda", layout=layout)
    if backend == "cuda" and not can_run(op.name, backend, **arguments)[0]:
        return None
    costs = [op.cost(arguments, backward) for backward in ((False,) if mode == "fwd" else (False, True))]

    def forward() -> Any:
        with torch.no_grad():
            return op.function(**arguments, backend=backend)

    if mode == "fwd":
        return forward, costs
    wanted = {name: value.detach().requires_grad_() for name, value in testing.tensors_in(arguments).items()}
    leaves = testing.with_tensors(arguments, wanted)
    cotangent = torch.randn_like(forward())

    def full() -> Any:
        return torch.autograd.grad(op.function(**leaves, backend=backend), list(wanted.values()), cotangent)

    return full, costs


def rows(
    item: bench.Item, backend: str, call: Callable[[], Any], costs: list[Cost], rates: timing.Rates
) -> Iterator[dict[str, Any]]:
    """A row for each kernel of the call, in the order in which they run."""
    op, case, layout, batch, dtype, mode = item
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    seen: dict[str, list[list[float]]] = {}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(ROUNDS):
            timing.flush()
            call()
        torch.cuda.synchronize()
    this: dict[str, list[float]] = collections.defaultdict(list)
    rounds = 0
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    events = [e for e in profile.profiler.kineto_results.events() if str(e.device_type()).endswith("CUDA")]
    for event in sorted(events, key=lambda e: e.start_ns()):
        if "bitwise_not" in event.name():  # the flush: a round begins
            rounds += 1
            this = collections.defaultdict(list)
            continue
        if rounds:
            this[event.name()].append(event.duration_ns() / 1e3)
            seen.setdefault(event.name(), [])
            if len(seen[event.name()]) < rounds:
                seen[event.name()].append(this[event.name()])
    floor = sum(cost.seconds(rates.copy, rates.matmul) for cost in costs) * 1e6
    for position, (name, each) in enumerate(seen.items()):
        yield {
            **report.machine("cuda"),
            **{"op": op.name, "model": case.model, "label": case.label, "batch": batch, "dtype": dtype},
            **{"layout": layout, "mode": mode, "position": position, "kernel": short(name), "backend": backend},
            "launches": len(each[0]),
            "us": round(statistics.median(sum(one) for one in each), 2),
            "floor_of_call_us": round(floor, 2),
            "copy_gb_s": round(rates.copy / 1e9, 1),
            "matmul_gflop_s": round(rates.matmul / 1e9),
        }


def short(name: str) -> str:
    """A kernel's name without its template arguments."""
    return re.sub(r"<.*", "", name).removeprefix("void ")[:80]


def merge_kernels(found: list[dict[str, Any]]) -> None:
    merge(found, folder("cuda") / "kernels.csv", (*SAME, "backend"))


if __name__ == "__main__":
    sys.exit(command.run("kernels", main))
