"""Reads of a binary for macOS what it asks for: libraries, and symbols that these or others are to have.

The tools that print this are Apple's, and the checks run on Linux.
"""

from __future__ import annotations

import struct
from pathlib import Path

MAGIC = b"\xcf\xfa\xed\xfe"  # 64 bits, little-endian, for one processor
ARM64 = 0x0100000C
SYMTAB, LOADS = 0x02, {0x0C, 0x80000018, 0x8000001F}  # LC_SYMTAB; LC_LOAD_DYLIB, _WEAK_DYLIB, LC_REEXPORT_DYLIB
DEBUGGING, DEFINED = 0xE0, 0x0E  # bits of a symbol's kind, N_STAB and N_TYPE


def is_one(data: bytes) -> bool:
    return data[:4] == MAGIC


def _text(data: bytes, at: int) -> str:
    return data[at : data.index(b"\0", at)].decode()


def asked(file: Path) -> tuple[set[str], set[str]]:
    """Libraries, and undefined symbols without the underscore that C's names have there.

    Raises ValueError unless it is a binary for macOS on ARM.
    """
    data = file.read_bytes()
    if not is_one(data) or struct.unpack_from("<I", data, 4)[0] != ARM64:
        raise ValueError(f"{file.name}: no binary for macOS on ARM")
    libraries, undefined = set(), set()
    at = 32  # behind the header
    for _ in range(struct.unpack_from("<I", data, 16)[0]):
        command, size = struct.unpack_from("<II", data, at)
        if command in LOADS:
            libraries.add(_text(data, at + struct.unpack_from("<I", data, at + 8)[0]))
        elif command == SYMTAB:
            first, count, strings = struct.unpack_from("<III", data, at + 8)
            for number in range(count):
                name, kind = struct.unpack_from("<IB", data, first + 16 * number)
                if not kind & (DEBUGGING | DEFINED):
                    undefined.add(_text(data, strings + name).removeprefix("_"))
        at += size
    return libraries, undefined
