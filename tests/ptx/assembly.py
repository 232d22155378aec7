"""Kernels written by hand, for the tests of the executor: a body of PTX, run on NumPy arrays."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import triton

from tests.ptx import machine
from tests.ptx.launches import beginning
from tests.ptx.module import parse
from tests.ptx.program import encode

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Result:
    """What a launch left."""

    counters: machine.Counters
    findings: list[machine.Finding]

    @property
    def kinds(self) -> set[str]:
        """Of faults."""
        return {each.kind for each in self.findings}


def kernel(body: str, pointers: int, threads: int = 32, name: str = "kernel") -> str:
    """A module: ``%rd0``, ``%rd1`` ... point to the arrays, ``%r0`` is the thread, ``%r1`` the block."""
    parameters = ",\n".join(f"\t.param .u64 {name}_param_{i}" for i in range(pointers))
    loads = "\n".join(f"\tld.param.b64 \t%rd{i}, [{name}_param_{i}];" for i in range(pointers))
    registers = "\n".join(
        f"\t.reg .{kind} \t%{prefix}<400>;"
        for kind, prefix in (("pred", "p"), ("b16", "rs"), ("b32", "r"), ("b64", "rd"))
    )
    return f""".version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry {name}(
{parameters}
)
.reqntid {threads}
{{
{registers}
{loads}
\tmov.u32 \t%r0, %tid.x;
\tmov.u32 \t%r1, %ctaid.x;
{body}
\tret;
}}
"""


def execute(
    ptx: str,
    arrays: Sequence[Array],
    blocks: int = 1,
    shared_bytes: int = 0,
    skewed: bool = False,
    undefined: Sequence[int] = (),
    limit: int = 1_000_000,
) -> Result:
    """Run a kernel on arrays, in place. ``undefined``: the indices of those in which nothing counts as defined."""
    program = encode(parse(ptx))
    assert not machine.unknown(program)
    regions, parameters, keep = [], {}, []
    for index, (array, (name, _)) in enumerate(zip(arrays, program.module.parameters, strict=True)):
        trace = np.zeros(array.nbytes * machine.library().ptx_trace_bytes(), np.uint8)
        if index not in undefined:
            machine.library().ptx_define(trace.ctypes.data, None, array.nbytes)
        keep.append(trace)
        parameters[name] = beginning(index)
        regions.append(machine.Region(parameters[name], array.nbytes, array.ctypes.data, None, trace.ctypes.data))
    counters, findings, _ = machine.run(program, blocks, parameters, regions, shared_bytes, 1, skewed, limit)
    del keep
    return Result(counters, findings)


def assembles(ptx: str, folder: Path) -> str:
    """What ptxas has against a module; empty if it takes it. The executor is not to be tested with what is no PTX."""
    source = folder / "kernel.ptx"
    source.write_text(ptx)
    ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    line = [str(ptxas), "-arch", "sm_90a", "-o", str(folder / "kernel.cubin"), str(source)]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    return done.stderr if done.returncode else ""
