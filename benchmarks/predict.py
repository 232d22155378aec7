"""Predicts how long kernels take on a GPU from their machine code. Needs no GPU.

Every kernel that the ops launch at the shapes of ``benchmarks/gpu.py`` is compiled as ever; some blocks of it are
executed (tests/ptx) on tensors of full size, to count what they do; the rest is arithmetic, in benchmarks/_model:

- how often each instruction of the machine code is executed, by class of instruction (counts.py, units.py)
- what a warp alone waits for, by the stalls and scoreboards that the compiler wrote into the code (warps.py)
- sectors between processors and second-level cache, and bytes between that and memory (work.py)
- passes over the banks of shared memory; registers and shared memory, and so the blocks that a processor holds
- the microseconds of each of these alone, and of the launch (limits.py); together they are the prediction

Writes results/audit/prediction.csv: a row for each kernel of each call, and one of the whole call ("all"), forward and
backward each. ``floor_us`` of a call is the op's floor at the peaks of the data sheet; of a kernel, the bytes that it
touches, once. PyTorch's own kernels that an op calls have rows too, ``aten::mm``, with the least that they may take.
``decides`` is the largest limit. ``host_us``, what the host takes to launch, is no part of the rest.

A call is SLOW if its prediction is more than twice its floor, and more than 5 us, below which the launch decides.
Exit status: 1 if one is SLOW on each backend that it runs on, 2 for bad usage.

How near that comes to measured times: benchmarks/validate.py.
"""

from __future__ import annotations

import argparse
import datetime
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import _forked
import triton
from _gpu_plan import SHAPES
from _model import library, limits, suite, work
from _model.devices import DEVICES, Device
from _results import merge

from mvkernels import report
from mvkernels.commands import command
from mvkernels.report import commit, table

TARGET = Path(__file__).parent / "results" / "audit" / "prediction.csv"
SLOW, LEAST = 2.0, 5.0
"""Times the floor, and microseconds, from which on a call is slow."""
CALL = ("device", "op", "backend", "model", "label", "batch", "dtype", "layout", "mode")
COLUMNS = [*CALL, "kernel", "grid", "warps", "registers", "spill_bytes", "shared_bytes", "blocks_per_processor",
           "limited_by", "waves", "warp_instructions", *(f"{name}_us" for name in limits.NAMES), "decides",
           "host_us", "predicted_us", "floor_us", "ratio", "verdict", "date", "triton", "commit"]  # fmt: skip
HEAD = ["device", "op", "backend", "shape", "batch", "layout", "mode", "us", "floor", "times", "verdict",
        "kernels: us (what decides)"]  # fmt: skip


def rows(call: suite.Call, name: str, device: Device) -> list[dict[str, Any]]:
    """Those of a call: for each pass one of each kernel, and one of all."""
    found = []
    for each in suite.passes(call, device):
        same = dict(zip(CALL, (name, call.op, call.backend, call.case.model, call.case.label, call.batch, call.dtype,
                               call.layout, each.mode)))  # fmt: skip
        parts = [limits.times(launch, device) for launch in each.launches]
        for launch, times in zip(each.launches, parts):
            found.append(same | of_kernel(launch, times, device))
        for called in each.others:
            parts.append(times := library.times(called, device, call.dtype))
            found.append(same | {"kernel": called.kernel} | taken(times, called.bytes, device))
        total = {f"{key}_us": sum(times.each[key] for times in parts) for key in limits.NAMES}
        predicted = sum(times.predicted for times in parts)
        floor = floor_of(each, device, call.dtype)
        found.append(
            same
            | {"kernel": "all", "warp_instructions": round(sum(x.warp_instructions for x in each.launches))}
            | {key: f"{value:.4g}" for key, value in total.items()}
            | {"host_us": limits.HOST * len(parts)}
            | {"decides": max(limits.NAMES, key=lambda key: total[f"{key}_us"])}
            | judged(predicted, floor)
        )
    return found


def of_kernel(launch: work.Work, times: limits.Times, device: Device) -> dict[str, Any]:
    """The columns of one launch."""
    return {
        "kernel": launch.kernel, "grid": launch.grid, "warps": launch.warps, "registers": launch.registers,
        "spill_bytes": launch.spilled, "shared_bytes": launch.shared_bytes, "blocks_per_processor": launch.resident,
        "limited_by": launch.limited_by,
        "waves": round(launch.grid / device.processors / max(launch.resident, 1), 2),
        "warp_instructions": round(launch.warp_instructions),
    } | taken(times, launch.once_bytes, device)  # fmt: skip


