"""What is executed: every op, at the inputs of ``mvkernels verify`` and at heads too wide for one tile."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from mvkernels import report, testing, verify
from mvkernels.dispatch.backend import can_run
from mvkernels.dispatch.registry import OPS, Op
from tests.ptx import launches, machine, nvcc

DTYPES = {"float32": torch.float32, "tf32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
"""tf32: float32 maps whose products may round."""
More = tuple[str, str, tuple[Any, ...]]
DEVICES = (("sm_90", 132), ("sm_90", 2), ("sm_80", 108), ("sm_80", 2))
"""Architecture and number of processors."""


@dataclass(frozen=True)
class Case:
    """A call, forward and backward, for one device."""

    op: str
    shape: str
    strides: str
    make: Callable[[torch.dtype, str], dict[str, Any]]
    dtype: str = "bfloat16"
    arch: str = "sm_90"
    processors: int = 132
    backend: str = "triton"
    """``cuda``: nvcc's PTX, which is the same for every device; only what is launched may differ."""

    def __str__(self) -> str:
        where = f"{self.arch} {self.processors} processors"
        return f"{self.op} {self.shape} {self.strides} {self.dtype} {where} {self.backend}"


@dataclass(frozen=True)
class Outcome:
    """What a case gave."""

    case: Case
    comparisons: list[testing.Comparison]
    launches: list[launches.Executed]
    seconds: float

    @property
    def worst(self) -> testing.Comparison:
        """The result that is nearest to what is allowed, or furthest beyond."""
        return max(self.comparisons, key=lambda each: each.error / each.allowed)

    @property
    def findings(self) -> list[machine.Finding]:
        return [found for launch in self.launches for found in launch.findings]

    @property
    def faults(self) -> list[str]:
        """All that is wrong, in words; empty if nothing is."""
        wrong = [str(x) for x in self.comparisons if not x.ok]
        return wrong + [f"{launch.kernel}: {found}" for launch in self.launches for found in launch.findings]


def run(case: Case, skewed: bool = False) -> Outcome:
    """Execute the call's kernels and compare the output and all gradients with float64."""
    op = OPS[case.op]
    arguments = case.make(DTYPES[case.dtype], "cpu")
    begin = time.perf_counter()
    with launches.executed(case.arch, case.processors, case.dtype == "tf32", skewed) as log:
        found = testing.check(op, arguments, case.backend)
    return Outcome(case, found, log, time.perf_counter() - begin)


def cases() -> Iterator[Case]:
    """All of those with a GPU's kernel: see :func:`of_op`; each dtype; of Triton a GPU with matrix products of warp
    groups, and one without; and one that is small: there a program has as much to do as a large batch gives it on a
    large one."""
    for op in (OPS[name] for name in report.ops_with(["triton"])):
        for shape, strides, make in of_op(op):
            for dtype in DTYPES:
                for arch, processors in DEVICES:
                    yield Case(op.name, shape, strides, make, dtype, arch, processors)
    if not nvcc.why_not():
        yield from cases_of_nvcc()


def cases_of_nvcc() -> Iterator[Case]:
    """Of those the ones that kernels in CUDA C++ take."""
    for op in (OPS[name] for name in report.ops_with(["cuda"])):
        for shape, strides, make in of_op(op):
            for dtype in DTYPES:
                for arch, processors in DEVICES[:2]:
                    case = Case(op.name, shape, strides, make, dtype, arch, processors, "cuda")
                    if takes(case):
                        yield case


def takes(case: Case) -> bool:
    """Whether the backend can run a case."""
    with launches.executed(case.arch, case.processors, case.dtype == "tf32"):
        return can_run(case.op, case.backend, **case.make(DTYPES[case.dtype], "cpu"))[0]


def of_op(op: Op) -> Iterator[tuple[str, str, verify.Maker]]:
    """(shape, strides, function that makes the arguments): verify's, and MORE."""
    yield from verify.inputs(op, "small")
    for shape, strides, more in MORE.get(op.name, ()):
        yield shape, strides, partial(*more) if callable(more[0]) else partial(_sized, op, strides, *more)


