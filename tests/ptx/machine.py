"""The machine, machine/*.cpp: compiled once for each state of its files, and called through ctypes."""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from tests.ptx.program import HEAD, SHARED_BASE, Program

HERE = Path(__file__).parent / "machine"
BUILT = Path(__file__).parents[2] / "build" / "ptx"
FLAGS = ("-std=c++20", "-O2", "-march=native", "-ffp-contract=off", "-fPIC")
"""No contraction: an fma is one only where the kernel says so."""

CLASSES = ("integer", "float", "special", "convert", "move", "predicate", "shuffle", "global", "shared", "async",
           "matrix", "barrier", "control")  # fmt: skip
FAULTS = ("out of bounds", "misaligned", "undefined value", "race", "race between blocks", "race between lanes",
          "in flight", "unfenced bytes", "unfenced register", "divergent", "endless")  # fmt: skip
LIMIT = 200_000_000
"""Instructions of a block, before it is called endless."""


class Instruction(ctypes.Structure):
    _fields_ = [("name", ctypes.c_char_p), *((name, ctypes.c_int32) for name in ("guard", "negated", "first", "count"))]


class Constant(ctypes.Structure):
    _fields_ = [("at", ctypes.c_int64), ("bits", ctypes.c_uint64), ("bytes", ctypes.c_int32)]


class Region(ctypes.Structure):
    _fields_ = [("address", ctypes.c_uint64), ("size", ctypes.c_uint64), ("data", ctypes.c_void_p),
                ("allowed", ctypes.c_void_p), ("trace", ctypes.c_void_p)]  # fmt: skip


class Launch(ctypes.Structure):
    _fields_ = [
        ("instructions", ctypes.POINTER(Instruction)),
        ("operands", ctypes.POINTER(ctypes.c_int64)),
        ("constants", ctypes.POINTER(Constant)),
        ("regions", ctypes.POINTER(Region)),
        *((name, ctypes.c_int32) for name in ("instruction_count", "constant_count", "region_count", "threads",
                                              "blocks", "shared_bytes", "file_bytes", "skewed")),
        ("tid", ctypes.c_int64),
        ("ctaid", ctypes.c_int64),
        ("limit", ctypes.c_uint64),
        ("effects", ctypes.POINTER(ctypes.c_uint64)),
        ("epoch", ctypes.c_uint32),
        ("only", ctypes.POINTER(ctypes.c_int32)),
        ("executed", ctypes.POINTER(ctypes.c_uint64)),
        ("traffic", ctypes.POINTER(ctypes.c_uint64)),
        ("cache_lines", ctypes.c_uint64),
    ]  # fmt: skip


class Counters(ctypes.Structure):
    _fields_ = [
        ("issued", ctypes.c_uint64 * len(CLASSES)),
        ("accesses", ctypes.c_uint64 * 20),
        *((name, ctypes.c_uint64) for name in ("global_requests", "global_sectors", "global_bytes", "shared_requests",
                                               "shared_wavefronts", "shared_phases", "matrix_flops")),
    ]  # fmt: skip

    def accesses_of(self, space: str, store: bool) -> dict[int, int]:
        """Lanes' accesses in a space, "shared" or "global", by their width in bytes."""
        begin = ("shared", "global").index(space) * 10 + store * 5
        return {1 << i: self.accesses[begin + i] for i in range(5)}

    @property
    def conflicts(self) -> int:
        """Passes over the banks of shared memory beyond those that the width of the accesses asks for."""
        return int(self.shared_wavefronts - self.shared_phases)


class _Finding(ctypes.Structure):
    _fields_ = [*((name, ctypes.c_int32) for name in ("kind", "instruction", "block", "warp")),
                ("count", ctypes.c_int64)]  # fmt: skip


@dataclass
class Sample:
    """Some blocks of a grid, executed to count and not to check: what is counted is left here."""

    blocks: Sequence[int]
    cache_bytes: int
    """Of the first-level cache, for a block."""
    executed: np.ndarray[Any, Any] = field(init=False)
    """Of each instruction, by how many warps."""
    traffic: np.ndarray[Any, Any] = field(init=False)
    """Of each region: sectors loaded, loaded and not in the first-level cache, stored; its passes."""


@dataclass(frozen=True)
class Finding:
    """A fault of a kernel."""

    kind: str
    instruction: str
    line: int
    """Of the PTX, from 0."""
    source: str
    block: int
    warp: int
    count: int

    def __str__(self) -> str:
        return (f"{self.kind} at {self.source or '?'}, PTX line {self.line + 1}: {self.instruction} "
                f"(block {self.block}, warp {self.warp}, {self.count} times)")  # fmt: skip


