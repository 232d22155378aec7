"""Chooses what `mvkernels tune` tries on an H100, by what the compiled kernels do. Needs no GPU.

The launch configurations registered for a kernel are dozens a key, and on the GPU each costs a compilation. Here those
of the models' shapes are compiled and executed (tests/ptx), for a key of each class (``configs.class_of``): of each
kind, a kind being tiles and warps, the nearest to the default, and at most KINDS. What spills, needs more shared memory
than there is, or is wrong is out. Of the others the cycles of a processor are estimated, as the most of what its units
need for what was counted:

- a scheduler issues an instruction of a warp a cycle, and there are four; exponentials take two cycles
- a pass over the banks of shared memory takes a cycle, and 64 bytes a cycle come from the second-level cache
- matrix units multiply at the rate of the data sheet
- a processor that has a block more than others has it alone
- with fewer warps on a processor than RESIDENT, latencies show, in proportion

That orders kinds; it cannot tell what differs within one (stages under way, how the work is spread). So of the kinds
within LEEWAY of the least, the best is tried first, and of each kind its nearest to the default before its next
nearest; last what makes the call use another kernel; MOST in all. What is chosen is executed too, and compared with
float64 as ever.

Writes results/ptx/candidates.csv, a row for each that was compiled, and mvkernels/triton/candidates.json, what was
chosen. All of it in bfloat16: float16 takes the same.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import itertools
import json
import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import _forked
import torch
import triton
from _machine_code import occupancy, taken
from triton.runtime.errors import OutOfResources

from mvkernels import files, report, testing, tune
from mvkernels.commands import command
from mvkernels.dispatch.registry import OPS, Case
from mvkernels.report import commit, table
from mvkernels.triton import configs
from mvkernels.triton.repeated import RepeatedLaunch
from tests.ptx import launches
from tests.ptx.loading import program_of

RESULTS = Path(__file__).parent / "results" / "ptx" / "candidates.csv"
ARCH, DTYPE = "sm_90", torch.bfloat16
KINDS = 20
TOKENS = 256
"""Of the largest groups that are executed: half a minute each, those of four times as many."""
PROCESSORS = 5
"""To which a batch of one is what tune's batch of 32 is to the 132 of an H100, and asks for the same keys."""
LEEWAY = 1.5
RESIDENT = 8
PER_CYCLE = {"issue": 4, "special": 1 / 2, "shared": 1, "sectors": 2, "matrix": 4096}
"""What a processor of an H100 does in a cycle: instructions of warps; of those exponentials and their like; passes over
the banks; sectors of 32 bytes; floating-point operations of matrix units on half types (NVIDIA H100 Tensor Core GPU
Architecture, 1.1: 989 TFLOPS on 132 processors at 1.83 GHz)."""


@dataclass(frozen=True)
class Candidate:
    """A configuration of a kernel, in a call that launches it."""

    op: str
    case: Case
    layout: str
    call: str
    """"forward", or "backward": that is both."""
    kernel: str
    key: str
    change: configs.Config
    """Of the default."""

    def __str__(self) -> str:
        return f"{self.name} {self.key} {self.change}"

    @property
    def name(self) -> str:
        return f"{self.op}.{self.kernel}"

    def arguments(self, batch: int = 1) -> dict[str, Any]:
        """The op's."""
        return self.case.make(batch=batch, dtype=DTYPE, device="cpu", layout=self.layout)


@dataclass(frozen=True)
class Asked:
    """A kernel and key that tune asks for, and what is registered for it."""

    default: Candidate
    key: Mapping[str, Any]
    kinds: list[list[configs.Config]]

    def with_change(self, change: configs.Config) -> Candidate:
        return replace(self.default, change=change)

    @property
    def nearest(self) -> list[configs.Config]:
        """Of each kind that is executed."""
        return [kind[0] for kind in self.kinds[:KINDS]]


class Refused(Exception):
    """It spills."""


def asked(batch: int = 1, processors: int = PROCESSORS) -> Iterator[Asked]:
    """Each kernel and key that tune asks for at the models' shapes, once, if anything is registered for it."""
    done: set[tuple[str, str]] = set()
    unlaunched = mock.patch.object(RepeatedLaunch, "__call__", lambda *_: None)
    unwritten = mock.patch.object(launches.Memory, "allocated", lambda *_: None)
    with launches.executed(ARCH, processors), unlaunched, unwritten:
        for op in (OPS[name] for name in report.ops_with(["triton"])):
            for case, layout in ((each, layout) for each in op.suite("full") for layout in each.layouts):
                of = Candidate(op.name, case, layout, "", "", "", {})
                arguments = of.arguments(batch)
                tokens = math.prod(next(iter(testing.tensors_in(arguments).values())).shape[-2:])
                if "patch_size" in arguments and tokens // math.prod(arguments["patch_size"]) > TOKENS:
                    continue
                if math.prod(arguments.get("window_size", ())) > TOKENS:
                    continue
                with torch.no_grad():
                    cotangent = torch.empty_like(op.function(**arguments, backend="triton"))
                for name, call in tune.calls(op, arguments, op.function, cotangent).items():
                    for kernel, text, key in tune.asked_by(op, call, done):
                        default = configs.default(op.name, kernel, key)
                        kinds = tune.kinds(configs.candidates_of(op.name, kernel, key), default)
                        if kinds:
                            yield Asked(replace(of, call=name, kernel=kernel, key=text), key, kinds)


