"""What the audit compiles for: targets, dtypes, and the launches that the shapes of each op get from its launcher."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from _audit_blocks import Layer, Residual, layers, residuals
from _audit_targets import DTYPES

from mvkernels.ops.former_to_mobile.triton import plan as former_to_mobile
from mvkernels.ops.mobile_to_former.triton import plan as mobile_to_former
from mvkernels.ops.multiscale_linear_attention.triton import plan as multiscale_linear_attention
from mvkernels.ops.relu_linear_attention.triton import plan as relu_linear_attention
from mvkernels.triton.attention import plan as attention
from mvkernels.triton.bridge.plan import BridgeProblem
from mvkernels.triton.configs import Device
from mvkernels.triton.problem import Problem

OPS = ["patch_attention", "window_attention", "mobile_to_former", "former_to_mobile", "relu_linear_attention",
       "multiscale_linear_attention", "patch_transformer_layer", "inverted_residual"]  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One shape of patch_attention or, with ``shift``, of window_attention."""

    heads: int
    d: int
    dv: int
    size: int
    patch: int
    bias: bool
    layout: str
    """``last``: slices of a packed channels-last qkv; ``per_head``: the same, [q|k|v] by head; ``first``; ``odd``:
    channels-last with strides that nothing divides, the slow path; ``one_head``: keys and values that heads share."""
    dtypes: tuple[str, ...]
    shift: int | None = None
    """Where windows of the size ``patch`` begin."""
    partners: int = 0
    """Side of the key and value maps, if it is another."""

    @property
    def op(self) -> str:
        return "patch_attention" if self.shift is None else "window_attention"

    @property
    def queries_and_keys(self) -> tuple[int, int]:
        """Of a group."""
        if self.shift is not None:
            return self.patch**2, self.patch**2
        queries = math.ceil(self.size / self.patch) ** 2
        return queries, self.partners**2 or queries

    def launches(self, batch: int, name: str, device: Device) -> list[Any]:
        forward = attention.forward_launches(problem_of(self, batch, name, device, "q k v"))
        return forward + attention.backward_launches(problem_of(self, batch, name, device, "q k v g"), self.bias)[0]

    def columns(self) -> dict[str, Any]:
        other = f" to {self.partners}x{self.partners}" if self.partners else ""
        return {
            "heads": self.heads, "head_dim": self.d, "value_dim": self.dv, "map": f"{self.size}x{self.size}{other}",
            "patch": f"{self.patch} at {self.shift}" if self.shift else self.patch,
            "tokens": max(self.queries_and_keys), "bias": int(self.bias), "layout": self.layout,
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
        of |= {"q": split, "k": split, "v": split}
        if self.op == "mobile_to_former":
            plan, each = mobile_to_former, ("qx", "gqx")
            of["g"] = dense
        else:
            plan, each = former_to_mobile, ("xkv", "gxkv")
        found: list[Any] = []
        for names, launches in zip(each, (plan.forward_launches, plan.backward_launches), strict=True):
            precision = "tf32" if name == "tf32" else "ieee"
            strides = tuple((letter, of[letter]) for letter in names)
            problem = BridgeProblem(
                (batch, h, d, n, n), strides, DTYPES[name], precision, device, self.op, self.tokens, True
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
            problem = Problem(
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
    biased: bool = False

    op = "multiscale_linear_attention"

    def problem(self, batch: int, name: str, device: Device, names: str, o: str = "last") -> Any:
        """Maps lie with channels last, copied if need be; but for ``o``, the gradient, which is added to any map."""
        groups, d, n = 3 * self.heads, self.d, self.size
        strides = {
            "last": (n * n * groups * d, d, 1, n * groups * d, groups * d),
            "first": (groups * d * n * n, d * n * n, n * n, n, 1),
        }
        return multiscale_linear_attention.ScaleProblem(
            (batch, groups, d, n, n), tuple((each, strides[o if each == "o" else "last"]) for each in names),
            DTYPES[name], "tf32" if name == "tf32" else "ieee", device, self.kernel, (self.biased, self.biased),
        )  # fmt: skip

    def launches(self, batch: int, name: str, device: Device) -> list[Any]:
        forward = multiscale_linear_attention.aggregate_launches(self.problem(batch, name, device, "xo"))
        weights, _ = multiscale_linear_attention.weight_launches(self.problem(batch, name, device, "gx"))
        maps = self.problem(batch, name, device, "eo", self.layout)
        return forward + weights + multiscale_linear_attention.map_launches(maps)

    def columns(self) -> dict[str, Any]:
        return {"heads": self.heads, "head_dim": self.d, "map": f"{self.size}x{self.size}",
                "patch": f"{self.kernel} biased" if self.biased else self.kernel, "layout": self.layout}  # fmt: skip


Every = Case | Bridge | Linear | Multiscale | Layer | Residual


def suite(ops: list[str]) -> list[Every]:
    """The shapes of the ops."""
    every = [*patches(), *windows(), *bridges(), *linears(), *multiscales(), *layers(), *residuals()]
    return [case for case in every if case.op in ops]


def multiscales() -> list[Multiscale]:
    """The scales of EfficientViT and DC-AE, and other kernels and wider heads beyond them."""
    half, both, single = ("bf16",), ("bf16", "fp32"), ("bf16", "fp16", "fp32", "tf32")
    shapes = [(4, 16, 14, 5, "first", both), (4, 16, 14, 5, "last", half), (16, 32, 32, 5, "first", single)]
    shapes += [(16, 32, 32, 5, "last", both), (16, 32, 16, 3, "first", half), (16, 32, 16, 7, "last", half)]
    shapes += [(8, 24, 15, 5, "first", half), (4, 64, 32, 5, "first", both), (4, 64, 32, 5, "last", both)]
    shapes += [(4, 32, 14, 5, "first", ("fp64",))]
    biased = [Multiscale(4, d, 14, 5, "last", single, biased=True) for d in (16, 32, 64)]
    return [Multiscale(*shape) for shape in shapes] + biased


def linears() -> list[Linear]:
    """Maps of EfficientViT, DC-AE and Sana, and wider heads beyond them."""
    half, both, single = ("bf16",), ("bf16", "fp32"), ("bf16", "fp16", "fp32", "tf32")
    shapes = [(8, 16, 14, "first", both), (8, 16, 32, "last", both), (16, 32, 32, "first", single)]
    shapes += [(16, 32, 32, "last", single), (70, 32, 32, "last", half), (32, 32, 16, "first", half)]
    shapes += [(16, 32, 32, "odd", half), (16, 32, 4, "first", half), (16, 32, 4, "last", half)]
    shapes += [(8, 24, 15, "first", both), (4, 64, 32, "first", single), (4, 64, 32, "last", single)]
    shapes += [(4, 64, 4, "first", half), (4, 64, 4, "last", half), (4, 64, 32, "odd", half)]
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
    # Heads that go in pieces.
    wide = ("fp32", "fp64", "tf32")
    shapes += [(256, 7, 6, "first", wide), (120, 14, 40, "last", wide), (256, 7, 50, "last", half)]
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
    cases += [Case(4, d, dv, 28, 2, False, layout, half) for d, dv, layout in ((32, 128, "first"), (24, 96, "last"))]
    cases += [Case(heads, 32, 32, size, 1, True, "first", both) for heads, size in ((12, 14), (24, 7))]
    cases += [Case(heads, 32, 32, size, 1, True, "per_head", half) for heads, size in ((12, 14), (24, 7))]
    cases += [Case(4, 36, 36, 32, 2, False, layout, half) for layout in ("first", "odd")]
    cases += [Case(4, 16, 16, 10, 2, False, "last", both), Case(4, 100, 100, 32, 2, False, "last", half)]
    cases += [Case(4, 128, 128, size, 2, False, "last", half) for size in (8, 16)]
    cases += [Case(4, 128, 128, 64, 2, False, "last", both), Case(4, 256, 256, 8, 2, False, "last", both)]
    cases += [Case(4, 256, 256, 64, 2, False, "last", both)]
    # Between maps of unequal sizes: MobileNetV4's attention to a smaller map, LeViT's downsampling, and a small one.
    cases.append(Case(4, 64, 64, 16, 1, False, "one_head", every, partners=8))
    cases += [Case(8, 16, 64, 7, 1, True, "per_head", every, partners=14)]
    cases += [Case(8, 16, 64, 7, 1, True, layout, half, partners=14) for layout in ("first", "odd")]
    cases += [Case(4, 32, 32, 4, 1, True, "per_head", both, partners=5)]
    return cases


def windows() -> list[Case]:
    """The shapes of Swin, SwinV2, MaxViT and TinyViT, whole windows and clipped ones, and small windows beyond them."""
    every, both, half = ("bf16", "fp16", "fp32", "tf32"), ("bf16", "fp32"), ("bf16",)
    shapes = [(3, 56, 7, 0, "last", both), (3, 56, 7, 3, "last", every), (12, 14, 7, 0, "last", half)]
    shapes += [(12, 14, 7, 3, "last", both), (24, 7, 7, 0, "last", half), (3, 64, 8, 0, "last", half)]
    shapes += [(3, 64, 8, 4, "last", both), (6, 96, 12, 0, "last", half), (6, 96, 12, 6, "last", every)]
    shapes += [(6, 64, 16, 0, "last", both), (6, 64, 16, 8, "last", half), (4, 96, 24, 12, "last", half)]
    shapes += [(4, 28, 7, 0, "per_head", both), (2, 56, 7, 0, "first", half), (2, 56, 7, 3, "first", both)]
    shapes += [(3, 56, 7, 3, "odd", half), (6, 96, 12, 6, "first", half), (6, 64, 16, 8, "odd", half)]
    shapes += [(3, 16, 4, 0, "last", half), (3, 10, 4, 2, "last", both), (3, 10, 5, 2, "first", half)]
    cases = [Case(heads, 32, 32, size, window, True, layout, dtypes, shift)
             for heads, size, window, shift, layout, dtypes in shapes]  # fmt: skip
    return [*cases, *(Case(3, 32, 32, 56, 7, False, "last", both, shift) for shift in (0, 3)),
            Case(3, 64, 64, 56, 7, True, "last", half, 3)]  # fmt: skip


def strides_of(case: Case) -> dict[str, tuple[int, ...]]:
    """Strides (batch, head, channel, y, x) of q, k, v, out and all gradients."""
    h, d, dv, n, m = case.heads, case.d, case.dv, case.size, case.partners or case.size
    if case.layout == "first":
        q, k, v, o = ((h * c * s * s, c * s * s, s * s, s, 1) for c, s in ((d, n), (d, m), (dv, m), (dv, n)))
        return {"q": q, "k": k, "v": v, "g": o, "o": o, "dq": q, "dk": k, "dv": v}

    def last(side: int, channels: int, per_head: int) -> tuple[int, ...]:
        return (side * side * channels, per_head, 1, side * channels, channels)

    odd, by_head, o = int(case.layout == "odd"), case.layout == "per_head", last(n, h * dv, dv)
    each = d + dv if case.partners else 2 * d + dv  # of a head in the map that v is a slice of
    row = h * each + odd
    k, v = last(m, row, each if by_head else d), last(m, row, each if by_head else dv)
    if case.layout == "one_head":  # keys and values that all heads share
        k, v = last(m, d, 0), last(m, dv, 0)
    q = last(n, h * d + odd, d) if case.partners else k
    dense = {"o": o, "dq": last(n, h * d, d), "dk": last(m, h * d, d), "dv": last(m, h * dv, dv)}
    return {"q": q, "k": k, "v": v, "g": o} | dense


def problem_of(case: Case, batch: int, name: str, device: Device, maps: str) -> Any:
    """The launcher's description of a call, with the strides of these maps."""
    dtype = DTYPES[name]
    strides = strides_of(case)
    queries, keys = case.queries_and_keys
    return attention.AttentionProblem(
        (batch, case.heads, case.d, case.size, case.size),
        tuple((map_, strides[map_]) for map_ in maps.split()),
        dtype,
        "tf32" if name == "tf32" else "ieee",
        device,
        case.op,
        case.dv,
        (queries * keys, keys, 1) if case.bias else None,
        dtype.itemsize,
        (case.patch, case.patch),
        None if case.shift is None else (case.shift, case.shift),
        (case.partners, case.partners) if case.partners else None,
    )


def aligned_bytes(case: Every, dtype: torch.dtype) -> int:
    """The largest power of two, at most 16, that divides the runs in which elements of the maps lie side by side.

    Channels of a head in channels-last maps; the whole map of a channel in channels-first ones (a row of it for the
    convolutions), unless groups of pixels take every second; none in maps that are every second column of another.
    """
    columns = case.columns()
    if columns["layout"] == "odd" or (columns["layout"] == "first" and getattr(case, "patch", 1) > 1):
        run = 1
    elif columns["layout"] == "first":
        run = case.size if isinstance(case, Multiscale) else case.size**2
    else:
        run = math.gcd(columns["head_dim"], columns.get("value_dim") or 0)
    return math.gcd(run * dtype.itemsize, 16)
