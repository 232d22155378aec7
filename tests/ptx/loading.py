"""What executing and counting have in common: a driver for the compiler, a kernel's program, what its parameters hold.

Nothing here knows of the library.
"""

from __future__ import annotations

import struct
from functools import lru_cache

from triton.backends.compiler import GPUTarget

from tests.ptx import machine
from tests.ptx.module import parse
from tests.ptx.program import Program, encode

FROM_REGION = 1 << 30
"""How far from the beginning of its region a tensor lies, so that what is read before it is out of bounds too."""


class Driver:
    """What Triton asks of a driver in order to compile: no device, nothing is loaded or launched."""

    def __init__(self, arch: str) -> None:
        self.target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        # By which a kernel keeps what it has compiled.
        return int(self.target.arch)

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_capability(self, device: int = 0) -> tuple[int, int]:
        return divmod(self.target.arch, 10)


@lru_cache(maxsize=256)
def program_of(ptx: str, kernel: str = "") -> Program:
    """A kernel's program; ``kernel`` says which one of a file of nvcc's."""
    program = encode(parse(ptx, kernel))
    if unknown := machine.unknown(program):
        raise RuntimeError(f"the executor has no {', '.join(unknown)}")
    return program


def beginning(region: int) -> int:
    """An address of the region with this number, which the first byte of a tensor may have."""
    return int(region + 1 << machine.library().ptx_region_bits()) + FROM_REGION


def scalar(value: float | int) -> int:
    """What a parameter holds that is no tensor."""
    return struct.unpack("<I", struct.pack("<f", value))[0] if isinstance(value, float) else int(value)