def of_each_class(every: Iterable[Asked]) -> list[Asked]:
    """The first."""
    found: dict[tuple[str, ...], Asked] = {}
    for each in every:
        found.setdefault((each.default.op, each.default.kernel, configs.class_of(each.key)), each)
    return list(found.values())


PREPARED: dict[tuple[str, str, str], Any] = {}
"""The last: candidates of a case come one after the other."""


def prepared(of: Candidate) -> Any:
    """(what results are held against, the calls) of a candidate's case."""
    name = of.op, of.case.label, of.layout
    if name not in PREPARED:
        op = OPS[of.op]
        arguments = testing.normalised(op, of.arguments())
        held, cotangent = tune.yardstick(op, arguments)
        PREPARED.clear()
        PREPARED[name] = held, tune.calls(op, arguments, op.function, cotangent)
    return PREPARED[name]


def executed(candidate: Candidate) -> tuple[dict[str, Any], list[str]]:
    """(a row, faults) of a candidate. Never raises: an error is a fault, unless it says that something does not fit."""
    row: dict[str, Any] = {
        "op": candidate.op, "kernel": candidate.kernel, "key": candidate.key,
        "change": " ".join(f"{name}={value}" for name, value in candidate.change.items()),
        "shape": candidate.case.label, "layout": candidate.layout, "outcome": "ok",
        **dict.fromkeys(("registers", "shared_bytes", "warps", "resident_warps", "blocks", *PER_CYCLE, "cycles"), ""),
    }  # fmt: skip

    def watch(call: launches.Call, _: launches.Memory) -> None:
        if call.kernel != candidate.kernel:
            return
        registers, spill, _stack = taken(call.cubin)
        warps = program_of(call.ptx).module.threads // 32
        resident = warps * occupancy(registers, call.shared_bytes, warps, ARCH)[0]
        row.update(registers=registers, shared_bytes=call.shared_bytes, warps=warps, resident_warps=resident)
        if spill:
            raise Refused

    trying = configs.trying(candidate.op, candidate.kernel, candidate.key, candidate.change)
    try:
        held, calls = prepared(candidate)
        with launches.executed(ARCH, PROCESSORS, watch=watch) as log, trying:
            comparisons = held.compare(calls[candidate.call]())
    except Refused:
        return row | {"outcome": "spills"}, []
    except OutOfResources:
        return row | {"outcome": "shared memory"}, []
    except Exception as error:
        return row | {"outcome": "error"}, [f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"]
    faults = [f"{launch.kernel}: {found}" for launch in log for found in launch.findings]
    faults += [str(each) for each in comparisons if not each.ok]
    if faults:
        return row | {"outcome": "wrong"}, faults
    mine = [launch for launch in log if launch.kernel == candidate.kernel]
    if not mine:
        return row | {"outcome": "another kernel"}, []
    units = [counted(launch.counters) for launch in mine]
    row |= {name: round(sum(each[name] for each in units)) for name in PER_CYCLE}
    row["blocks"] = sum(launch.blocks for launch in mine)
    row["cycles"] = round(sum(
        cycles(max(each.values()), launch.blocks, row["warps"], row["resident_warps"])
        for each, launch in zip(units, mine)
    ))  # fmt: skip
    return row, []


def cycles(work: float, blocks: int, warps: int, resident: int) -> float:
    """Of the processor that has most to do, for ``work`` cycles of all blocks together."""
    most = -(-blocks // PROCESSORS)
    return work / blocks * most * max(1, RESIDENT / min(resident, most * warps))


def counted(counters: launches.machine.Counters) -> dict[str, float]:
    """Cycles that one processor's units need for it."""
    counts = {
        "issue": sum(counters.issued),
        "special": counters.issued[launches.machine.CLASSES.index("special")],
        "shared": counters.shared_wavefronts,
        "sectors": counters.global_sectors,
        "matrix": counters.matrix_flops,
    }
    return {name: count / PER_CYCLE[name] for name, count in counts.items()}


def promising(
    kinds: Sequence[Sequence[configs.Config]], rows: Sequence[Mapping[str, Any]], least: float
) -> list[configs.Config]:
    """What is tried of one key: ``rows`` are of the first of each kind, ``least`` the cycles of the default."""
    good = [(row["cycles"], number) for number, row in enumerate(rows) if row["outcome"] == "ok"]
    limit = LEEWAY * min([least, *(cycles for cycles, _ in good)])
    ranked = [kinds[number] for cycles, number in sorted(good) if cycles <= limit]
    others = [kind[0] for kind, row in zip(kinds, rows) if row["outcome"] == "another kernel"]
    others = others[: tune.MOST]
    return [*tune.interleaved(ranked)[: tune.MOST - len(others)], *others]


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="candidates", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, metavar="N", help="default: all cores")
    parser.add_argument("--kernel", action="append", metavar="OP.KERNEL",
                        help="only this one (repeatable); what the files have of others stays")  # fmt: skip
    options = parser.parse_args(argv)
    same = {"triton": triton.__version__, "date": datetime.date.today().isoformat(), "commit": commit()}
    every = [each for each in of_each_class(asked()) if each.default.name in (options.kernel or [each.default.name])]
    if not every or options.processes < 1:
        print("candidates: there is no such kernel" if not every else "candidates: --processes: want 1 or more",
              file=sys.stderr)  # fmt: skip
        return 2

    def execute(changes: Sequence[Sequence[configs.Config]]) -> list[list[dict[str, Any]]]:
        # Of each that is asked for.
        jobs = [each.with_change(change) for each, some in zip(every, changes) for change in some]
        found = iter(_forked.results(executed, jobs, options.processes))
        return [[row | same for row in itertools.islice(found, len(some))] for some in changes]

    first = execute([[{}, *each.nearest] for each in every])
    chosen = [promising(each.kinds, rows[1:], rows[0]["cycles"] or math.inf) for each, rows in zip(every, first)]
    rest = [[change for change in some if change not in each.nearest] for some, each in zip(chosen, every)]
    second = execute(rest)
    for some, new, rows in zip(chosen, rest, second):
        for change, row in zip(new, rows):
            if row["outcome"] != "ok":
                some.remove(change)
    rows = [row for each in zip(first, second) for part in each for row in part]
    write(every, rows, chosen)
    print(table(list(summary(every, rows, chosen)), COLUMNS))
    wrong = sum(row["outcome"] in ("wrong", "error") for row in rows)
    print(f"{len(rows)} executed, {wrong} wrong; {sum(map(len, chosen))} chosen for {len(chosen)} classes of keys")
    return int(bool(wrong))


def write(every: Sequence[Asked], rows: Sequence[dict[str, Any]], chosen: Sequence[list[configs.Config]]) -> None:
    """Both files; of other kernels they keep what they have."""
    names = {each.default.name for each in every}
    old = list(csv.DictReader(RESULTS.open(newline=""))) if RESULTS.exists() else []
    rows = [*rows, *(row for row in old if f"{row['op']}.{row['kernel']}" not in names)]
    files.write_csv(RESULTS, list(rows[0]), sorted(rows, key=lambda row: (row["op"], row["kernel"])))
    listed = json.loads(configs.LISTED.read_text())["candidates"].get(ARCH, {})
    listed = {name: keys for name, keys in listed.items() if name not in names}
    for each, some in zip(every, chosen):
        if some:  # else what is near is tried
            listed.setdefault(each.default.name, {})[configs.class_of(each.key)] = some
    # A line for each class of keys.
    text = ",\n".join(
        f'"{kernel}": {{\n' + ",\n".join(f' "{key}": {json.dumps(some)}' for key, some in sorted(keys.items())) + "}"
        for kernel, keys in sorted(listed.items())
    )
    files.write(configs.LISTED, f'{{"candidates": {{"{ARCH}": {{\n{text}}}}}}}\n')


COLUMNS = ["kernel", "classes", "registered", "kinds", "spill", "do not fit", "chosen", "most", "best against default"]


def summary(
    every: Sequence[Asked], rows: Sequence[dict[str, Any]], chosen: Sequence[list[configs.Config]]
) -> Iterator[list[Any]]:
    """A line for each kernel."""
    for op, kernel in dict.fromkeys((each.default.op, each.default.kernel) for each in every):
        mine = [row for row in rows if (row["op"], row["kernel"]) == (op, kernel)]
        at = [(each, some) for each, some in zip(every, chosen)
              if (each.default.op, each.default.kernel) == (op, kernel)]  # fmt: skip
        gains = []
        for each, _ in at:
            right = [row for row in mine if row["key"] == each.default.key and row["outcome"] == "ok"]
            default = [row["cycles"] for row in right if not row["change"]]
            gains += [default[0] / min(row["cycles"] for row in right)] if default else []
        yield [
            f"{op}.{kernel}", len(at), sum(len(kind) for each, _ in at for kind in each.kinds),
            sum(len(each.kinds) for each, _ in at),
            *(sum(row["outcome"] == outcome for row in mine) for outcome in ("spills", "shared memory")),
            sum(len(some) for _, some in at), max(len(some) for _, some in at), f"{max(gains, default=0):.2f}",
        ]  # fmt: skip


if __name__ == "__main__":
    sys.exit(command.run("candidates", main))
