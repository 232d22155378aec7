"""PTX as text, taken apart: parameters, registers, instructions with their operands, labels, lines of the source."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

BYTES = {"pred": 0, "b8": 1, "u8": 1, "s8": 1, "b16": 2, "u16": 2, "s16": 2, "f16": 2, "bf16": 2, "b32": 4, "u32": 4,
         "s32": 4, "f32": 4, "tf32": 4, "bf16x2": 4, "f16x2": 4, "b64": 8, "u64": 8, "s64": 8, "f64": 8}  # fmt: skip
"""Of a type's value; 0 for a predicate."""


class Unsupported(Exception):
    """PTX that this executor does not know. Never a fault of the kernel."""


@dataclass(frozen=True)
class Statement:
    """One instruction."""

    name: str
    operands: tuple[str | tuple[str, ...], ...]
    """As written; a list in braces is a tuple."""
    guard: str | None
    negated: bool
    line: int
    """Of the text, from 0."""
    source: str
    """The line of Python that it was made of, "file:line"."""

    def __str__(self) -> str:
        operands = ", ".join(each if isinstance(each, str) else "{" + ", ".join(each) + "}" for each in self.operands)
        guard = f"@{'!' if self.negated else ''}{self.guard} " if self.guard else ""
        return f"{guard}{self.name} {operands}".rstrip()


@dataclass
class Module:
    """A module with one kernel."""

    parameters: list[tuple[str, int]] = field(default_factory=list)
    """Name and bytes."""
    registers: dict[str, int] = field(default_factory=dict)
    """Bytes of each kind, by prefix ("%r"), and of those that have a name of their own."""
    statements: list[Statement] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    """Index of the statement that follows."""
    threads: int = 0

    def bytes_of(self, register: str) -> int:
        """Of a register; 0 for a predicate."""
        if register in self.registers:
            return self.registers[register]
        return self.registers[register.rstrip("0123456789")]


def parse(text: str, kernel: str = "") -> Module:
    """Take apart what Triton or nvcc has made; ``kernel`` says which one of a file that has several.

    Of nvcc's kernels the bound of threads is how many there are."""
    module = Module()
    begin = 0
    if kernel:
        found = re.search(rf"\.entry\s+{re.escape(kernel)}\s*\(", text)
        if found is None:
            raise Unsupported(f"no kernel {kernel}")
        begin = found.start()
    head, _, body = text[begin:].partition("\n{")
    for kind, name in re.findall(r"\.param\s+\.(\w+)[^,)]*?([\w$]+)\s*(?=[,)]|$)", head, re.MULTILINE):
        module.parameters.append((name, BYTES[kind]))
    threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", head)
    if threads is None:
        raise Unsupported("no .reqntid or .maxntid: how many threads a block has")
    module.threads = int(threads.group(1))
    files = dict(re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', text, re.MULTILINE))
    source, first_line = "", text.count("\n", 0, begin + len(head)) + 1
    scopes = 1
    for number, written in enumerate(body.split("\n")):
        line = written.partition("//")[0].strip()
        scopes += (line == "{") - (line == "}")
        if scopes == 0:
            break
        if line.startswith(".loc"):
            file, at = line.split()[1:3]
            source = f"{files.get(file, '?').rsplit('/', 1)[-1]}:{at}"
            continue
        for statement in _split(line):
            _read(module, statement, first_line + number, source)
    return module


def _split(line: str) -> Iterator[str]:
    # A label; statements, of which there may be several in braces that open a scope.
    if label := re.match(r"([$\w]+):", line):
        yield label.group()
        line = line[label.end() :]
    for part in line.split(";"):
        statement = part.strip()
        if statement.startswith("{"):  # not a list: that comes after a name
            statement = statement[1:].strip()
        if statement.strip("} "):
            yield statement


_STATEMENT = re.compile(r"(?:@(!?)([%\w]+)\s+)?([a-z][\w.:]*)\s*(.*)", re.DOTALL)


def _read(module: Module, text: str, line: int, source: str) -> None:
    if text.endswith(":"):
        module.labels[text[:-1]] = len(module.statements)
    elif text.startswith(".reg"):
        kind, names = text.removeprefix(".reg").strip().split(None, 1)
        for name in names.split(","):
            module.registers[re.sub(r"<\d+>", "", name).strip()] = BYTES[kind.lstrip(".")]
    elif not text.startswith("."):  # .pragma, .b8 of debug information
        found = _STATEMENT.fullmatch(text)
        if found is None:
            raise Unsupported(f"line {line}: {text}")
        negated, guard, name, operands = found.groups()
        module.statements.append(Statement(name, tuple(_operands(operands)), guard, bool(negated), line, source))


def _operands(text: str) -> Iterator[str | tuple[str, ...]]:
    for each in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", text):
        if each.startswith("{"):
            yield tuple(part.strip() for part in each[1:-1].split(","))
        else:
            yield each
