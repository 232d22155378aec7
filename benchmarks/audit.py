"""Static audit of the Triton kernels: what `make audit` runs. Needs no GPU.

Compiles every kernel with the configuration that real calls would get, for sm_80, sm_90, sm_100 and
gfx942, over the shape suite, layouts and dtypes, and reads the machine code: registers, spills,
shared memory against the device's limit, the number of blocks that fit a processor, whether matrix
instructions are used, how wide the widest global load is. Strides, alignments and constants are
those of real calls: the launches come from the launcher itself, given shapes and strides alone.

``spill_bytes`` is what did not fit the registers. ``stack_bytes`` is other use of the stack, such as the few
bytes that ptxas parks of its own accord to fit one more block on a processor (it has registers left, and does
not park when it is told to use them: the audit compiles such a row twice).

Exit status 1 if a row spills or does not fit; 2 for bad usage.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import importlib
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mvkernels.launch import Device, shared_memory_of
from mvkernels.ops.former_to_mobile import triton_plan as former_to_mobile
from mvkernels.ops.mobile_to_former import triton_plan as mobile_to_former
from mvkernels.ops.multiscale_linear_attention import triton_plan as multiscale_linear_attention
from mvkernels.ops.patch_attention import triton_plan as patch_attention
from mvkernels.ops.relu_linear_attention import triton_plan as relu_linear_attention
from mvkernels.report import Progress, table

TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), Device("audit", "sm_80", 108)),
    "sm_90": (GPUTarget("cuda", 90, 32), Device("audit", "sm_90", 132)),
    "sm_100": (GPUTarget("cuda", 100, 32), Device("audit", "sm_100", 148)),
    "gfx942": (GPUTarget("hip", "gfx942", 64), Device("audit", "gfx942", 304)),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32,
          "fp64": torch.float64}  # fmt: skip
"""tf32: float32 maps whose products the user has allowed to round."""
POINTER = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.float64: "*fp64"}
COLUMNS = [
    "op", "kernel", "target", "dtype", "batch", "heads", "head_dim", "value_dim", "map", "patch", "tokens", "bias",
    "layout", "config", "registers", "spill_bytes", "stack_bytes", "shared_bytes", "shared_limit",
    "blocks_per_processor", "warps_per_processor", "matrix", "widest_load", "verdict", "cases", "triton", "date",
]  # fmt: skip
SHOWN = [
    "kernel", "target", "dtype", "head_dim", "value_dim", "tokens", "bias", "layout", "config", "registers",
    "spill_bytes", "shared_bytes", "warps_per_processor", "matrix", "widest_load", "verdict",
]  # fmt: skip
OPS = ["patch_attention", "mobile_to_former", "former_to_mobile", "relu_linear_attention",
       "multiscale_linear_attention"]  # fmt: skip
QUICK = 6
RESULTS = Path(__file__).parent / "results" / "audit"
"""A file for each op."""


@dataclass(frozen=True)
class Case:
    """One shape of patch_attention's suite."""

    heads: int
    d: int
    dv: int
    size: int
    patch: int
    bias: bool
    layout: str
    """``last``: slices of a packed channels-last qkv; ``per_head``: the same, [q|k|v] by head; ``first``; ``odd``:
    channels-last with strides that nothing divides, the slow path."""
    dtypes: tuple[str, ...]

    op = "patch_attention"

    def launches(self, batch: int, name: str, device: Device) -> list[Any]:
        forward = patch_attention.forward_launches(problem_of(self, batch, name, device, False))
        return forward + patch_attention.backward_launches(problem_of(self, batch, name, device, True), self.bias)[0]

    def columns(self) -> dict[str, Any]:
        return {
            "heads": self.heads, "head_dim": self.d, "value_dim": self.dv, "map": f"{self.size}x{self.size}",
            "patch": self.patch, "tokens": math.ceil(self.size / self.patch) ** 2, "bias": int(self.bias),
            "layout": self.layout,
        }  # fmt: skip


