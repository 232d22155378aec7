"""Static audit of the Triton kernels: what `make audit` runs. Needs no GPU.

Compiles every kernel with the configuration that real calls would get, for sm_80, sm_90, sm_100 and
gfx942, over the shape suite, layouts and dtypes, and reads the machine code: registers, spills,
shared memory against the device's limit, the number of blocks that fit a processor and what it is limited by,
how many matrix instructions there are, how wide the widest global load is. Strides, alignments and constants are
those of real calls: the launches come from the launcher itself, given shapes and strides alone.

``spill_bytes`` is what did not fit the registers. ``stack_bytes`` is other use of the stack, such as the few
bytes that ptxas parks of its own accord to fit one more block on a processor (it has registers left, and does
not park when it is told to use them: the audit compiles such a row twice).

Exit status 1 if there is something against a row, 2 for bad usage. What can be: see ``verdict`` in _audit_code.py.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).parent))  # where it is imported by its path, as the tests do

import _audit_nvcc
from _audit_cases import OPS, Every, aligned_bytes, suite
from _audit_code import amd, nvidia, verdict
from _audit_loops import exceptions
from _audit_targets import DTYPES, TARGETS

from mvkernels import files
from mvkernels.commands import command
from mvkernels.report import Progress, table
from mvkernels.triton.repeated import OPTIONS

POINTER = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.float64: "*fp64"}
COLUMNS = [
    "op", "kernel", "target", "dtype", "batch", "heads", "head_dim", "value_dim", "map", "patch", "tokens", "bias",
    "layout", "config", "registers", "spill_bytes", "stack_bytes", "shared_bytes", "shared_limit",
    "blocks_per_processor", "warps_per_processor", "matrix", "widest_load", "verdict", "cases", "triton", "date",
    "matrix_instructions", "wide_loads", "limited_by", "occupancy", "multiplies", "matrix_products", "aligned_bytes",
    "backend", "loop_divisions", "loop_narrow_loads",
]  # fmt: skip
SHOWN = [
    "kernel", "target", "dtype", "head_dim", "value_dim", "tokens", "bias", "layout", "config", "registers",
    "spill_bytes", "shared_bytes", "warps_per_processor", "limited_by", "matrix", "matrix_instructions",
    "widest_load", "verdict",
]  # fmt: skip
QUICK = 6
RESULTS = Path(__file__).parent / "results" / "audit"
"""A file for each op."""


@dataclass(frozen=True)
class Unit:
    """One compilation: a launch on a target."""

    module: str
    kernel: str
    target: str
    signature: tuple[tuple[str, str], ...]
    constexprs: tuple[tuple[str, Any], ...]
    divisible: tuple[int, ...]
    options: tuple[tuple[str, int], ...]
    op: str = ""


def unit_of(launch: Any, target: str, dtype: torch.dtype) -> Unit:
    """What a launch compiles to: types and specialisations as the runtime would find them."""
    sums = {"rows", "partial", "stats", "stats_parts", "sums", "dsums", "parts", "taps"}
    sums |= {"dq_sums", "dk_sums", "dv_sums", "sums1", "sums2"}
    sum_type = "*fp64" if dtype == torch.float64 else "*fp32"
    indices = {"index", "index_parts"}
    names = list(launch.kernel.arg_names)
    types: dict[str, str] = {}
    divisible = []
    for index, pointer in enumerate(launch.pointers):
        is_sum = pointer in sums and (pointer != "rows" or launch.meta.get("STORE_ROWS", True))
        types[names[index]] = sum_type if is_sum else "*i32" if pointer in indices else POINTER[dtype]
        divisible.append(index)  # allocations, and the slices of these models' qkv, begin at multiples of 16 bytes
    at = len(launch.pointers)
    for name in names[at : at + len(launch.floats)]:
        types[name] = "fp32"
    at += len(launch.floats)
    for name, value in zip(names[at : at + len(launch.ints)], launch.ints, strict=True):
        types[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
    constexprs = {}
    for parameter in launch.kernel.params:
        if parameter.name in types:
            continue
        value = launch.meta[parameter.name]
        if parameter.is_constexpr or value == 1:
            types[parameter.name] = "constexpr"
            constexprs[parameter.name] = value
        else:
            types[parameter.name] = "i32"
            if value % 16 == 0:
                divisible.append(parameter.num)
    ordered = tuple((name, types[name]) for name in names)
    return Unit(launch.kernel.__module__, launch.name, target, ordered, tuple(constexprs.items()), tuple(divisible),
                tuple(launch.options.items()))  # fmt: skip


def compile_unit(unit: Unit | _audit_nvcc.Unit) -> dict[str, Any]:
    """Compile and read the machine code. Never raises: an error is a row."""
    if isinstance(unit, _audit_nvcc.Unit):
        return _audit_nvcc.compile_unit(unit)
    kernel = getattr(importlib.import_module(unit.module), unit.kernel)
    source = ASTSource(
        fn=kernel,
        signature=dict(unit.signature),
        constexprs={(kernel.arg_names.index(name),): value for name, value in unit.constexprs},
        attrs={(index,): [["tt.divisibility", 16]] for index in unit.divisible},
    )
    try:
        target, options = TARGETS[unit.target][0], OPTIONS | dict(unit.options)
        warps = options["num_warps"]
        if unit.target.startswith("gfx"):
            return amd(triton.compile(source, target=target, options=options), unit.target, warps)
        row = nvidia(triton.compile(source, target=target, options=options), unit.target, warps)
        limit = min(255, 65536 // (32 * warps))
        if row["spill_bytes"] and row["registers"] < limit and "maxnreg" not in options:
            # ptxas parks a few bytes to fit one more block on a processor. Told to take what it needs it
            # does not spill: then this is its choice and not a want of registers.
            free = nvidia(
                triton.compile(source, target=target, options=options | {"maxnreg": limit}), unit.target, warps
            )
            if not free["spill_bytes"]:
                row |= {"spill_bytes": 0, "stack_bytes": row["spill_bytes"]}
        return row
    except Exception as error:
        return {"verdict": "ERROR " + " ".join(str(error).split())[:200]}


def plan(targets: list[str], dtypes: list[str], quick: bool, wanted: str, ops: list[str]) -> dict[Unit, dict[str, Any]]:
    """Distinct compilations, each with the columns of the first case that needs it."""
    units: dict[Any, dict[str, Any]] = {}
    today = datetime.date.today().isoformat()

    def add(unit: Any, case: Every, more: dict[str, Any], target: str, name: str, batch: int) -> None:
        row = {
            "op": case.op, "kernel": more["kernel"], "target": target, "dtype": name, "batch": batch,
            **dict.fromkeys(("heads", "head_dim", "value_dim", "map", "patch", "tokens", "bias", "layout"), ""),
            **case.columns(), "config": more["config"], "cases": 0, "triton": triton.__version__, "date": today,
            "aligned_bytes": aligned_bytes(case, DTYPES[name]), "backend": more["backend"],
        }  # fmt: skip
        if re.search(wanted, " ".join(map(str, row.values()))):
            # What several ops launch is in the file of each.
            units.setdefault(replace(unit, op=case.op), row)["cases"] += 1

    for target, name, case in _walk(targets, dtypes, ops):
        for batch in (1, 128):
            for launch in case.launches(batch, name, TARGETS[target][1]):
                unit = unit_of(launch, target, DTYPES[name])
                blocks = [f"{k}={v}" for k, v in launch.meta.items() if k in _BLOCKS]
                config = " ".join(blocks + [f"{k}={v}" for k, v in launch.options.items()])
                add(unit, case, {"kernel": launch.name, "config": config, "backend": "triton"}, target, name, batch)
        for batch, each in _audit_nvcc.units_of(case, target, name, TARGETS[target][1]):
            config = f"threads={each.threads} shared={each.shared_bytes}"
            add(each, case, {"kernel": each.kernel, "config": config, "backend": "cuda"}, target, name, batch)
    if quick:
        step = max(1, len(units) // QUICK)
        units = dict(list(units.items())[::step][:QUICK])
    return units


_BLOCKS = ("UNITS", "TOKENS", "BLOCK", "BLOCK_M", "BLOCK_N", "Q_BLOCKS", "ONE_PASS", "PHASES",
           "Q_BLOCK_M", "Q_BLOCK_N", "K_BLOCK_M", "K_BLOCK_N", "SPLIT", "ROWS", "DX", "DTOKENS",
           "PRODUCT", "STAGE", "CHUNK", "STEPS", "BLOCK_F", "BLOCK_K")  # fmt: skip


def _walk(targets: list[str], dtypes: list[str], ops: list[str]) -> Iterator[tuple[str, str, Every]]:
    for case in suite(ops):
        for target in targets:
            for name in dtypes:
                # The launcher asks for tf32 on NVIDIA only.
                if name in case.dtypes and not (name == "tf32" and target.startswith("gfx")):
                    yield target, name, case


def judged(row: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    """What compiling a row gave, with its verdict, in which overwritten tiles have their only column."""
    found = result if "verdict" in result else result | {"verdict": verdict(row | result)}
    return {name: value for name, value in found.items() if name != "overwritten"}


def run(units: dict[Unit, dict[str, Any]], processes: int) -> list[dict[str, Any]]:
    """Rows in the order of ``units``. A finding is said at once, on stderr."""
    results: dict[Unit, dict[str, Any]] = {}
    progress = Progress(len(units))

    def done(unit: Unit, result: dict[str, Any]) -> None:
        results[unit] = result = judged(units[unit], result)
        progress.step(f"{unit.kernel} {unit.target}")
        if result["verdict"] != "ok":
            row = units[unit] | result
            print(*[row.get(name, "") for name in SHOWN], file=sys.stderr, flush=True)

    if processes > 1:
        with ProcessPoolExecutor(processes) as pool:
            futures = {pool.submit(compile_unit, unit): unit for unit in units}
            for future in as_completed(futures):
                done(futures[future], future.result())
    else:
        for unit in units:
            done(unit, compile_unit(unit))
    progress.close()
    return [row | results[unit] for unit, row in units.items()]


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="audit", description="Static audit of the Triton kernels, without a GPU.")
    parser.add_argument("--op", action="append", choices=OPS, help="only this op (repeatable)")
    parser.add_argument("--target", action="append", choices=list(TARGETS), help="only this target (repeatable)")
    parser.add_argument("--dtype", action="append", choices=list(DTYPES), help="only this dtype (repeatable)")
    parser.add_argument("--filter", default="", metavar="REGEX", help="only rows whose columns match")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK} rows spread over the whole audit")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="compile in N processes (default 1)")
    parser.add_argument("--bad", action="store_true", help="print only rows with a finding")
    parser.add_argument(
        "--csv",
        type=Path,
        metavar="FILE",
        help="write all rows there (an op's whole audit: results/audit/, by default)",
    )
    arguments = parser.parse_args(argv)
    try:
        re.compile(arguments.filter)
    except re.error as error:
        parser.error(f"--filter: {error}")
    if arguments.processes < 1:
        parser.error("--processes: want 1 or more")
    if triton.knobs.runtime.interpret:
        print("audit: unset TRITON_INTERPRET, it replaces the compiler", file=sys.stderr)
        return 2
    targets, dtypes, ops = arguments.target or list(TARGETS), arguments.dtype or list(DTYPES), arguments.op or OPS
    units = plan(targets, dtypes, arguments.quick, arguments.filter, ops)
    if not units:
        print("audit: no row matches", file=sys.stderr)
        return 2
    rows = run(units, arguments.processes)
    bad = [row for row in rows if row["verdict"] != "ok"]
    print(table([[row.get(name, "") for name in SHOWN] for row in (bad if arguments.bad else rows)], SHOWN))
    registers = max((row.get("registers", 0) for row in rows), default=0)
    print(*exceptions(rows), sep="\n")
    print(f"{len(rows)} kernels for {sum(row['cases'] for row in rows)} launches, at most {registers} registers, "
          f"{len(bad)} with a finding")  # fmt: skip
    whole = not (arguments.target or arguments.dtype or arguments.quick or arguments.filter)
    if arguments.csv:
        files.write_csv(arguments.csv, COLUMNS, rows)
    elif whole:
        for op in ops:
            files.write_csv(RESULTS / f"{op}.csv", COLUMNS, [row for row in rows if row["op"] == op])
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(command.run("audit", main))