def _sized(
    op: Op, strides: str, sizes: Mapping[int, tuple[int, ...]], dtype: torch.dtype, device: str
) -> dict[str, Any]:
    example = op.suite("small")[0].make()
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: testing.make_map(sizes[5], strides, dtype, device, generator)
        if name in op.maps
        else torch.randn(sizes[4], generator=generator).to(device, dtype)
        for name in testing.tensors_in(example)
    }
    return testing.with_tensors(example, tensors)


def _attention(
    query: tuple[int, ...],
    value: tuple[int, ...],
    strides: str,
    sizes: Mapping[str, Any],
    bias: bool,
    dtype: torch.dtype,
    device: str,
) -> dict[str, Any]:
    """Of a query map and a value map of these shapes; keys and values of one head are those of all."""
    generator = torch.Generator().manual_seed(0)
    heads, partners = query[1], value[3:]
    shapes = query, (*value[:2], query[2], *partners), value
    tensors = (testing.make_map(shape, strides, dtype, device, generator) for shape in shapes)
    named = dict(zip(("query", "key", "value"), (tensor.expand(-1, heads, -1, -1, -1) for tensor in tensors)))
    places = [math.prod(sizes.get("window_size", side)) for side in (query[3:], partners)]
    if bias:
        named["bias"] = torch.randn(heads, *places, generator=generator).to(device, dtype)
    return {**named, **sizes}


def _windows(*shape: int, window: int, shift: int, strides: str = "packed", bias: bool = True) -> More:
    sizes = {"window_size": (window, window), "shift": (shift, shift)}
    name = f"{shape[0]}x{shape[1]} {shape[2]}x{shape[3]} w{window}s{shift}{' bias' if bias else ''}"
    return name, strides, (_attention, (1, *shape), (1, *shape), strides, sizes, bias)


def _unequal(query: tuple[int, ...], value: tuple[int, ...], strides: str, bias: bool) -> More:
    (heads, dim, *size), (_, dv, *partners) = query, value
    sizes = " to ".join(f"{height}x{width}" for height, width in (size, partners))
    name = f"{heads}x{dim}/{dv} {sizes}{' bias' if bias else ''}"
    return name, strides, (_attention, (1, *query), (1, *value), strides, {"patch_size": 1}, bias)