@dataclass(frozen=True)
class Bridge:
    """One shape of mobile_to_former or former_to_mobile."""

    op: str
    d: int
    size: int
    tokens: int
    layout: str
    """``last`` and ``first``, as a convolution leaves its map; ``odd``: every second column of a larger map."""
    dtypes: tuple[str, ...]
    heads: int = 2

    def launches(self, batch: int, name: str, device: Device) -> list[Any]:
        h, d, n = self.heads, self.d, self.size
        maps = {"last": (n * n * h * d, d, 1, n * h * d, h * d), "first": (h * d * n * n, d * n * n, n * n, n, 1)}
        maps["odd"] = (2 * h * d * n * n, 2 * d * n * n, 2 * n * n, 2 * n, 2)
        of = {"x": maps[self.layout], "g": maps["last" if self.layout == "last" else "first"]}
        dense, split = (h * self.tokens * d, self.tokens * d, d, 1), (h * self.tokens * d, d, h * d, 1)
        of |= {"q": split, "o": dense, "k": split, "v": split}
        if self.op == "mobile_to_former":
            plan, each = mobile_to_former, ("qx", "gqox")
            of["g"] = dense
        else:
            plan, each = former_to_mobile, ("xkv", "gxkv")
        found: list[Any] = []
        for names, launches in zip(each, (plan.forward_launches, plan.backward_launches), strict=True):
            precision = "tf32" if name == "tf32" else "ieee"
            strides = tuple((letter, of[letter]) for letter in names)
            problem = mobile_to_former.Problem(
                self.op, (batch, h, d, n, n), self.tokens, strides, True, DTYPES[name], precision, device
            )
            planned = launches(problem)
            found += planned[0] if isinstance(planned, tuple) else planned
        return found

    def columns(self) -> dict[str, Any]:
        return {"heads": self.heads, "head_dim": self.d, "map": f"{self.size}x{self.size}", "tokens": self.tokens,
                "layout": self.layout}  # fmt: skip


@dataclass(frozen=True)
class Linear:
    """One shape of relu_linear_attention."""

    heads: int
    d: int
    size: int
    layout: str
    """``last`` and ``first``: slices of a map that has [q|k|v] by head; ``odd``: every second column."""
    dtypes: tuple[str, ...]

    op = "relu_linear_attention"

    def launches(self, batch: int, name: str, device: Device) -> list[Any]:
        h, d, n = self.heads, self.d, self.size
        last, first = (n * n * h * d, d, 1, n * h * d, h * d), (h * d * n * n, d * n * n, n * n, n, 1)
        packed = {
            "last": (3 * n * n * h * d, 3 * d, 1, 3 * n * h * d, 3 * h * d),
            "first": (3 * h * d * n * n, 3 * d * n * n, n * n, n, 1),
            "odd": (2 * h * d * n * n, 2 * d * n * n, 2 * n * n, 2 * n, 2),
        }[self.layout]
        out = last if self.layout == "last" else first
        of = {name: packed if name in "qkv" else out for name in ("q", "k", "v", "o", "g", "dq", "dk", "dv")}
        found: list[Any] = []
        for names, launches in (
            (("q", "k", "v", "o"), relu_linear_attention.forward_launches),
            (("g", "q", "k", "v", "dq", "dk", "dv"), relu_linear_attention.backward_launches),
        ):
            problem = relu_linear_attention.Problem(
                (batch, h, d, n, n), tuple((each, of[each]) for each in names), DTYPES[name],
                "tf32" if name == "tf32" else "ieee", device,
            )  # fmt: skip
            found += launches(problem)[0]
        return found

    def columns(self) -> dict[str, Any]:
        return {"heads": self.heads, "head_dim": self.d, "map": f"{self.size}x{self.size}", "layout": self.layout}


@dataclass(frozen=True)
class Multiscale:
    """The convolutions of one scale of multiscale_linear_attention; its attention is another op's."""

    heads: int
    d: int
    size: int
    kernel: int
    layout: str
    dtypes: tuple[str, ...]

    op = "multiscale_linear_attention"

    def launches(self, batch: int, name: str, device: Device) -> list[Any]:
        groups, d, n = 3 * self.heads, self.d, self.size
        strides = {
            "last": (n * n * groups * d, d, 1, n * groups * d, groups * d),
            "first": (groups * d * n * n, d * n * n, n * n, n, 1),
        }[self.layout]

        def problem(names: str) -> Any:
            maps = relu_linear_attention.Problem(
                (batch, groups, d, n, n), tuple((each, strides) for each in names), DTYPES[name],
                "tf32" if name == "tf32" else "ieee", device,
            )  # fmt: skip
            return multiscale_linear_attention.Problem(maps, self.kernel, (False, False))

        forward = multiscale_linear_attention.aggregate_launches(problem("xo"))
        return forward + multiscale_linear_attention.gradient_launches(problem("gxeo"), True)[0]

    def columns(self) -> dict[str, Any]:
        return {"heads": self.heads, "head_dim": self.d, "map": f"{self.size}x{self.size}", "patch": self.kernel,
                "layout": self.layout}  # fmt: skip


