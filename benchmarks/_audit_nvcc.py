"""Of the audit the kernels in CUDA C++: what a call launches, and what nvcc makes of it."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from _audit_cases import Case, Every, Multiscale, problem_of
from _audit_loops import in_loops
from _audit_targets import DTYPES
from _machine_code import occupancy, tool
from _model import sass

from mvkernels.cuda.attention import plan as attention
from mvkernels.cuda.attention.backward_plan import backward_launches
from mvkernels.cuda.attention.forward_plan import forward_launches
from mvkernels.cuda.launch import Launch
from mvkernels.ops.multiscale_linear_attention.cuda import plan as multiscale
from mvkernels.triton.configs import Device, shared_memory_of
from tests.ptx import nvcc

CODE = {"sm_80": "sm_80", "sm_90": "sm_90a", "sm_100": "sm_100"}
"""Of the audit's targets, what nvcc compiles for."""


@dataclass(frozen=True)
class Unit:
    """A kernel for a target, as a call launches it."""

    module: str
    kernel: str
    target: str
    threads: int
    shared_bytes: int
    op: str = ""


def launches_of(case: Every, batch: int, name: str, device: Device) -> list[Launch]:
    """What a case launches, forward and backward; nothing if these kernels do not take it."""
    if isinstance(case, Case):
        dtype = DTYPES[name]
        group = (case.patch, case.patch)
        shift = None if case.shift is None else (case.shift, case.shift)
        shape = (batch, case.heads, case.d, case.size, case.size)
        if case.partners or attention.why_not(shape, case.dv, dtype, group, shift, not case.bias, device.arch):
            return []
        forward = problem_of(case, batch, name, device, "q k v o")
        backward = problem_of(case, batch, name, device, "q k v g dq dk dv")
        return [
            launch
            for positive in (True, False)  # the scale: it has kernels of its own
            for launch in (
                *forward_launches(forward, positive)[0],
                *backward_launches(backward, case.bias, positive)[0],
            )
        ]
    if isinstance(case, Multiscale):
        if multiscale.why_not(DTYPES[name], case.d, (case.kernel,), device.arch):
            return []
        forward = multiscale.aggregate_launches(case.problem(batch, name, device, "xo"))
        weights, _ = multiscale.weight_launches(case.problem(batch, name, device, "gx"))
        return forward + weights + multiscale.map_launches(case.problem(batch, name, device, "go"))
    return []


def units_of(case: Every, target: str, name: str, device: Device) -> Iterator[tuple[int, Unit]]:
    """(batch, unit) of what a case launches at the batches of the audit."""
    if target in CODE:
        for batch in (1, 128):
            for each in launches_of(case, batch, name, device):
                yield batch, Unit(each.module, each.kernel, target, each.threads, each.shared_bytes)


@cache
def _code_of(module: str, target: str) -> dict[str, tuple[int, int, int, str, dict[str, int]]]:
    """Of each kernel: registers, bytes of them that are kept in memory, other stack, machine code and loops."""
    file = nvcc.file_of(module, CODE[target])
    usage = subprocess.run([tool("cuobjdump"), "-res-usage", str(file)], check=True, capture_output=True, text=True)
    code = sass.disassembled(file.read_bytes())
    found = {}
    pattern = r"Function (\w+):\s*REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)"
    for kernel, registers, stack, local in re.findall(pattern, usage.stdout):
        text = code.partition(f".section\t.text.{kernel},")[2].partition("\n\t.section\t")[0]
        kept = int(stack) + int(local)
        spilled = kept if re.search(r"\b(LDL|STL)\b", text) else 0
        found[kernel] = int(registers), spilled, kept - spilled, text, in_loops(sass.parse(code, kernel))
    return found


def widest_load(code: str) -> list[int]:
    """Bytes that a thread loads at once from global memory, of each load and asynchronous copy."""
    loads = re.findall(r"\b(?:LDG|LDGSTS)\.([\w.]+)", code)
    return [max((int(n) // 8 for n in re.findall(r"(?<!\w)(?:U8|U16|64|128)(?!\w)", each.replace("U", ""))), default=4)
            for each in loads]  # fmt: skip


def compile_unit(unit: Unit) -> dict[str, Any]:
    """The columns that come from the code. Never raises: an error is a row."""
    try:
        registers, spilled, stack, code, loops = _code_of(unit.module, unit.target)[unit.kernel]
    except Exception as error:
        return {"verdict": "ERROR " + " ".join(str(error).split())[:200]}
    warps = unit.threads // 32
    blocks, bound = occupancy(registers, unit.shared_bytes, warps, unit.target)
    products = len(re.findall(r"\bHMMA\b", code))
    loads = widest_load(code)
    return loops | {
        "registers": registers, "spill_bytes": spilled, "stack_bytes": stack, "shared_bytes": unit.shared_bytes,
        "shared_limit": shared_memory_of(unit.target), "blocks_per_processor": blocks,
        "warps_per_processor": blocks * warps, "matrix": "mma.sync" if products else "-",
        "widest_load": max(loads, default=0), "matrix_instructions": products,
        "wide_loads": sum(load >= 16 for load in loads), "limited_by": bound,
        "occupancy": round(blocks * warps / 64, 3), "multiplies": int(products > 0), "matrix_products": products,
    }  # fmt: skip