def _block(
    sizes: tuple[int, ...], strides: str, activation: str | None, expands: bool, biases: bool,
    dtype: torch.dtype, device: str,
) -> dict[str, Any]:  # fmt: skip
    """An inverted residual of a map (2, C, H, W), on weights that keep its variance; the residual where it fits."""
    inputs, hidden, outputs, kernel, stride, *size = sizes
    generator = torch.Generator().manual_seed(0)

    def pair(*shape: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        drawn = (
            torch.randn(shape, generator=generator) * math.prod(shape[1:]) ** -0.5,
            torch.randn(shape[0], generator=generator),
        )
        return drawn[0].to(device, dtype), drawn[1].to(device, dtype) if biases else None

    return {
        "x": testing.make_map((2, inputs, *size), strides, dtype, device, generator),
        "expand": pair(hidden, inputs, 1, 1) if expands else None,
        "depthwise": pair(hidden, 1, kernel, kernel),
        "project": pair(outputs, hidden, 1, 1),
        "stride": stride,
        "activation": activation,
        "residual": stride == 1 and inputs == outputs,
    }


def _residual(
    *sizes: int, strides: str = "channels_last", activation: str | None = "silu", expands: bool = True,
    biases: bool = True,
) -> More:  # fmt: skip
    channels, (kernel, stride, height, width) = "-".join(map(str, sizes[:3])), sizes[3:]
    name = f"{channels} {height}x{width} k{kernel}s{stride}{'' if expands else ' alone'}"
    return name, strides, (_block, sizes, strides, activation, expands, biases)


def _biased(heads: int, dim: int, kernel: int, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """A scale of multiscale_linear_attention whose convolutions have biases."""
    generator = torch.Generator().manual_seed(0)
    channels = 3 * heads * dim
    drawn = {
        "depthwise": torch.randn(channels, 1, kernel, kernel, generator=generator) / kernel,
        "pointwise": torch.randn(channels, dim, 1, 1, generator=generator) * dim**-0.5,
        "depthwise_bias": torch.randn(channels, generator=generator),
        "pointwise_bias": torch.randn(channels, generator=generator),
    }
    qkv = testing.make_map((2, channels, 7, 9), "channels_last", dtype, device, generator)
    return {"qkv": qkv, "head_dim": dim} | {name: (each.to(device, dtype),) for name, each in drawn.items()}


def _layer(size: tuple[int, int], dtype: torch.dtype, device: str) -> dict[str, Any]:
    """MobileViT-S's first one, on a map of this size."""
    case = next(each for each in OPS["patch_transformer_layer"].suite("full") if each.shape["channels"] == 144)
    generator = torch.Generator().manual_seed(0)
    return case.make(1, dtype, device) | {
        "x": testing.make_map((1, 144, *size), "channels_last", dtype, device, generator)
    }


_WIDE = ("2x256 7x7", "contiguous", ({5: (1, 2, 256, 7, 7), 4: (1, 2, 6, 256)},))
# As many maps as a small GPU has processors, and more: one stays in one program, several tiles.
_ALONE = ("2x12 20x17", "channels_last", ({5: (4, 2, 12, 20, 17), 4: (4, 2, 6, 12)},))
# Tokens and channels that fill no tile.
_MANY = ("2x96 7x7 m17", "channels_last", ({5: (1, 2, 96, 7, 7), 4: (1, 2, 17, 96)},))
MORE: dict[str, tuple[More, ...]] = {
    "patch_attention": (
        ("2x36 21x19", "packed", ({5: (1, 2, 36, 21, 19)},)),
        _unequal((4, 64, 16, 16), (1, 64, 8, 8), "channels_last", bias=False),
        _unequal((2, 16, 7, 7), (2, 64, 14, 14), "packed", bias=True),
        _unequal((2, 32, 8, 16), (2, 32, 8, 8), "packed", bias=True),
        _unequal((2, 32, 7, 8), (1, 32, 3, 3), "packed", bias=True),
        _unequal((2, 20, 4, 5), (2, 20, 3, 3), "transposed", bias=True),
    ),
    "window_attention": (
        _windows(2, 20, 9, 10, window=4, shift=2),
        _windows(2, 20, 8, 12, window=4, shift=0, bias=False),
        _windows(2, 32, 8, 16, window=8, shift=0),
        _windows(2, 32, 16, 32, window=16, shift=0),
        _windows(1, 36, 24, 12, window=12, shift=0, strides="transposed", bias=False),
        _windows(2, 32, 8, 9, window=5, shift=0, strides="transposed", bias=False),
        _windows(2, 32, 16, 13, window=8, shift=3, strides="contiguous", bias=False),
        _windows(2, 32, 13, 14, window=12, shift=6),
        _windows(1, 36, 20, 17, window=16, shift=5, strides="transposed"),
    ),
    "multiscale_linear_attention": tuple(
        (f"2x{dim} 7x9 k{kernel}, biases", "channels_last", (_biased, 2, dim, kernel))
        for dim, kernel in ((16, 3), (32, 5), (64, 3))
    ),
    # On a small GPU enough rows for the largest blocks, and one more.
    "patch_transformer_layer": (("4x36 19x27", "channels_last", (_layer, (19, 27))),),
    "mobile_to_former": (_WIDE, _ALONE),
    "former_to_mobile": (_WIDE, _ALONE, _MANY),
    "inverted_residual": (
        _residual(48, 80, 24, 3, 2, 13, 11),
        _residual(24, 40, 72, 3, 1, 6, 9, activation="hardswish"),
        _residual(80, 48, 80, 3, 1, 7, 5, activation="relu6", biases=False),
        _residual(32, 72, 20, 5, 1, 9, 8, activation="gelu"),
        _residual(136, 40, 24, 5, 2, 9, 7, activation="gelu_tanh"),
        _residual(40, 40, 40, 3, 1, 9, 10, activation="relu", expands=False),
        _residual(20, 20, 36, 3, 2, 8, 7, strides="contiguous", expands=False, biases=False),
        _residual(24, 40, 24, 7, 1, 7, 6, strides="sliced", activation=None),
    ),
}
"""Groups of unequal sizes with more tokens than one tile; maps of unequal sizes; small, large and clipped windows;
heads too wide for one tile; inverted residuals of each kind: (name, strides of the maps, sizes of maps and of tokens by
their number of dimensions, or what makes the arguments)."""


FEW = {
    "patch_attention": (
        "4x36 9x7",
        "4x36 3x17",
        "4x48_16x16",
        "2x36 21x19",
        "8x32/128 7x7",
        "to 8x8",
        "to 14x14",
        "4x5 to 3x3",
        "7x8 to 3x3",
    ),
    "window_attention": ("3x32 9x7", "14x14_w7s3", "8x16 w8", "9x10 w4s2", "13x14 w12s6"),
    "mobile_to_former": ("2x24_14x14_m3", "2x6 9x7", "2x256", "2x12 20x17"),
    "former_to_mobile": ("2x6 9x7", "2x24_14x14_m3", "2x256", "2x12 20x17"),
    "relu_linear_attention": ("8x16 9x7", "8x16_14x14", "8x16 8x8, batch 2 sliced"),
    "multiscale_linear_attention": ("4x16 9x7", "4x16_14x14", "4x16 8x8, batch 2 offset", "2x32 7x9", "2x64 7x9"),
    "patch_transformer_layer": ("4x16 9x7", "4x20_16x16", "4x24_8x8", "4x16_32x32", "4x36 19x27"),
    "inverted_residual": (
        "16-32-16 9x7",
        "k3s2",
        "24-40-72",
        "80-48-80",
        "32-72-20",
        "136-40-24",
        "40 9x10",
        "20-20-36",
        "k7s1",
    ),
}
"""Shapes that are run at every commit: together they launch each kernel."""


def selection() -> Iterator[Case]:
    """What is run at every commit: each of FEW in each dtype, on the devices in turn."""
    for op, shapes in FEW.items():
        every = list(of_op(OPS[op]))
        for index, wanted in enumerate(shapes):
            shape, strides, make = next(each for each in every if wanted in f"{each[0]} {each[1]}")
            for number, dtype in enumerate(DTYPES):
                yield Case(op, shape, strides, make, dtype, *DEVICES[(index + number) % 2])
            for number in (0, 1):
                yield Case(op, shape, strides, make, list(DTYPES)[(2 * index + number) % 4], *DEVICES[2 + number])


def rows(outcome: Outcome) -> Iterator[dict[str, Any]]:
    """A row for each kernel of a case: what was compared, found and counted."""
    case, worst = outcome.case, outcome.worst
    by_kernel: dict[str, list[launches.Executed]] = {}
    for launch in outcome.launches:
        by_kernel.setdefault(launch.kernel, []).append(launch)
    for kernel, several in by_kernel.items():
        found = [finding for launch in several for finding in launch.findings]
        yield {
            "op": case.op, "backend": case.backend, "kernel": kernel, "shape": case.shape, "strides": case.strides,
            "dtype": case.dtype, "arch": case.arch, "processors": case.processors,
            "worst": worst.name, "error": f"{worst.error:.3e}", "allowed": f"{worst.allowed:.3e}", "ok": worst.ok,
            "races": sum(each.kind.startswith("race") for each in found), "findings": len(found),
            "launches": len(several), "threads": several[0].threads,
            "blocks": sum(launch.blocks for launch in several),
            "instructions": sum(sum(launch.counters.issued) for launch in several),
            **{name: sum(getattr(launch.counters, name) for launch in several) for name in COUNTED},
        }  # fmt: skip


COUNTED = ("matrix_flops", "global_requests", "global_sectors", "global_bytes", "shared_requests", "conflicts")