Every = Case | Bridge | Linear | Multiscale


def suite(ops: list[str]) -> list[Every]:
    """The shapes of the ops."""
    found: list[Every] = patches() if "patch_attention" in ops else []  # type: ignore[assignment]
    return found + [case for case in [*bridges(), *linears(), *multiscales()] if case.op in ops]


def multiscales() -> list[Multiscale]:
    """The scales of EfficientViT and DC-AE, and other kernels and wider heads beyond them."""
    half, both, single = ("bf16",), ("bf16", "fp32"), ("bf16", "fp16", "fp32", "tf32")
    shapes = [(4, 16, 14, 5, "first", both), (4, 16, 14, 5, "last", half), (16, 32, 32, 5, "first", single)]
    shapes += [(16, 32, 32, 5, "last", both), (16, 32, 16, 3, "first", half), (16, 32, 16, 7, "last", half)]
    shapes += [(8, 24, 15, 5, "first", half), (4, 64, 32, 5, "first", both), (4, 64, 32, 5, "last", both)]
    shapes += [(2, 128, 32, 5, "first", half), (2, 128, 32, 5, "last", half), (4, 32, 14, 5, "first", ("fp64",))]
    return [Multiscale(*shape) for shape in shapes]


def linears() -> list[Linear]:
    """Maps of EfficientViT, DC-AE and Sana, and wider heads beyond them."""
    half, both, single = ("bf16",), ("bf16", "fp32"), ("bf16", "fp16", "fp32", "tf32")
    shapes = [(8, 16, 14, "first", both), (8, 16, 32, "last", both), (16, 32, 32, "first", single)]
    shapes += [(16, 32, 32, "last", single), (70, 32, 32, "last", half), (32, 32, 16, "first", half)]
    shapes += [(16, 32, 32, "odd", half), (16, 32, 4, "first", half), (16, 32, 4, "last", half)]
    shapes += [(8, 24, 15, "first", both), (4, 64, 32, "first", single), (4, 64, 32, "last", single)]
    shapes += [(4, 64, 4, "first", half), (4, 64, 4, "last", half)]
    shapes += [(2, 128, 32, "first", half), (2, 128, 32, "last", half), (2, 128, 4, "last", half)]
    shapes += [(8, 16, 14, "first", ("fp64",)), (8, 32, 14, "last", ("fp64",))]
    return [Linear(*shape) for shape in shapes]


def bridges() -> list[Bridge]:
    """Maps and tokens of Mobile-Former, from its narrowest to its widest, and wider heads and more tokens beyond."""
    half, both, single = ("bf16",), ("bf16", "fp32"), ("bf16", "fp16", "fp32", "tf32")
    shapes = [
        (6, 56, 3, "first", both),
        (6, 56, 3, "last", half),
        (12, 28, 6, "first", half),
        (22, 28, 6, "last", half),
    ]
    shapes += [(36, 28, 6, "first", both), (36, 28, 6, "odd", half), (48, 14, 6, "first", single)]
    shapes += [(48, 14, 6, "last", both), (64, 14, 6, "last", both), (64, 7, 6, "first", ("fp32",))]
    shapes += [(88, 14, 6, "first", ("bf16", "tf32")), (88, 14, 6, "last", half), (120, 7, 6, "first", half)]
    shapes += [(256, 7, 6, "first", half), (256, 7, 6, "last", half), (24, 28, 50, "first", both)]
    shapes += [(32, 14, 50, "last", ("fp32",)), (128, 14, 50, "last", half)]
    shapes += [(d, 14, m, layout, ("fp64",)) for d, m in ((32, 6), (16, 50)) for layout in ("first", "last")]
    return [Bridge(op, *shape) for op in ("mobile_to_former", "former_to_mobile") for shape in shapes]