def taken(times: limits.Times, once_bytes: float, device: Device) -> dict[str, Any]:
    """The columns of a kernel's times."""
    floor = once_bytes / device.bytes * 1e6
    return {f"{name}_us": f"{value:.4g}" for name, value in times.each.items()} | {
        "decides": times.decides, "host_us": limits.HOST, "predicted_us": f"{times.predicted:.4g}",
        "floor_us": f"{floor:.4g}", "ratio": f"{times.predicted / floor:.3g}" if floor else "", "verdict": "",
    }  # fmt: skip


def floor_of(each: suite.Pass, device: Device, dtype: str) -> float:
    """Microseconds of the op's floor: bytes, products, exponentials at the peaks, the largest of the three."""
    return 1e6 * max(
        each.bytes / device.bytes, each.flops / device.flops[dtype], each.exponentials / device.exponentials
    )


def judged(predicted: float, floor: float) -> dict[str, Any]:
    """The columns of a call's verdict."""
    slow = predicted > SLOW * floor and predicted > LEAST
    return {"predicted_us": f"{predicted:.4g}", "floor_us": f"{floor:.4g}", "ratio": f"{predicted / floor:.3g}",
            "verdict": "SLOW" if slow else "ok"}  # fmt: skip


def shown(found: Sequence[dict[str, Any]]) -> Iterator[list[Any]]:
    """A line for each call, those furthest from their floors last."""
    calls = [row for row in found if row["kernel"] == "all"]
    for row in sorted(calls, key=lambda row: float(row["ratio"])):
        mine = [each for each in found if each["kernel"] != "all" and all(each[key] == row[key] for key in CALL)]
        parts = ", ".join(f"{each['kernel']} {float(each['predicted_us']):.3g} ({each['decides']})" for each in mine)
        layout = row["layout"].removeprefix("channels_")
        yield [row["device"], row["op"], row["backend"], f"{row['model']} {row['label']}", row["batch"], layout,
               row["mode"], row["predicted_us"], row["floor_us"], row["ratio"], row["verdict"], parts]  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="predict", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--op", action="append", help="only this op (repeatable)")
    parser.add_argument("--backend", nargs="+", default=["triton", "cuda"], choices=("triton", "cuda"))
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"], choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--batch", nargs="+", type=int, default=[32, 128])
    parser.add_argument("--layout", nargs="+", default=["channels_last"])
    parser.add_argument("--shape", nargs="+", default=list(SHAPES), metavar="PART", help="only names with this in them")
    parser.add_argument("--device", nargs="+", default=["H100", "H200"], choices=list(DEVICES))
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, metavar="N", help="default: all cores")
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("--out", type=Path, default=TARGET, metavar="FILE")
    options = parser.parse_args(argv)
    ops = options.op or report.ops_with(["triton"])
    unknown = [op for op in ops if op not in report.ops_with(["triton"])]
    jobs = (
        []
        if unknown
        else suite.calls(ops, options.batch, options.dtype, options.shape, options.layout, options.backend)
    )
    if not jobs or options.processes < 1 or triton.knobs.runtime.interpret:
        reason = f"no such op: {', '.join(unknown)}" if unknown else "no call matches, no process, or TRITON_INTERPRET"
        print(f"predict: {reason}", file=sys.stderr)
        return 2
    same = {"date": datetime.date.today().isoformat(), "triton": triton.__version__, "commit": commit()}

    def predicted(call: suite.Call) -> tuple[tuple[list[dict[str, Any]], str], list[str]]:
        # Never raises: an error is a fault.
        try:
            of = [row for device in options.device for row in rows(call, device, DEVICES[device])]
            return ([row | same for row in of], ""), []
        except Exception as error:
            text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            return ([], text), [text]

    parts = _forked.results(predicted, jobs, options.processes)
    found = [row for part, _ in parts for row in part]
    failed = [str(job) for job, (_, fault) in zip(jobs, parts) if fault]
    if not options.check:
        merge([{column: row.get(column, "") for column in COLUMNS} for row in found], options.out, CALL)
    print(table(list(shown(found)), HEAD))
    calls = [row for row in found if row["kernel"] == "all"]
    best = list(fastest(calls))
    slow = sum(row["verdict"] == "SLOW" for row in best)
    print(f"{len(calls)} passes of calls on {' and '.join(options.device)}; {slow} of {len(best)} SLOW on each "
          f"backend; {len(failed)} calls failed")  # fmt: skip
    return int(bool(slow or failed))


def fastest(calls: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Of the rows of calls, for each the one of the backend that is predicted to be fastest."""
    of: dict[tuple[str, ...], dict[str, Any]] = {}
    for row in calls:
        key = tuple(str(row[name]) for name in CALL if name != "backend")
        if key not in of or float(row["predicted_us"]) < float(of[key]["predicted_us"]):
            of[key] = row
    yield from of.values()


if __name__ == "__main__":
    sys.exit(command.run("predict", main))
