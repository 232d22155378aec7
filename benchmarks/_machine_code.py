"""What machine code takes of a processor, and how much of it fits one."""

from __future__ import annotations

import math
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton


def tool(name: str) -> str:
    """Path of a program of the CUDA toolkit, of those that come with Triton."""
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


@dataclass(frozen=True)
class Processor:
    """What the blocks on one multiprocessor (AMD: compute unit) share."""

    registers: int
    """Of 32 bits, in all lanes of all warps (AMD: vector registers)."""
    shared: int
    warps: int
    blocks: int
    lanes: int = 32
    reserved: int = 1024
    """Shared memory that the system takes from each block."""


PROCESSORS = {
    "sm_80": Processor(65536, 164 << 10, 64, 32),
    "sm_90": Processor(65536, 228 << 10, 64, 32),
    "sm_100": Processor(65536, 228 << 10, 64, 32),
    "gfx942": Processor(4 * 512 * 64, 64 << 10, 32, 16, lanes=64, reserved=0),
}
"""CUDA C++ Programming Guide, technical specifications by compute capability; AMD CDNA 3 instruction set, 3.6."""


def occupancy(registers: int, shared: int, warps: int, target: str) -> tuple[int, str]:
    """Blocks that fit one processor, and what it is that no more fit: registers, shared, warps or blocks."""
    has = PROCESSORS[target]
    each = math.ceil(max(registers, 1) / 8) * 8 * has.lanes  # registers are given out to warps in eights
    by = {
        "registers": has.registers // each // warps,
        "shared": has.shared // max(shared + has.reserved, 1),
        "warps": has.warps // warps,
        "blocks": has.blocks if warps > 1 or has.lanes == 32 else has.warps,
    }
    least = min(by, key=lambda name: by[name])
    return by[least], least


def taken(cubin: bytes, kernel: str = "") -> tuple[int, int, int]:
    """Of a thread: registers, bytes of them that are kept in memory, and bytes of stack that are not those.

    ``kernel`` says which one of a file that has several.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        usage = subprocess.run(
            [tool("cuobjdump"), "-res-usage", str(file)], check=False, capture_output=True, text=True
        )
        mine = usage.stdout.partition(f"Function {kernel}:")[2] if kernel else usage.stdout
        found = re.search(r"REG:(\d+) STACK:(\d+).*LOCAL:(\d+)", mine)
        if not found:
            raise RuntimeError("cuobjdump: " + (usage.stderr or usage.stdout))
        registers, stack, local = map(int, found.groups())
        if stack or local:
            # A stack is not always spills: the local loads and stores in the code tell.
            code = subprocess.run([tool("nvdisasm"), "-c", str(file)], check=False, capture_output=True, text=True)
            text = code.stdout.partition(f".section\t.text.{kernel},")[2].partition("\n\t.section\t")[0] or code.stdout
            if re.search(r"\b(LDL|STL)\b", text):
                return registers, stack + local, 0
    return registers, 0, stack