def patches() -> list[Case]:
    """The shapes that patch_attention's models have, and beyond them what a user's own model may ask for.

    float16 compiles to the code of bfloat16 with other opcodes: one model stands for all. float32 stands for head
    dimensions of the same padded width.
    """
    every, both, half = ("bf16", "fp16", "fp32", "tf32"), ("bf16", "fp32"), ("bf16",)
    cases = []
    for dims, dtypes in (((16, 20, 24), both), ((24, 30, 36), half), ((36, 48, 60), every)):
        cases += [Case(4, d, d, size, 2, False, "last", dtypes) for d, size in zip(dims, (32, 16, 8), strict=True)]
    cases += [Case(4, 36, 36, 64, 2, False, "last", both)]
    cases += [Case(4, d, d, size, 2, False, "last", half) for d, size in ((48, 32), (60, 16))]
    cases.append(Case(8, 32, 128, 7, 1, True, "per_head", every))
    cases += [Case(heads, 32, 32, size, 1, True, "first", both) for heads, size in ((12, 14), (24, 7))]
    cases += [Case(heads, 32, 32, size, 1, True, "per_head", half) for heads, size in ((12, 14), (24, 7))]
    cases += [Case(4, 36, 36, 32, 2, False, layout, half) for layout in ("first", "odd")]
    cases += [Case(4, 16, 16, 10, 2, False, "last", both), Case(4, 100, 100, 32, 2, False, "last", half)]
    cases += [Case(4, 128, 128, size, 2, False, "last", half) for size in (8, 16)]
    cases += [Case(4, 128, 128, 64, 2, False, "last", both), Case(4, 256, 256, 8, 2, False, "last", both)]
    cases += [Case(4, 256, 256, 64, 2, False, "last", both)]
    return cases


def strides_of(case: Case) -> dict[str, tuple[int, ...]]:
    """Strides (batch, head, channel, y, x) of q, k, v, out and its gradient."""
    h, d, dv, n = case.heads, case.d, case.dv, case.size
    if case.layout == "first":
        q = (h * d * n * n, d * n * n, n * n, n, 1)
        v = (h * dv * n * n, dv * n * n, n * n, n, 1)
        return {"q": q, "k": q, "v": v, "g": v, "o": v}
    row = h * (2 * d + dv) + (1 if case.layout == "odd" else 0)
    by_head = case.layout == "per_head"
    q = (n * n * row, 2 * d + dv if by_head else d, 1, n * row, row)
    v = (n * n * row, 2 * d + dv if by_head else dv, 1, n * row, row)
    o = (n * n * h * dv, dv, 1, n * h * dv, h * dv)
    return {"q": q, "k": q, "v": v, "g": o, "o": o}


def problem_of(case: Case, batch: int, name: str, device: Device, backward: bool) -> Any:
    """The launcher's description of a call."""
    dtype = DTYPES[name]
    names = "qkvgo" if backward else "qkv"
    strides = strides_of(case)
    tokens = math.ceil(case.size / case.patch) ** 2
    return patch_attention.Problem(
        (batch, case.heads, case.d, case.size, case.size),
        case.dv,
        tuple((map_, strides[map_]) for map_ in names),
        (tokens * tokens, tokens, 1) if case.bias else None,
        dtype.itemsize,
        (case.patch, case.patch),
        dtype,
        "tf32" if name == "tf32" else "ieee",
        device,
    )


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


def unit_of(launch: Any, target: str, dtype: torch.dtype) -> Unit:
    """What a launch compiles to: types and specialisations as the runtime would find them."""
    sums = {"lse", "delta", "partial", "stats", "sums", "dsums", "parts", "p", "pw", "dq_sums", "dk_sums", "dv_sums"}
    sum_type = "*fp64" if dtype == torch.float64 else "*fp32"
    names = list(launch.kernel.arg_names)
    types: dict[str, str] = {}
    divisible = []
    for index, pointer in enumerate(launch.pointers):
        is_sum = pointer in sums or (pointer == "bias" and not launch.meta.get("BIAS", True))
        types[names[index]] = sum_type if is_sum else POINTER[dtype]
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


