"""What the audit reads out of machine code, and what it holds against it."""

from __future__ import annotations

import re
from typing import Any

from _audit_buffers import overwritten
from _audit_loops import findings, in_loops
from _machine_code import PROCESSORS, occupancy, taken
from _model import sass

from mvkernels.triton.configs import shared_memory_of

FEWEST_WARPS = 4
"""One for each of a processor's four schedulers: below it some never issue."""
NARROWEST_LOAD = 8
"""Bytes a thread loads at once, where rows lie so that it may: the tiles have as few as two float32 a thread."""


def nvidia(compiled: Any, target: str, warps: int) -> dict[str, Any]:
    """What ptxas and the PTX say."""
    ptx = compiled.asm["ptx"]
    registers, spill, stack = taken(compiled.asm["cubin"])
    matrix, count = matrix_instructions(ptx)
    loops = in_loops(sass.parse(sass.disassembled(compiled.asm["cubin"]), compiled.metadata.name))
    loops["overwritten"] = overwritten(compiled.asm["ttgir"], compiled.metadata.num_stages)
    return loops | measured(compiled, target, warps, registers, spill, stack, matrix, count, global_loads(ptx))


def matrix_instructions(ptx: str) -> tuple[str, int]:
    """Kinds of matrix instruction, and how many stand in the code (one in a loop counts once)."""
    counts = {
        "tcgen05.mma": len(re.findall(r"\btcgen05\.mma\b", ptx)),
        "wgmma": len(re.findall(r"\bwgmma\.mma_async\b", ptx)),
        "mma.sync": len(re.findall(r"\bmma\.sync\b", ptx)),
    }
    return "+".join(name for name, count in counts.items() if count), sum(counts.values())


def global_loads(ptx: str) -> list[int]:
    """Bytes that a thread loads at once from global memory, of each load and asynchronous copy in PTX."""
    loads = [
        int(width or 1) * int(bits) // 8 for width, bits in re.findall(r"ld\.global[\w.:]*?(?:\.v(\d))?\.b(\d+)", ptx)
    ]
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global[^,]*?\[[^]]*\], \[[^]]*\], (\w+)", ptx)
    return loads + [int(size, 0) for size in copies]


def matrix_products(ttir: str) -> int:
    """Products that NVIDIA has matrix instructions for: of half types, or of float32 that may round to TF32."""
    found = re.findall(r"tt\.dot (.*?)->", ttir)
    return sum(bool(re.search(r"xb?f16>|inputPrecision = tf32", product)) for product in found)


def amd(compiled: Any, target: str, warps: int) -> dict[str, Any]:
    """What the assembly says."""
    code = compiled.asm["amdgcn"]

    def value(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", code)
        return int(found.group(1)) if found else 0

    registers = value("vgpr_count")  # vector and accumulation registers together
    # Spilled vector registers are 4 bytes in each of 64 lanes; spilled scalars go to vector lanes, without memory.
    spill = 4 * value("vgpr_spill_count")
    names = re.findall(r"(?:global|buffer)_load_(dwordx?\d?|ushort|short_d16\w*|ubyte)", code)
    loads = [4 * int(name[-1]) if name[-1].isdigit() and "x" in name else 4 if name == "dword" else 2 for name in names]
    count = len(re.findall(r"^\s*v_mfma", code, re.MULTILINE))
    stack = value("private_segment_fixed_size")
    return measured(compiled, target, warps, registers, spill, stack, "mfma" if count else "", count, loads)


def measured(
    compiled: Any, target: str, warps: int, registers: int, spill: int, stack: int, matrix: str, count: int,
    loads: list[int],
) -> dict[str, Any]:  # fmt: skip
    """The columns of a row that come from the code."""
    shared = compiled.metadata.shared
    blocks, bound = occupancy(registers, shared, warps, target)
    return {
        "registers": registers, "spill_bytes": spill, "stack_bytes": stack, "shared_bytes": shared,
        "shared_limit": shared_memory_of(target), "blocks_per_processor": blocks,
        "warps_per_processor": blocks * warps, "matrix": matrix or "-", "widest_load": max(loads, default=0),
        "matrix_instructions": count, "wide_loads": sum(load >= 16 for load in loads), "limited_by": bound,
        "occupancy": round(blocks * warps / PROCESSORS[target].warps, 3),
        "multiplies": int("tt.dot" in compiled.asm["ttir"]),
        "matrix_products": matrix_products(compiled.asm["ttir"]),
    }  # fmt: skip


def verdict(row: dict[str, Any]) -> str:
    """The first finding against a row, or "ok".

    OVERWRITES: a tile is copied to while a product may still read it (_audit_buffers.py). SPILLS: registers are kept in
    memory. SHARED: a block has more shared memory than the device gives one. WARPS: fewer than FEWEST_WARPS fit a
    processor. MATRIX: a kernel has products of half types, or of float32 that may round to TF32, and no matrix
    instruction (products of exact float32 need none). LOADS: on NVIDIA, a kernel with products loads less than
    NARROWEST_LOAD bytes a thread at once, though rows are aligned to as many. The sums of partial results have no
    products; they are held to the first four. DIVISION and NARROW, on NVIDIA: a loop divides integers, or loads less
    than 4 bytes a thread though channels are contiguous (_audit_loops.py, also on what is exempt).
    """
    multiplies = row.get("multiplies")
    if row.get("overwritten"):
        return "OVERWRITES"
    if row["spill_bytes"]:
        return "SPILLS"
    if row["shared_bytes"] > row["shared_limit"]:
        return "SHARED"
    if row["warps_per_processor"] < FEWEST_WARPS:
        return "WARPS"
    if row["matrix_products"] and row["matrix"] == "-":
        return "MATRIX"
    wanted = min(row.get("aligned_bytes", 0), NARROWEST_LOAD)
    if multiplies and row.get("target", "").startswith("sm_") and row["widest_load"] < wanted:
        return "LOADS"
    return next((name for name, exempt in findings(row) if not exempt), "ok")