@cache
def library() -> Any:
    """The machine, compiled if it is not yet."""
    files = sorted(HERE.glob("*.cpp"))
    compiler = os.environ.get("CXX", "g++")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    state = hashlib.sha256(" ".join([version, *FLAGS, *_flags_of_processor()]).encode())
    for each in [*files, *sorted(HERE.glob("*.h"))]:
        state.update(each.read_bytes())
    target = BUILT / f"machine-{state.hexdigest()[:16]}.so"
    if not target.exists():
        BUILT.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=BUILT) as place, ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = [str(Path(place, f"{each.stem}.o")) for each in files]
            lines = [[compiler, *FLAGS, "-c", str(each), "-o", to] for each, to in zip(files, objects, strict=True)]
            for done in pool.map(_run, lines):
                if done.returncode:
                    raise RuntimeError(done.stderr)
            made = Path(place, "machine.so")
            subprocess.run([compiler, "-shared", "-o", str(made), *objects], check=True)
            made.replace(target)  # at once: another process may do the same
    found = ctypes.CDLL(str(target))
    found.ptx_known.argtypes = [ctypes.c_char_p]
    found.ptx_name.restype = ctypes.c_char_p
    found.ptx_define.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    found.ptx_defined.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    found.ptx_run.argtypes = [ctypes.POINTER(Launch), ctypes.POINTER(Counters), ctypes.POINTER(_Finding), ctypes.c_int]
    assert found.ptx_register_bytes() == HEAD
    assert found.ptx_shared_base() == SHARED_BASE
    assert found.ptx_counter_bytes() == ctypes.sizeof(Counters)
    return found


def _run(line: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(line, capture_output=True, text=True, check=False)


def _flags_of_processor() -> list[str]:
    # -march=native is another thing on another machine.
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n")
    except OSError:
        return []
    return next(([line] for line in lines if line.startswith("flags")), [])


def names() -> list[str]:
    """All instructions that the machine has."""
    found: list[str] = []
    while (name := library().ptx_name(len(found))) is not None:
        found.append(name.decode())
    return sorted(found)


def unknown(program: Program) -> list[str]:
    """Instructions that the machine does not have."""
    return sorted({name for name in program.names if not library().ptx_known(name.encode())})


def run(
    program: Program,
    blocks: int,
    parameters: Mapping[str, int],
    regions: Sequence[Region],
    shared_bytes: int,
    epoch: int,
    skewed: bool = False,
    limit: int = LIMIT,
    effects: Any = None,
    sample: Sample | None = None,
) -> tuple[Counters, list[Finding], int]:
    """Execute a grid of blocks, one after the other.

    Args:
        program: what :func:`tests.ptx.program.encode` made.
        blocks: of the grid, along x.
        parameters: bits of each parameter by name; pointers are addresses in regions.
        regions: the tensors.
        shared_bytes: of a block.
        epoch: the first that no launch on these regions has had, from 1 on.
        skewed: whether approximate instructions are wrong by as much as their documentation allows.
        limit: instructions of a block before it is called endless.
        effects: array of a 64-bit number for each instruction, to which a hash of all its results is added.
        sample: if given, only its blocks are executed, nothing is checked, and regions need no trace.

    Returns:
        What was counted, what was found, and the first epoch of the next launch.
    """
    statements = program.module.statements
    first, instructions, flat = 0, (Instruction * len(statements))(), []
    for i, (statement, name, guard, operands) in enumerate(
        zip(statements, program.names, program.guards, program.operands, strict=True)
    ):
        instructions[i] = Instruction(name.encode(), guard, statement.negated, first, len(operands))
        flat += operands
        first += len(operands)
    constants = [Constant(at, bits, width) for (width, bits), at in program.constants.items()]
    for (name, kind, width), at in program.parameters.items():
        constants.append(Constant(at, _as_read(parameters[name], kind, width), width))
    launch = Launch(
        instructions, (ctypes.c_int64 * len(flat))(*flat), (Constant * len(constants))(*constants),
        (Region * len(regions))(*regions), len(statements), len(constants), len(regions), program.module.threads,
        blocks, shared_bytes, program.file_bytes, skewed, program.registers.get("%tid.x", -1),
        program.registers.get("%ctaid.x", -1), limit, effects, epoch,
    )  # fmt: skip
    if sample is not None:
        sample.executed = np.zeros(len(statements), np.uint64)
        sample.traffic = np.zeros((len(regions), 4), np.uint64)
        numbers = ctypes.POINTER(ctypes.c_uint64)
        launch.blocks = len(sample.blocks)
        launch.only = (ctypes.c_int32 * len(sample.blocks))(*sample.blocks)
        launch.executed = sample.executed.ctypes.data_as(numbers)
        launch.traffic = sample.traffic.ctypes.data_as(numbers)
        launch.cache_lines = max(sample.cache_bytes // 128, 1)
    counters, found = Counters(), (_Finding * 200)()
    count = library().ptx_run(ctypes.byref(launch), ctypes.byref(counters), found, len(found))
    findings = []
    for each in found[: min(count, len(found))]:
        statement = statements[each.instruction]
        findings.append(Finding(FAULTS[each.kind], str(statement), statement.line, statement.source, each.block,
                                each.warp, each.count))  # fmt: skip
    return counters, findings, launch.epoch


def _as_read(bits: int, kind: str, width: int) -> int:
    size = int(kind[1:])
    bits &= (1 << size) - 1
    if kind[0] == "s" and bits >> (size - 1):
        bits -= 1 << size
    return bits & ((1 << 8 * width) - 1)