def compile_unit(unit: Unit) -> dict[str, Any]:
    """Compile and read the machine code. Never raises: an error is a row."""
    kernel = getattr(importlib.import_module(unit.module), unit.kernel)
    source = ASTSource(
        fn=kernel,
        signature=dict(unit.signature),
        constexprs={(kernel.arg_names.index(name),): value for name, value in unit.constexprs},
        attrs={(index,): [["tt.divisibility", 16]] for index in unit.divisible},
    )
    try:
        target, options = TARGETS[unit.target][0], dict(unit.options)
        warps = options["num_warps"]
        if unit.target.startswith("gfx"):
            return _amd(triton.compile(source, target=target, options=options), unit.target, warps)
        row = _nvidia(triton.compile(source, target=target, options=options), unit.target, warps)
        limit = min(255, 65536 // (32 * warps))
        if row["spill_bytes"] and row["registers"] < limit:
            # ptxas parks a few bytes to fit one more block on a processor. Told to take what it needs it
            # does not spill: then this is its choice and not a want of registers.
            free = _nvidia(
                triton.compile(source, target=target, options=options | {"maxnreg": limit}), unit.target, warps
            )
            if not free["spill_bytes"]:
                row |= {"spill_bytes": 0, "stack_bytes": row["spill_bytes"], "verdict": free["verdict"]}
        return row
    except Exception as error:
        return {"verdict": "ERROR " + " ".join(str(error).split())[:200]}


_LD = re.compile(r"ld\.global[\w.:]*?(?:\.v(\d))?\.b(\d+)")
_CP_ASYNC = re.compile(r"cp\.async\.c[ag]\.shared\.global[^,]*?\[[^]]*\], \[[^]]*\], (\w+)")
_AMD_LD = re.compile(r"(?:global|buffer)_load_(dwordx?\d?|ushort|short_d16\w*|ubyte)")


def _tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _nvidia(compiled: Any, target: str, warps: int) -> dict[str, Any]:
    ptx = compiled.asm["ptx"]
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = subprocess.run(
            [_tool("cuobjdump"), "-res-usage", str(cubin)], check=False, capture_output=True, text=True
        )
        found = re.search(r"REG:(\d+) STACK:(\d+).*LOCAL:(\d+)", usage.stdout)
        if not found:
            raise RuntimeError("cuobjdump: " + (usage.stderr or usage.stdout))
        registers, stack, local = map(int, found.groups())
        spill = 0
        if stack or local:
            # A stack is not always spills: the local loads and stores in the code tell.
            code = subprocess.run(
                [_tool("nvdisasm"), "-c", str(cubin)], check=False, capture_output=True, text=True
            ).stdout
            if re.search(r"\b(LDL|STL)\b", code):
                spill = stack + local
                stack = 0
    shared = compiled.metadata.shared
    total = {"sm_80": 164, "sm_90": 228, "sm_100": 228}[target] * 1024
    by_registers = 65536 // (math.ceil(registers / 8) * 8 * 32 * warps)
    blocks = min(by_registers, total // (shared + 1024), 64 // warps, 32)
    matrix = [name for name in ("tcgen05.mma", "wgmma", "mma.sync") if name in ptx]
    loads = [
        int(width or 1) * int(bits) // 8 for width, bits in re.findall(r"ld\.global[\w.:]*?(?:\.v(\d))?\.b(\d+)", ptx)
    ]
    loads += [
        int(size, 0) for size in re.findall(r"cp\.async\.c[ag]\.shared\.global[^,]*?\[[^]]*\], \[[^]]*\], (\w+)", ptx)
    ]
    return _row(registers, spill, stack, shared, target, blocks, warps, "+".join(matrix), max(loads, default=0))


def _amd(compiled: Any, target: str, warps: int) -> dict[str, Any]:
    code = compiled.asm["amdgcn"]

    def value(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", code)
        return int(found.group(1)) if found else 0

    registers = value("vgpr_count")  # vector and accumulation registers together
    # Spilled vector registers are 4 bytes in each of 64 lanes; spilled scalars go to vector lanes, without memory.
    spill = 4 * value("vgpr_spill_count")
    shared = compiled.metadata.shared
    waves = min(8, 512 // max(8, math.ceil(registers / 8) * 8))
    blocks = min(4 * waves // warps, 65536 // max(shared, 1), 16 if warps > 1 else 32)
    matrix = "mfma" if "v_mfma" in code else ""
    loads = re.findall(r"(?:global|buffer)_load_(dwordx?\d?|ushort|short_d16\w*|ubyte)", code)
    widths = [
        4 * int(name[-1]) if name[-1].isdigit() and "x" in name else 4 if name == "dword" else 2 for name in loads
    ]
    return _row(registers, spill, value("private_segment_fixed_size"), shared, target, blocks, warps, matrix,
                max(widths, default=0))  # fmt: skip


def _row(registers: int, spill: int, stack: int, shared: int, target: str, blocks: int, warps: int, matrix: str,
         load: int) -> dict[str, Any]:  # fmt: skip
    limit = shared_memory_of(target)
    verdict = "SPILLS" if spill else "SHARED" if shared > limit else "ok"
    return {
        "registers": registers, "spill_bytes": spill, "stack_bytes": stack, "shared_bytes": shared,
        "shared_limit": limit, "blocks_per_processor": blocks, "warps_per_processor": blocks * warps,
        "matrix": matrix or "-", "widest_load": load, "verdict": verdict,
    }  # fmt: skip


def plan(targets: list[str], dtypes: list[str], quick: bool, wanted: str, ops: list[str]) -> dict[Unit, dict[str, Any]]:
    """Distinct compilations, each with the columns of the first case that needs it."""
    units: dict[Unit, dict[str, Any]] = {}
    today = datetime.date.today().isoformat()
    for target, name, case in _walk(targets, dtypes, ops):
        for batch in (1, 128):
            for launch in case.launches(batch, name, TARGETS[target][1]):
                unit = unit_of(launch, target, DTYPES[name])
                blocks = [f"{k}={v}" for k, v in launch.meta.items() if k in _BLOCKS]
                row = {
                    "op": case.op, "kernel": launch.name, "target": target, "dtype": name, "batch": batch,
                    **dict.fromkeys(("heads", "head_dim", "value_dim", "map", "patch", "tokens", "bias", "layout"), ""),
                    **case.columns(), "config": " ".join(blocks + [f"{k}={v}" for k, v in launch.options.items()]),
                    "cases": 0, "triton": triton.__version__, "date": today,
                }  # fmt: skip
                if not re.search(wanted, " ".join(map(str, row.values()))):
                    continue
                units.setdefault(unit, row)["cases"] += 1
    if quick:
        step = max(1, len(units) // QUICK)
        units = dict(list(units.items())[::step][:QUICK])
    return units


_BLOCKS = ("UNITS", "TOKENS", "BLOCK", "BLOCK_M", "BLOCK_N", "Q_BLOCKS", "ONE_PASS", "PHASES",
           "Q_BLOCK_M", "Q_BLOCK_N", "K_BLOCK_M", "K_BLOCK_N", "SPLIT", "ROWS", "DX", "DTOKENS",
           "PRODUCT", "STAGE")  # fmt: skip


def _walk(targets: list[str], dtypes: list[str], ops: list[str]) -> Iterator[tuple[str, str, Every]]:
    for case in suite(ops):
        for target in targets:
            for name in dtypes:
                # The launcher asks for tf32 on NVIDIA only.
                if name in case.dtypes and not (name == "tf32" and target.startswith("gfx")):
                    yield target, name, case


def run(units: dict[Unit, dict[str, Any]], processes: int) -> list[dict[str, Any]]:
    """Rows in the order of ``units``. A finding is said at once, on stderr."""
    results: dict[Unit, dict[str, Any]] = {}
    progress = Progress(len(units))

    def done(unit: Unit, result: dict[str, Any]) -> None:
        results[unit] = result
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


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        writer.writeheader()
        writer.writerows(rows)


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
    print(f"{len(rows)} kernels for {sum(row['cases'] for row in rows)} launches, at most {registers} registers, "
          f"{len(bad)} with a finding")  # fmt: skip
    whole = not (arguments.target or arguments.dtype or arguments.quick or arguments.filter)
    if arguments.csv:
        _write(arguments.csv, rows)
    elif whole:
        for op in ops:
            _write(RESULTS / f"{op}.csv", [row for row in rows if row["op"] == op])
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
