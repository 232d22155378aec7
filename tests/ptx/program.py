"""A module's instructions as the machine takes them: registers at offsets, immediates in registers of their own."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass, field

from tests.ptx.module import BYTES, Module, Statement, Unsupported

HEAD = 24
"""Bytes before a register's lanes. The machine says the same of itself, which machine.py checks."""
LANES = 32
SHARED_BASE = 1024


@dataclass
class Program:
    """What the machine runs."""

    module: Module
    names: list[str] = field(default_factory=list)
    guards: list[int] = field(default_factory=list)
    operands: list[list[int]] = field(default_factory=list)
    constants: dict[tuple[int, int], int] = field(default_factory=dict)
    """Offset of each register that holds the same from the start: by bytes (0: predicate) and bits."""
    parameters: dict[tuple[str, str, int], int] = field(default_factory=dict)
    """The same of parameters: by name, type as read, and bytes of the register."""
    registers: dict[str, int] = field(default_factory=dict)
    file_bytes: int = 0

    def allocate(self, lane_bytes: int) -> int:
        """Offset of a new register."""
        at = self.file_bytes
        self.file_bytes += HEAD + (lane_bytes * LANES or 8)
        return at

    def constant(self, bits: int, lane_bytes: int) -> int:
        """Offset of a register that holds these bits."""
        key = lane_bytes, bits & ((1 << (8 * lane_bytes or 1)) - 1)
        if key not in self.constants:
            self.constants[key] = self.allocate(lane_bytes)
        return self.constants[key]

    def register(self, name: str) -> int:
        """Offset of a register of the module, or -1 for a sink."""
        if name == "_":
            return -1
        if name not in self.registers:
            self.registers[name] = self.allocate(4 if "." in name else self.module.bytes_of(name))
        return self.registers[name]

    def value(self, text: str, lane_bytes: int) -> int:
        """Offset of what may be a register, a special register, an immediate or an address in shared memory."""
        if text.startswith("%") or text == "_" or text in self.module.registers:
            if re.fullmatch(r"%n?(tid|ctaid)\.[yz]", text):
                return self.constant(int(text.startswith("%n")), 4)
            if "." in text and text not in ("%tid.x", "%ctaid.x"):
                raise Unsupported(text)
            return self.register(text)
        return self.constant(immediate(text, lane_bytes), lane_bytes)

    def width(self, text: str, immediate_bytes: int) -> int | None:
        """Bytes of a register or an immediate; None of a sink."""
        if text == "_":
            return None
        if text in self.module.registers or (text.startswith("%") and "." not in text):
            return self.module.bytes_of(text)
        return 4 if text.startswith("%") else immediate_bytes


def immediate(text: str, lane_bytes: int = 4) -> int:
    """Bits of an immediate or of an address in shared memory."""
    if text.startswith("global_smem"):
        return SHARED_BASE + int(text.partition("+")[2] or 0)
    if text[:2].lower() in ("0f", "0d"):
        return int(text[2:], 16)
    if text in ("true", "false"):
        return int(text == "true")
    if re.fullmatch(r"-?\d+\.\d*", text):
        return int.from_bytes(struct.pack("<d" if lane_bytes == 8 else "<f", float(text)), "little")
    try:
        return int(text.rstrip("U"), 0)
    except ValueError:
        raise Unsupported(f"operand {text}") from None


def encode(module: Module) -> Program:
    """Registers, constants and operands of a module's instructions."""
    program = Program(module)
    for statement in module.statements:
        try:
            name, operands = _encoded(program, statement)
        except KeyError as error:
            raise Unsupported(f"{statement}: register {error}") from None
        program.names.append(name)
        program.operands.append(operands)
        program.guards.append(program.register(statement.guard) if statement.guard else -1)
    return program


