"""What each instruction that works on a lane alone makes of its operands, in NumPy and in Python's integers."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.ptx.assembly import Array

THREADS = 256
TYPES: dict[str, Any] = {
    "s16": np.int16, "u16": np.uint16, "b16": np.uint16, "s32": np.int32, "u32": np.uint32, "b32": np.uint32,
    "s64": np.int64, "u64": np.uint64, "b64": np.uint64, "f32": np.float32, "f64": np.float64, "f16": np.float16,
    "bf16": np.uint16, "bf16x2": np.uint32, "f16x2": np.uint32, "tf32": np.uint32,
}  # fmt: skip
Formula = Callable[..., Array]


def from_bf16(x: Array) -> Array:
    return (x.astype(np.uint32) << 16).view(np.float32)


def to_bf16(x: Array) -> Array:
    """Nearest of the floats whose low half is zero; of two as near, that with the even last bit."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    low, high = bits & 0xFFFF, bits >> 16
    up = (low > 0x8000) | ((low == 0x8000) & (high & 1 == 1))
    return np.where(np.isnan(x), 0x7FFF, high + up).astype(np.uint16)


def halves(x: Array, kind: str) -> Array:
    """(n, 2) float32 of packed halves."""
    pairs = np.ascontiguousarray(x).view(np.uint16).reshape(-1, 2)
    return from_bf16(pairs) if kind.startswith("bf16") else pairs.view(np.float16).astype(np.float32)


def packed(x: Array, kind: str) -> Array:
    with np.errstate(over="ignore"):
        bits = to_bf16(x) if kind.startswith("bf16") else x.astype(np.float16).view(np.uint16)
    return np.ascontiguousarray(bits).view(np.uint32).reshape(-1)


