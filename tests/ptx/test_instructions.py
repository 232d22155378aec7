"""Each instruction that works on a lane alone, against a formula in NumPy on 256 values, special ones among them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.ptx import assembly, machine
from tests.ptx.formulas import INSTRUCTIONS, THREADS, TYPES, Instruction, flushed, from_bf16, halves, values

REGISTER = {2: "%rs", 4: "%r", 8: "%rd"}


def body_of(name: str, kinds: tuple[str, ...], out: str) -> str:
    """Load a value of each kind, do it, store the result; a predicate is loaded and stored as a number."""
    lines, operands = [], []

    def size(kind: str) -> int:
        return 4 if kind == "pred" else np.dtype(TYPES[kind]).itemsize

    for i, kind in enumerate(kinds, start=1):
        register = f"{REGISTER[size(kind)]}{10 + i}"
        lines += [
            f"mul.wide.u32 %rd{20 + i}, %r0, {size(kind)};",
            f"add.s64 %rd{20 + i}, %rd{i}, %rd{20 + i};",
            f"ld.global.b{8 * size(kind)} {register}, [%rd{20 + i}];",
        ]
        if kind == "pred":
            lines.append(f"setp.ne.b32 %p{i}, {register}, 0;")
            register = f"%p{i}"
        operands.append(register)
    results = ["%p9", "%p8"] if out == "pred2" else ["%p9"] if out == "pred" else [f"{REGISTER[size(out)]}30"]
    lines.append(f"{name} {'|'.join(results)}, {', '.join(operands)};")
    if out.startswith("pred"):
        lines += ["selp.b32 %r30, 1, 0, %p9;", "selp.b32 %r31, 2, 0, %p8;" if out == "pred2" else "mov.b32 %r31, 0;"]
        lines.append("or.b32 %r30, %r30, %r31;")
    width = 4 if out.startswith("pred") else size(out)
    lines += [
        f"mul.wide.u32 %rd40, %r0, {width};",
        "add.s64 %rd40, %rd0, %rd40;",
        f"st.global.b{8 * width} [%rd40], {REGISTER[width]}30;",
    ]
    return "\n".join("\t" + line for line in lines)


@pytest.mark.core
@pytest.mark.parametrize("instruction", INSTRUCTIONS, ids=repr)
def test_it_is_its_formula(instruction: Instruction) -> None:
    operands = [values("u32" if kind == "pred" else kind, 7 * i) for i, kind in enumerate(instruction.kinds)]
    for i, kind in enumerate(instruction.kinds):
        if kind == "pred":
            operands[i] = operands[i] % 2
    if instruction.name.startswith(("bf", "sh")):  # small counts, and a few that are too large
        first = 2 if instruction.name.startswith("bfi") else 1
        counts = operands[first:]
        operands[first:] = [np.where(np.arange(THREADS) % 8, each % 70, each).astype(each.dtype) for each in counts]
    with np.errstate(all="ignore"):
        wanted = instruction.formula(*operands)
    out = np.zeros(THREADS, np.uint32 if instruction.out.startswith("pred") else TYPES[instruction.out])
    ptx = assembly.kernel(body_of(instruction.name, instruction.kinds, instruction.out), 1 + len(operands), THREADS)
    result = assembly.execute(ptx, [out, *operands])
    assert not result.findings
    if instruction.error:
        with np.errstate(all="ignore"):
            # A subnormal has no more bits than it has.
            near = np.abs(out - wanted) <= instruction.error * np.abs(wanted) + np.finfo(np.float32).smallest_subnormal
        assert (near | (out == wanted) | (np.isnan(out) & np.isnan(wanted))).all()
        assert (np.signbit(out) == np.signbit(wanted))[~np.isnan(wanted)].all()
    elif out.dtype.kind == "f":
        np.testing.assert_array_equal(out, wanted)
        assert (np.signbit(out) == np.signbit(wanted))[~np.isnan(wanted)].all()
    elif instruction.out in ("bf16", "bf16x2", "f16x2"):
        kind = instruction.out
        as_floats = from_bf16 if kind == "bf16" else lambda x: halves(x, kind)
        np.testing.assert_array_equal(as_floats(out), as_floats(wanted))
    elif instruction.out == "tf32":
        np.testing.assert_array_equal(out.view(np.float32), wanted.view(np.float32))
    else:
        np.testing.assert_array_equal(out, wanted.astype(out.dtype, copy=False).view(out.dtype))


def test_these_tests_are_of_ptx(tmp_path: Path) -> None:
    """ptxas takes the kernels: what is tested is what it would have compiled."""
    modules = [
        assembly.kernel(body_of(each.name, each.kinds, each.out), 1 + len(each.kinds), THREADS, f"kernel{index}")
        for index, each in enumerate(INSTRUCTIONS)
    ]
    head = modules[0].partition(".visible")[0]
    kernels = "".join(".visible" + each.partition(".visible")[2] for each in modules)
    assert not assembly.assembles(head + kernels, tmp_path)


def test_approximations_are_as_wrong_as_they_may_be() -> None:
    inverse, root = (lambda x: 1 / x), (lambda x: 1 / np.sqrt(x))
    approximations: list[tuple[str, Any, float]] = [
        ("ex2.approx.ftz.f32", np.exp2, 2**-22), ("lg2.approx.ftz.f32", np.log2, 2**-22),
        ("rcp.approx.ftz.f32", inverse, 2**-23), ("rsqrt.approx.ftz.f32", root, 2**-22.9),
        ("div.full.f32", None, 2**-22),
    ]  # fmt: skip
    for name, exact, error in approximations:
        x = values("f32", 0)
        if name[:2] in ("lg", "rs"):
            x = np.abs(x)
            x[(x > 0.5) & (x < 2)] *= 4  # where lg2's error is not absolute
        operands = [x] if exact else [x, values("f32", 1)]
        with np.errstate(all="ignore"):
            wanted = flushed(exact(x.astype("f8"))) if exact else x.astype("f8") / operands[1]
        out = np.zeros(THREADS, np.float32)
        ptx = assembly.kernel(body_of(name, ("f32",) * len(operands), "f32"), 1 + len(operands), THREADS)
        assembly.execute(ptx, [out, *operands], skewed=True)
        finite = np.isfinite(wanted) & (np.abs(wanted) > 1e-30) & (np.abs(wanted) < 1e30) & (wanted != 1)
        relative = np.abs(out[finite] / wanted[finite] - 1)
        assert finite.sum() > 100
        assert (relative <= error + 2**-24).all()
        assert (relative >= error / 2).mean() > 0.9


def test_every_instruction_of_the_machine_is_tested() -> None:
    """Here, or by name in another test."""
    here = {each.name for each in INSTRUCTIONS}
    others = "".join(path.read_text() for path in Path(__file__).parent.glob("[bt]*.py") if path != Path(__file__))
    families = ("ld.", "st.", "wgmma.mma_async", "mma.sync", "ldmatrix", "stmatrix")  # made of widths and shapes
    here |= {f"{name}.of{bits}" for name in here for bits in (32, 64)}  # cvt of a wider register
    untested = [
        name for name in machine.names() if name not in here and name not in others and not name.startswith(families)
    ]
    assert not untested