def _encoded(program: Program, statement: Statement) -> tuple[str, list[int]]:
    name, operands = statement.name, list(statement.operands)
    name = re.sub(r"\.(uni|L1::\w+|L2::\w+|weak|relaxed|gpu|cta(?=\.)|volatile)(?=\.|$)", "", name)
    name = re.sub(r"(ld|st)(\.\w+)\.shared::cta", r"\1\2.shared", name)
    name = name.replace("ld.global.nc", "ld.global")
    if name.startswith("ld.param"):
        return _parameter(program, statement)
    if name.startswith("cvta.to.global"):  # addresses are generic ones
        name = "mov.u64"
    if name == "bra":
        return name, [program.module.labels[str(operands[0])]]
    if name in ("bar.sync", "barrier.sync"):
        if operands != ["0"]:
            raise Unsupported(f"{statement}: a barrier of its own, or of some of the warps")
        return name, []
    if name in ("cp.async.wait_group", "wgmma.wait_group.sync.aligned"):
        return name, [immediate(str(operands[0]))]
    if name.startswith("mov.") and isinstance(operands[0], tuple):
        name += ".unpack"
    elif name.startswith("mov.") and isinstance(operands[1], tuple):
        name += ".pack"
    if name.startswith("setp") and ("|" in operands[0]) != name.endswith("x2"):
        raise Unsupported(f"{statement}: the complement too, or a boolean operator")
    if name.startswith("shfl") and "|" not in operands[0]:
        operands[0] = f"{operands[0]}|_"
    found: list[int] = []
    widths: list[int | None] = []
    memory = name.startswith(("ld.", "st."))
    for position, written in enumerate(operands):
        operand = tuple(written.split("|")) if isinstance(written, str) and "|" in written else written
        if isinstance(operand, str) and operand.startswith("["):
            found += _address(program, statement, position, operand)
        elif _is_number(name, position, statement):
            found.append(immediate(str(operand)))
        else:
            width = _width(name, position)
            listed = [operand] if isinstance(operand, str) else operand
            found += [program.value(each, width) for each in listed]
            of = [program.width(each, width) for each in listed]
            widths += of
            if name.startswith("cvt.") and position == 1 and (of[0] or 0) > width:  # it takes the low part
                name = f"{name}.of{8 * (of[0] or 0)}"
            elif not (memory or name.startswith(("wgmma", "shfl"))) and set(of) - {width, None}:
                raise Unsupported(f"{statement}: registers of {of} bytes, not {width}")
    return name, found + [each or 0 for each in widths if memory]


def _parameter(program: Program, statement: Statement) -> tuple[str, list[int]]:
    to, where = map(str, statement.operands)
    kind = statement.name.removeprefix("ld.param.")
    lane_bytes = program.module.bytes_of(to)
    key = where.strip("[]"), kind, lane_bytes
    if key not in program.parameters:
        program.parameters[key] = program.allocate(lane_bytes)
    return f"mov.b{8 * lane_bytes}", [program.register(to), program.parameters[key]]


def _address(program: Program, statement: Statement, position: int, text: str) -> list[int]:
    base, _, offset = text[1:-1].replace(" ", "").replace("+-", "-").partition("+")
    if "-" in base[1:]:
        base, _, offset = base.partition("-")
        offset = f"-{offset}"
    copied = statement.name.startswith("cp.async") and position == 1  # from global to shared memory
    width = 4 if ".shared" in statement.name and not copied else 8
    if program.width(base, width) != width:
        raise Unsupported(f"{statement}: an address that has not {width} bytes")
    return [program.value(base, width), int(offset or "0", 0)]


def _is_number(name: str, position: int, statement: Statement) -> bool:
    # Operands that are no registers: the width of a copy, and what follows wgmma's predicate.
    if name.startswith("cp.async"):
        return position == 2
    return name.startswith("wgmma.mma_async") and position > 3


def _width(name: str, position: int) -> int:
    """Bytes of an operand."""
    parts = name.split(".")
    known = [BYTES[each] for each in parts if each in BYTES]
    width = known[-1] if known else 4
    match parts[0], position:
        case ("setp", 0) | ("selp", 3) | ("vote", 1) | ("wgmma", 3):
            return 0
        case ("shl" | "shr" | "bfe", 2 | 3) | ("bfi", 3 | 4) | ("vote", 2) | ("wgmma" | "ldmatrix" | "stmatrix", _):
            return 4
        case ("mul" | "mad", 0) | ("mad", 3) if "wide" in parts:
            return 2 * width
        case ("cvt", 0):
            return known[0]
        case ("mov", 0) if parts[-1] == "unpack":
            return width // 2
        case ("mov", 1) if parts[-1] == "pack":
            return width // 2
    return max(width, 2) if parts[-1] != "pred" else 0
