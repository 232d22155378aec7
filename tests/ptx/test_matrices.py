"""Matrix products and the instructions that feed them, against NumPy. Which lane holds what is written down here anew,
from the tables of the PTX ISA, "Matrix fragments for mma" and "Asynchronous warpgroup level matrix instructions"."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.ptx import assembly
from tests.ptx.assembly import Array, Result
from tests.ptx.formulas import to_bf16

LANE = np.arange(32)
BYTES = {"bf16": 2, "f16": 2, "tf32": 4, "f64": 8}


def as_bits(kind: str, x: Array) -> Array:
    if kind == "bf16":
        return to_bf16(x)
    return {"f16": x.astype(np.float16), "tf32": x.astype(np.float32), "f64": x}[kind].view(f"u{BYTES[kind]}")


def matrix(kind: str, rows: int, columns: int, seed: int) -> Array:
    """Small whole numbers and halves: exact in every kind, and so are their sums."""
    return np.random.default_rng(seed).integers(-8, 8, (rows, columns)) / 2


def fragment_a(kind: str, rows: int, depth: int) -> Iterator[list[tuple[Array, Array]]]:
    """For each register of A: (row, k) of each element that it packs, by lane."""
    if BYTES[kind] == 2:
        for i in range(4 if depth == 16 else 2):
            row, k = LANE // 4 + 8 * (i % 2), LANE % 4 * 2 + 8 * (i // 2)
            yield [(row, k), (row, k + 1)]
    else:
        per_k = rows // 8
        for i in range(depth // 4 * per_k):
            yield [(LANE // 4 + 8 * (i % per_k), LANE % 4 + 4 * (i // per_k))]


def fragment_b(kind: str, depth: int) -> Iterator[list[tuple[Array, Array]]]:
    """(k, column)."""
    if BYTES[kind] == 2:
        for i in range(depth // 8):
            yield [(LANE % 4 * 2 + 8 * i, LANE // 4), (LANE % 4 * 2 + 8 * i + 1, LANE // 4)]
    else:
        for i in range(depth // 4):
            yield [(LANE % 4 + 4 * i, LANE // 4)]


def fragment_c(rows: int, columns: int = 8) -> Iterator[tuple[Array, Array]]:
    for tile in range(columns // 8):
        for i in range(rows // 4):
            yield LANE // 4 + 8 * (i // 2), 8 * tile + LANE % 4 * 2 + i % 2


def packed(kind: str, elements: list[Array]) -> Array:
    bits = np.stack([as_bits(kind, each) for each in elements], 1)
    return np.ascontiguousarray(bits).view(np.uint64 if kind == "f64" else np.uint32).reshape(-1)


MMA = [("bf16", 16, 8), ("bf16", 16, 16), ("f16", 16, 8), ("f16", 16, 16), ("tf32", 16, 4), ("tf32", 16, 8),
       ("f64", 8, 4), ("f64", 16, 4), ("f64", 16, 8), ("f64", 16, 16)]  # fmt: skip


def mma(kind: str, rows: int, depth: int) -> tuple[str, list[Array], Array]:
    """(module, inputs, the right result): registers come from an array of (register, lane)."""
    a, b, c = (matrix(kind, *size, seed) for seed, size in enumerate([(rows, depth), (depth, 8), (rows, 8)]))
    word = np.float64 if kind == "f64" else np.float32
    registers = [packed(kind, [a[place] for place in each]) for each in fragment_a(kind, rows, depth)]
    a_count = len(registers)
    registers += [packed(kind, [b[place] for place in each]) for each in fragment_b(kind, depth)]
    b_count = len(registers) - a_count
    places = list(fragment_c(rows))
    registers += [c[place].astype(word).view(f"u{word().itemsize}") for place in places]
    size, prefix = word().itemsize, "%rd1" if kind == "f64" else "%r1"
    body = [f"mul.wide.u32 %rd9, %r0, {size}; add.s64 %rd8, %rd1, %rd9; add.s64 %rd9, %rd0, %rd9;"]
    body += [f"ld.global.b{8 * size} {prefix}{i:02}, [%rd8+{32 * size * i}];" for i in range(len(registers))]
    names = [f"{prefix}{i:02}" for i in range(len(registers))]
    of = lambda first, count: "{" + ", ".join(names[first : first + count]) + "}"  # noqa: E731
    sums = "f64" if kind == "f64" else "f32"
    body.append(
        f"mma.sync.aligned.m{rows}n8k{depth}.row.col.{sums}.{kind}.{kind}.{sums} {of(a_count + b_count, len(places))}, "
        f"{of(0, a_count)}, {of(a_count, b_count)}, {of(a_count + b_count, len(places))};"
    )
    body += [
        f"st.global.b{8 * size} [%rd9+{32 * size * i}], {names[a_count + b_count + i]};" for i in range(len(places))
    ]
    wanted = np.stack([(a @ b + c)[place] for place in places]).astype(word)
    return assembly.kernel("\n".join(body), 2), [np.stack(registers)], wanted


@pytest.mark.core
@pytest.mark.parametrize("kind,rows,depth", MMA)
def test_mma(kind: str, rows: int, depth: int, tmp_path: Path) -> None:
    ptx, inputs, wanted = mma(kind, rows, depth)
    out = np.zeros_like(wanted)
    result = assembly.execute(ptx, [out, *inputs])
    assert not result.findings
    np.testing.assert_array_equal(out, wanted)
    assert result.counters.matrix_flops == 2 * rows * 8 * depth
    assert not assembly.assembles(ptx, tmp_path)


def test_tf32_operands_lose_their_low_bits() -> None:
    ptx, inputs, _ = mma("tf32", 16, 8)
    out, rounded = np.zeros((4, 32), np.float32), np.zeros((4, 32), np.float32)
    inputs[0][:6] += 0x1234  # of A and B, below what a tensor core reads
    assembly.execute(ptx, [out, *inputs])
    inputs[0][:6] &= 0xFFFFE000
    assembly.execute(ptx, [rounded, *inputs])
    np.testing.assert_array_equal(out, rounded)


def test_an_undefined_operand_makes_its_row_and_column_undefined() -> None:
    ptx, inputs, wanted = mma("bf16", 16, 16)
    ptx = ptx.replace("ld.global.b32 %r100,", "setp.lt.u32 %p1, %r0, 4; @%p1 ld.global.b32 %r100,")
    result = assembly.execute(ptx, [np.zeros_like(wanted), *inputs])
    assert result.kinds == {"undefined value"} and len(result.findings) == 2  # rows 1 to 7, of 16


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("trans", ["", ".trans"])
@pytest.mark.parametrize("store", [False, True])
def test_ldmatrix_and_stmatrix(count: int, trans: str, store: bool, tmp_path: Path) -> None:
    """Matrices of 8 x 8 halves, whose rows lie in an order of their own; back through the other instruction."""
    given = np.random.default_rng(0).integers(0, 65536, (32, 8), dtype=np.uint16)
    registers = "{" + ", ".join(f"%r{20 + i}" for i in range(count)) + "}"
    shape = f"sync.aligned.m8n8.x{count}{trans}.shared.b16"
    place = "mov.b32 %r8, global_smem; shl.b32 %r9, %r0, 4; xor.b32 %r9, %r9, 48; add.s32 %r9, %r8, %r9;"
    place += "mul.wide.u32 %rd9, %r0, 16; add.s64 %rd8, %rd1, %rd9; add.s64 %rd9, %rd0, %rd9;"
    if store:
        body = f"ld.global.v4.b32 {{%r20, %r21, %r22, %r23}}, [%rd8]; stmatrix.{shape} [%r9], {registers};"
        body += "bar.sync 0; add.s32 %r10, %r8, 0; shl.b32 %r11, %r0, 4; add.s32 %r10, %r10, %r11;"
        body += "ld.shared.v4.b32 {%r20, %r21, %r22, %r23}, [%r10];"
        body += f"xor.b32 %r12, %r0, 3; setp.lt.u32 %p1, %r12, {8 * count};"
        body += "@%p1 st.global.v4.b32 [%rd9], {%r20, %r21, %r22, %r23};"
    else:
        body = "ld.global.v4.b32 {%r20, %r21, %r22, %r23}, [%rd8]; st.shared.v4.b32 [%r9], {%r20, %r21, %r22, %r23};"
        body += "bar.sync 0; mov.b32 %r20, 0; mov.b32 %r21, 0; mov.b32 %r22, 0; mov.b32 %r23, 0;"
        body += f"ldmatrix.{shape} {registers}, [%r9];"
        body += "st.global.v4.b32 [%rd9], {%r20, %r21, %r22, %r23};"
    ptx = assembly.kernel(place + body, 2)
    out = np.zeros((32, 8), np.uint16)
    result = assembly.execute(ptx, [out, given], shared_bytes=512)
    assert not result.findings, [str(each) for each in result.findings]
    assert not assembly.assembles(ptx, tmp_path)
    for i in range(count):
        if store:  # the registers of the lanes are the matrix; row r of matrix i went to row (8 i + r) ^ 3
            fragments = given[:, 2 * i : 2 * i + 2].reshape(8, 4, 2)
            stored = np.stack([out[(8 * i + row) ^ 3] for row in range(8)])
            whole = fragments.reshape(8, 8)
            np.testing.assert_array_equal(stored, whole.T if trans else whole)
        else:
            rows = given[8 * i : 8 * i + 8]
            np.testing.assert_array_equal(out[:, 2 * i : 2 * i + 2].reshape(8, 8), rows.T if trans else rows)


# Shared memory for wgmma: sixteen rows of B (N x K) and 64 of A (M x K), in each of the canonical layouts.
SWIZZLES = {"none": (0, 16), "128": (1, 128), "64": (2, 64), "32": (3, 32)}


def laid_out(x: Array, bits: Array, swizzle: str, along: bool) -> tuple[Array, int, int]:
    """(bytes, leading offset, stride offset) of a matrix (rows, k) in shared memory.

    Pieces are eight lines of ``width`` bytes; lines are rows, or steps of k where rows lie side by side (``along``).
    """
    itemsize, width = bits.dtype.itemsize, SWIZZLES[swizzle][1]
    lines = bits.T if along else bits  # (line, place in the line)
    per_piece = width // itemsize
    count = -(-lines.shape[1] // per_piece)  # pieces side by side
    down = lines.shape[0] // 8
    memory = np.zeros(count * down * 8 * width, np.uint8)
    for line in range(lines.shape[0]):
        for place in range(lines.shape[1]):
            side, inner = divmod(place, per_piece)
            address = (side * down + line // 8) * 8 * width + line % 8 * width + inner * itemsize
            if swizzle != "none":  # sixteen-byte units, exchanged by the number of their 128-byte line
                units = width // 16
                address ^= (address // 128 % units) * 16
            memory[address : address + itemsize] = np.frombuffer(lines[line, place].tobytes(), np.uint8)
    beside, below = down * 8 * width, 8 * width
    if along:
        return (memory, below, beside) if swizzle == "none" else (memory, beside, below)
    return memory, beside, below


def descriptor(start: int, leading: int, stride: int, swizzle: str) -> int:
    return start >> 4 | (leading >> 4) << 16 | (stride >> 4) << 32 | SWIZZLES[swizzle][0] << 62


def wgmma(
    kind: str, n: int, swizzle: str, along: tuple[bool, bool], in_registers: bool, accumulate: bool, fences: str
) -> tuple[str, list[Any], Array]:
    """(module, inputs, the right result) of one product of 64 x n, from A in shared memory or in registers."""
    depth = 32 // BYTES[kind]
    a, b, c = matrix(kind, 64, depth, 0), matrix(kind, n, depth, 1), matrix(kind, 64, n, 2)
    a_bytes, a_leading, a_stride = laid_out(a, as_bits(kind, a), swizzle, along[0])
    b_bytes, b_leading, b_stride = laid_out(b, as_bits(kind, b), swizzle, along[1])
    a_size = -(-len(a_bytes) // 1024) * 1024
    memory = np.zeros(a_size + -(-len(b_bytes) // 16) * 16, np.uint8)
    memory[: len(a_bytes)], memory[a_size : a_size + len(b_bytes)] = a_bytes, b_bytes
    body = [
        "mov.b32 %r8, global_smem; mov.b32 %r7, %r0;",
        "L1:",
        f"setp.ge.u32 %p1, %r7, {len(memory) // 16}; @%p1 bra L2;",
    ]
    body += ["mul.wide.u32 %rd9, %r7, 16; add.s64 %rd9, %rd1, %rd9; ld.global.v4.b32 {%r10, %r11, %r12, %r13}, [%rd9];"]
    body += ["shl.b32 %r6, %r7, 4; add.s32 %r6, %r8, %r6; st.shared.v4.b32 [%r6], {%r10, %r11, %r12, %r13};"]
    body += [
        "add.s32 %r7, %r7, 128; bra L1;",
        "L2:",
        "mul.wide.u32 %rd9, %r0, 4; add.s64 %rd8, %rd2, %rd9; add.s64 %rd9, %rd0, %rd9;",
    ]
    sums = [f"%r{100 + i}" for i in range(n // 2)]
    body += [f"ld.global.b32 {each}, [%rd8+{512 * i}];" for i, each in enumerate(sums)]
    places = list(fragment_a(kind, 16, depth))
    inputs = [np.stack([c[np.concatenate([row + 16 * warp for warp in range(4)]), np.tile(column, 4)]
                        for row, column in fragment_c(16, n)]).astype(np.float32)]  # fmt: skip
    if in_registers:
        warps = [packed(kind, [a[row + 16 * warp, k] for row, k in each]) for each in places for warp in range(4)]
        inputs.append(np.stack(warps).reshape(4, 128))
        body += ["mul.wide.u32 %rd7, %r0, 4; add.s64 %rd7, %rd3, %rd7;"]
        body += [f"ld.global.b32 %r{90 + i}, [%rd7+{512 * i}];" for i in range(4)]
    start = 1024  # where global_smem lies
    first = f"{descriptor(start, a_leading, a_stride, swizzle)}"
    second = f"{descriptor(start + a_size, b_leading, b_stride, swizzle)}"
    body += [f"mov.b64 %rd20, {first}; mov.b64 %rd21, {second}; mov.pred %p2, {int(accumulate)};"]
    numbers = "1, 1"
    if BYTES[kind] == 2:
        numbers += f", {int(along[1])}" if in_registers else f", {int(along[0])}, {int(along[1])}"
    left = "{%r90, %r91, %r92, %r93}" if in_registers else "%rd20"
    shape = f"m64n{n}k{depth}.f32.{kind}.{kind}"
    product = f"wgmma.mma_async.sync.aligned.{shape} {{{', '.join(sums)}}}, {left}, %rd21, %p2, {numbers};"
    body += [fences.format(product=product)]
    body += [f"st.global.b32 [%rd9+{512 * i}], {each};" for i, each in enumerate(sums)]
    places_c = [
        (np.concatenate([row + 16 * warp for warp in range(4)]), np.tile(column, 4))
        for row, column in fragment_c(16, n)
    ]
    wanted = a @ b.T + (c if accumulate else 0)
    right = np.stack([wanted[place] for place in places_c]).astype(np.float32)
    return assembly.kernel("\n".join(body), 3 + in_registers, 128), [memory, *inputs], right


RIGHT = """fence.proxy.async.shared::cta; bar.sync 0; wgmma.fence.sync.aligned; {product}
wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;"""


def run_wgmma(*case: Any) -> tuple[Array, Result, Array, str]:
    ptx, inputs, wanted = wgmma(*case)
    out = np.zeros_like(wanted)
    return out, assembly.execute(ptx, [out, *inputs], shared_bytes=len(inputs[0])), wanted, ptx


@pytest.mark.parametrize("kind", ["bf16", "f16", "tf32"])
@pytest.mark.parametrize("swizzle", SWIZZLES)
@pytest.mark.parametrize("in_registers", [False, True])
def test_wgmma(kind: str, swizzle: str, in_registers: bool, tmp_path: Path) -> None:
    """Every layout in shared memory; of half types also with rows side by side."""
    sides = [(False, False)]
    if kind != "tf32":
        sides += [(False, True)] if in_registers else [(True, True), (False, True), (True, False)]
    for along in sides:
        for n in (8, 64, 200):
            out, result, wanted, ptx = run_wgmma(kind, n, swizzle, along, in_registers, n == 64, RIGHT)
            assert not result.findings, [str(each) for each in result.findings][:3]
            np.testing.assert_array_equal(out, wanted)
            assert result.counters.matrix_flops == 2 * 64 * n * 32 // BYTES[kind]
        assert not assembly.assembles(ptx, tmp_path)


FAULTY = {
    "right": (None, RIGHT),
    "added to twice": (None, RIGHT.replace("{product}", "{product}\n{product}")),
    "not waited for": ("undefined value", RIGHT.replace("wgmma.wait_group.sync.aligned 0;", "")),
    "waited for the one before": ("undefined value", RIGHT.replace("aligned 0", "aligned 1")),
    "not committed": ("undefined value", RIGHT.replace("wgmma.commit_group.sync.aligned;", "")),
    "without a fence": ("unfenced register", RIGHT.replace("wgmma.fence.sync.aligned;", "")),
    "written after the fence": (
        "unfenced register", RIGHT.replace("{product}", "add.f32 %r100, %r100, 0f3F800000; {product}")
    ),
    "copied after the fence": (None, RIGHT.replace("{product}", "mov.b32 %r77, %r100; mov.b32 %r100, %r77; {product}")),
    "without the proxy's fence": ("unfenced bytes", RIGHT.replace("fence.proxy.async.shared::cta;", "")),
    "the proxy's fence after the barrier": (
        None, "bar.sync 0; " + RIGHT.replace("bar.sync 0;", "")
    ),
    "another name of that fence": (None, RIGHT.replace("fence.proxy.async.shared::cta", "fence.proxy.async")),
    "without a barrier": ("race", RIGHT.replace("bar.sync 0;", "")),
    "its operand overwritten": (
        "in flight",
        RIGHT.replace("wgmma.wait", "shl.b32 %r6, %r0, 4; add.s32 %r6, %r8, %r6; st.shared.b32 [%r6], %r0; wgmma.wait"),
    ),
    "waited for if": ("undefined value", RIGHT.replace("wgmma.wait", "setp.gt.u32 %p3, %r0, 999; @%p3 wgmma.wait")),
    "a product that nobody wants": (None, "setp.gt.u32 %p3, %r0, 999; " + RIGHT + " @%p3 {product}"),
    "fenced by one lane": (
        "unfenced bytes", "setp.eq.b32 %p3, %r0, 0; " + RIGHT.replace("fence.proxy", "@%p3 fence.proxy")
    ),
    "three warps of four": (
        "divergent", RIGHT.replace("{product}", "setp.gt.u32 %p3, %r0, 95; @%p3 bra L5; {product}\nL5:\n")
    ),
    "a sum written while it is made": ("in flight", RIGHT.replace("wgmma.wait", "mov.b32 %r100, 0; wgmma.wait")),
    "some lanes": ("divergent", "setp.eq.b32 %p4, %r0, 5; @%p4 bra L4; " + RIGHT + "\nL4:\n"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTY)
def test_each_fault_of_an_asynchronous_product_is_found(name: str) -> None:
    kind, fences = FAULTY[name]
    _, result, _, _ = run_wgmma("bf16", 16, "128", (False, False), False, True, fences)
    assert (kind in result.kinds) if kind else not result.findings, [str(each) for each in result.findings]


def test_an_operand_written_while_it_is_read_is_found() -> None:
    late = RIGHT.replace("wgmma.wait", "mov.b32 %r91, 0; wgmma.wait")
    _, result, _, _ = run_wgmma("bf16", 16, "128", (False, False), True, True, late)
    assert result.kinds == {"in flight"}


def test_a_wrong_swizzle_gives_a_wrong_result() -> None:
    ptx, inputs, wanted = wgmma("bf16", 16, "128", (False, False), False, True, RIGHT)
    other = ptx.replace("mov.b64 %rd21, 4", "mov.b64 %rd21, 8")
    assert other != ptx
    out = np.zeros_like(wanted)
    assembly.execute(other, [out, *inputs], shared_bytes=len(inputs[0]))
    assert (out != wanted).any()