def values(kind: str, seed: int) -> Array:
    """Random bits and, in floats, values near one; zeros, ones, extremes, infinities and NaN."""
    random = np.random.default_rng(seed)
    dtype = np.dtype(TYPES[kind])
    bits = random.integers(0, 256, THREADS * dtype.itemsize, dtype=np.uint8).view(dtype).copy()
    if dtype.kind == "f":
        bits[64:] = random.standard_normal(THREADS - 64).astype(dtype)
        special = [0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, np.finfo(dtype).tiny, np.finfo(dtype).max]
    elif kind.startswith("bf16"):
        near = to_bf16(random.standard_normal(THREADS * dtype.itemsize // 2).astype(np.float32)).view(dtype)
        bits[64:] = near[64:]
        special = [0, 0x3F80, 0x7F80, 0xFF80, 0x7FC0]
    else:
        small = random.integers(-9, 9, THREADS)
        bits[128:] = small[128:].astype(dtype) if dtype.kind == "i" else small[128:].astype(np.int64).astype(dtype)
        special = [0, 1, np.iinfo(dtype).max, np.iinfo(dtype).min, np.iinfo(dtype).max // 2]
    places = random.permutation(THREADS)[: 2 * len(special)]
    bits[places] = np.array(special * 2, dtype=dtype)
    return bits


class Instruction:
    """One of them: name, kinds of the operands and of the result, formula; ``error``: relative, if not exact."""

    def __init__(self, name: str, kinds: str, out: str, formula: Formula, error: float = 0.0):
        self.name, self.kinds, self.out, self.formula, self.error = name, tuple(kinds.split()), out, formula, error

    def __repr__(self) -> str:
        return self.name


def wrapped(formula: Formula, kind: str) -> Formula:
    """A formula on Python's integers, cut to the width."""

    def of(*operands: Array) -> Array:
        width = np.dtype(TYPES[kind]).itemsize * 8
        found = [int(formula(*map(int, each))) & ((1 << width) - 1) for each in zip(*operands, strict=True)]
        return np.array(found, dtype=f"u{width // 8}").view(TYPES[kind])

    return of


def quotient(a: int, b: int) -> int:
    return -1 if b == 0 else abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def integers() -> list[Instruction]:
    found = []
    for kind in ("s16", "u16", "s32", "u32", "s64", "u64"):
        two, three = f"{kind} {kind}", f"{kind} {kind} {kind}"
        of = lambda formula, kind=kind: wrapped(formula, kind)  # noqa: E731
        width = int(kind[1:])
        found += [
            Instruction(f"add.{kind}", two, kind, of(operator.add)),
            Instruction(f"sub.{kind}", two, kind, of(operator.sub)),
            Instruction(f"mul.lo.{kind}", two, kind, of(operator.mul)),
            Instruction(f"mul.hi.{kind}", two, kind, of(lambda a, b, w=width: a * b >> w)),
            Instruction(f"mad.lo.{kind}", three, kind, of(lambda a, b, c: a * b + c)),
            Instruction(f"div.{kind}", two, kind, of(quotient)),
            Instruction(f"rem.{kind}", two, kind, of(lambda a, b: a if b == 0 else a - quotient(a, b) * b)),
            Instruction(f"max.{kind}", two, kind, of(max)),
            Instruction(f"min.{kind}", two, kind, of(min)),
            Instruction(f"shr.{kind}", f"{kind} u32", kind, of(lambda a, b: a >> min(b, 200))),
        ]
        if kind[0] == "s":
            found += [Instruction(f"neg.{kind}", kind, kind, of(operator.neg))]
            found += [Instruction(f"abs.{kind}", kind, kind, of(abs))]
        if width < 64:
            wide = f"{kind[0]}{2 * width}"
            found += [
                Instruction(f"mul.wide.{kind}", two, wide, wrapped(operator.mul, wide)),
                Instruction(f"mad.wide.{kind}", f"{two} {wide}", wide, wrapped(lambda a, b, c: a * b + c, wide)),
            ]
    for kind in ("b16", "b32", "b64"):
        two = f"{kind} {kind}"
        of = lambda formula, kind=kind: wrapped(formula, kind)  # noqa: E731
        found += [
            Instruction(f"and.{kind}", two, kind, of(operator.and_)),
            Instruction(f"or.{kind}", two, kind, of(operator.or_)),
            Instruction(f"xor.{kind}", two, kind, of(operator.xor)),
            Instruction(f"not.{kind}", kind, kind, of(operator.invert)),
            Instruction(f"shl.{kind}", f"{kind} u32", kind, of(lambda a, b: a << min(b, 200))),
            Instruction(f"shr.{kind}", f"{kind} u32", kind, of(lambda a, b: a >> min(b, 200))),
        ]
    return found


def bit_field(a: int, b: int, c: int, signed: bool, width: int) -> int:
    """PTX ISA, bfe: the field's bits below ``width``; above them the sign, which is that of the field's highest bit or
    of the word's."""
    position, length = b & 255, c & 255
    sign = signed and length > 0 and a >> min(position + length - 1, width - 1) & 1
    bits = [(a >> position + i & 1 if position + i < width else sign) if i < length else sign for i in range(width)]
    return sum(int(bit) << i for i, bit in enumerate(bits))


def inserted(a: int, b: int, c: int, d: int) -> int:
    """PTX ISA, bfi: b, but the bits of the field are the low ones of a."""
    position, length = c & 255, d & 255
    bits = [a >> i - position & 1 if position <= i < position + length else b >> i & 1 for i in range(32)]
    return sum(bit << i for i, bit in enumerate(bits))


def permuted(a: int, b: int, c: int) -> int:
    both = a.to_bytes(4, "little") + b.to_bytes(4, "little")
    found = []
    for i in range(4):
        select = c >> 4 * i & 15
        byte = both[select & 7]
        found.append((255 if byte & 128 else 0) if select & 8 else byte)
    return int.from_bytes(bytes(found), "little")


def oddities() -> list[Instruction]:
    return [
        *(
            Instruction(
                f"bfe.{sign}{width}",
                f"{sign}{width} u32 u32",
                f"{sign}{width}",
                wrapped(
                    lambda a, b, c, sign=sign, width=width: bit_field(a & (1 << width) - 1, b, c, sign == "s", width),
                    f"{sign}{width}",
                ),
            )
            for sign in "us"
            for width in (32, 64)
        ),
        Instruction("bfi.b32", "b32 b32 u32 u32", "b32", wrapped(inserted, "b32")),
        Instruction("prmt.b32", "b32 b32 b32", "b32", wrapped(permuted, "b32")),
    ]


def floats() -> list[Instruction]:
    found = []
    for kind in ("f32", "f64"):
        two = f"{kind} {kind}"
        for mode in ("", ".rn"):
            found += [
                Instruction(f"add{mode}.{kind}", two, kind, operator.add),
                Instruction(f"sub{mode}.{kind}", two, kind, operator.sub),
                Instruction(f"mul{mode}.{kind}", two, kind, operator.mul),
            ]
        found += [
            Instruction(f"fma.rn.{kind}", f"{two} {kind}", kind, fma),
            Instruction(f"div.rn.{kind}", two, kind, operator.truediv),
            Instruction(f"sqrt.rn.{kind}", kind, kind, np.sqrt),
            Instruction(f"rcp.rn.{kind}", kind, kind, lambda a: (1 / a).astype(a.dtype)),
            Instruction(f"max.{kind}", two, kind, lambda a, b: largest(a, b, np.fmax)),
            Instruction(f"min.{kind}", two, kind, lambda a, b: -largest(-a, -b, np.fmax)),
            Instruction(f"neg.{kind}", kind, kind, operator.neg),
            Instruction(f"abs.{kind}", kind, kind, np.abs),
        ]
    found.append(Instruction("max.NaN.f32", "f32 f32", "f32", lambda a, b: largest(a, b, np.maximum)))
    found.append(Instruction("min.NaN.f32", "f32 f32", "f32", lambda a, b: -largest(-a, -b, np.maximum)))
    approximations: dict[str, tuple[str, Formula, float]] = {
        "ex2.approx": ("f32", np.exp2, 2**-22),
        "lg2.approx": ("f32", np.log2, 2**-21),
        "rcp.approx": ("f32", lambda a: 1 / a, 2**-22),
        "rsqrt.approx": ("f32", lambda a: 1 / np.sqrt(a), 2**-22),
        "div.full": ("f32 f32", operator.truediv, 2**-21),
    }
    for name, (kinds, formula, error) in approximations.items():
        plain = lambda *x, f=formula: f(*[each.astype("f8") for each in x]).astype("f4")  # noqa: E731
        found.append(Instruction(f"{name}.f32", kinds, "f32", plain, error))
        ftz = lambda *x, f=plain: flushed(f(*map(flushed, x)))  # noqa: E731
        found.append(Instruction(f"{name}.ftz.f32", kinds, "f32", ftz, error))
    found.append(Instruction("abs.ftz.f32", "f32", "f32", lambda a: np.abs(flushed(a))))
    found.append(
        Instruction("fma.rn.ftz.f32", "f32 f32 f32", "f32", lambda a, b, c: flushed(fma(*map(flushed, (a, b, c)))))
    )
    return found


def largest(a: Array, b: Array, f: Formula) -> Array:
    """Of two zeros that without the sign."""
    return np.where((a == 0) & (b == 0), np.where(np.signbit(a) & np.signbit(b), a, np.abs(a)), f(a, b)).astype(a.dtype)


def flushed(x: Array) -> Array:
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(0, x), x).astype(x.dtype)


def fma(a: Array, b: Array, c: Array) -> Array:
    """Of float32 by float64, of float64 by the C library."""
    if a.dtype == np.float32:
        exact = a.astype(np.longdouble) * b + c.astype(np.longdouble)
        return exact.astype(np.float32)
    return (a.astype(np.longdouble) * b + c).astype(np.float64)


def half_types() -> list[Instruction]:
    found = []
    for kind in ("bf16", "f16"):
        pair = f"{kind}x2"
        names: dict[str, Formula] = {
            "add": operator.add, "sub": operator.sub, "mul": operator.mul,
            "max": lambda a, b: largest(a, b, np.fmax), "max.NaN": lambda a, b: largest(a, b, np.maximum),
        }  # fmt: skip
        for name, formula in names.items():
            found.append(Instruction(f"{name}.{pair}", f"{pair} {pair}", pair, by_halves(formula, pair)))
            found.append(Instruction(f"{name}.{kind}", f"{kind} {kind}", kind, by_halves(formula, kind)))
        found.append(
            Instruction(f"min.{kind}", f"{kind} {kind}", kind, by_halves(lambda a, b: -largest(-a, -b, np.fmax), kind))
        )
    return found


def by_halves(formula: Formula, kind: str) -> Formula:
    def of(*operands: Array) -> Array:
        if kind.endswith("x2"):
            return packed(formula(*[halves(each, kind) for each in operands]), kind)
        if kind == "bf16":
            return to_bf16(formula(*[from_bf16(each) for each in operands]).astype(np.float32))
        return formula(*[each.astype(np.float32) for each in operands]).astype(np.float16)

    return of


COMPARISONS: dict[str, Formula] = {
    "eq": operator.eq, "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge,
}  # fmt: skip


def unordered(a: Array, b: Array) -> Array:
    return np.isnan(a) | np.isnan(b)


def comparisons() -> list[Instruction]:
    found = []
    kinds = ("b16", "b32", "b64", "s16", "u16", "s32", "u32", "s64", "u64", "f32", "f64", "f16", "bf16")
    for kind in kinds:
        as_float: Formula = from_bf16 if kind == "bf16" else np.asarray
        known: dict[str, Formula] = dict(COMPARISONS)
        if "f" in kind:
            # The plain ones are false where one is NaN, those with a u are true.
            known |= {f"{name}u": lambda a, b, f=f: f(a, b) | unordered(a, b) for name, f in COMPARISONS.items()}
            known |= {"ne": lambda a, b: (a != b) & ~unordered(a, b), "neu": operator.ne, "nan": unordered}
            known |= {"num": lambda a, b: ~unordered(a, b)}
        else:
            known["ne"] = operator.ne
        if kind in ("b16", "b32", "b64"):
            known = {name: known[name] for name in ("eq", "ne")}
        for name, f in known.items():
            one = lambda a, b, f=f, g=as_float: f(g(a), g(b)).astype(np.uint32)  # noqa: E731
            found.append(Instruction(f"setp.{name}.{kind}", f"{kind} {kind}", "pred", one))
            if kind in ("f16", "bf16"):
                pair = f"{kind}x2"
                both = lambda a, b, f=f, p=pair: f(halves(a, p), halves(b, p)) @ np.array([1, 2], np.uint32)  # noqa: E731
                found.append(Instruction(f"setp.{name}.{pair}", f"{pair} {pair}", "pred2", both))
    return found


def moves() -> list[Instruction]:
    found = []
    for kind in ("b16", "b32", "b64", "u16", "u32", "u64", "s16", "s32", "s64", "f32", "f64"):
        found.append(Instruction(f"mov.{kind}", kind, kind, np.copy))
        found.append(Instruction(f"selp.{kind}", f"{kind} {kind} pred", kind, lambda a, b, c: np.where(c != 0, a, b)))
    for name, f in {"and": operator.and_, "or": operator.or_, "xor": operator.xor}.items():
        both = lambda a, b, f=f: f(a != 0, b != 0).astype(np.uint32)  # noqa: E731
        found.append(Instruction(f"{name}.pred", "pred pred", "pred", both))
    found.append(Instruction("not.pred", "pred", "pred", lambda a: (a == 0).astype(np.uint32)))
    found.append(Instruction("mov.pred", "pred", "pred", lambda a: (a != 0).astype(np.uint32)))
    return found


def conversions() -> list[Instruction]:
    found = []
    kinds = ("s16", "u16", "s32", "u32", "s64", "u64")
    for kind in kinds:
        for to in kinds:
            if kind != to:
                found.append(Instruction(f"cvt.{to}.{kind}", kind, to, lambda a, to=to: a.astype(TYPES[to])))
        found.append(Instruction(f"cvt.rn.f32.{kind}", kind, "f32", lambda a: a.astype(np.float32)))
        found.append(Instruction(f"cvt.rn.f64.{kind}", kind, "f64", lambda a: a.astype(np.float64)))
        for of in ("f32", "f64"):
            found.append(Instruction(f"cvt.rzi.{kind}.{of}", of, kind, lambda a, k=kind: to_integer(np.trunc(a), k)))
        found.append(Instruction(f"cvt.rni.{kind}.f32", "f32", kind, lambda a, k=kind: to_integer(np.rint(a), k)))
    found += [
        Instruction("cvt.f32.bf16", "bf16", "f32", from_bf16),
        Instruction("cvt.f32.f16", "f16", "f32", lambda a: a.astype(np.float32)),
        Instruction("cvt.rn.bf16.f32", "f32", "bf16", to_bf16),
        Instruction("cvt.rn.f16.f32", "f32", "f16", lambda a: a.astype(np.float16)),
        Instruction("cvt.rn.bf16x2.f32", "f32 f32", "bf16x2", lambda a, b: packed(np.stack([b, a], 1), "bf16")),
        Instruction("cvt.rn.f16x2.f32", "f32 f32", "f16x2", lambda a, b: packed(np.stack([b, a], 1), "f16")),
        Instruction("cvt.f64.f32", "f32", "f64", lambda a: a.astype(np.float64)),
        Instruction("cvt.rn.f32.f64", "f64", "f32", lambda a: a.astype(np.float32)),
        Instruction("cvt.rna.tf32.f32", "f32", "tf32", to_tf32),
    ]
    return found


def to_integer(x: Array, kind: str) -> Array:
    """The nearest that there is; NaN is zero, or the highest bit where one side has 64 bits."""
    info = np.iinfo(TYPES[kind])
    nan = 0 if max(info.bits, 8 * x.itemsize) < 64 else info.min if info.min < 0 else 1 << info.bits - 1
    found = [nan if np.isnan(v) else info.max if v >= info.max else info.min if v <= info.min else int(v) for v in x]
    return np.array(found, TYPES[kind])


def to_tf32(x: Array) -> Array:
    """Nearest with ten bits after the point, away from zero of two as near."""
    _, exponent = np.frexp(x.astype(np.float64))
    # In units of the last of eleven bits; a subnormal has no more bits than its exponent leaves.
    unit = np.exp2(np.maximum(exponent, -125) - 11.0)
    with np.errstate(all="ignore"):
        away = np.copysign(np.floor(np.abs(x.astype(np.float64)) / unit + 0.5) * unit, x).astype(np.float32)
    return np.where(np.isfinite(x), away, x).astype(np.float32).view(np.uint32)


INSTRUCTIONS = [
    *integers(), *oddities(), *floats(), *half_types(), *comparisons(), *moves(), *conversions(),
]  # fmt: skip
