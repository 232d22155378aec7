"""Calls of patch_attention and window_attention that the CUDA C++ kernels are held to float64 at."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib import import_module
from itertools import chain
from typing import Any

import torch

from mvkernels import testing
from mvkernels.cuda.attention import plan
from mvkernels.dispatch.registry import OPS
from tests.ptx import launches

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32, "tf32": torch.float32}


@dataclass(frozen=True)
class Case:
    """A call on maps (batch, heads, d or dv, height, width)."""

    heads: int
    d: int
    size: tuple[int, int]
    group: tuple[int, int]
    shift: tuple[int, int] | None = None
    """Of windows; without it groups are patches."""
    strides: str = "packed"
    bias: bool = False
    dv: int = 0
    batch: int = 1
    scale: float | None = None
    change: Callable[[dict[str, Any]], None] | None = field(default=None, compare=False)
    """What is done to the arguments."""

    @property
    def op(self) -> str:
        return "patch_attention" if self.shift is None else "window_attention"

    def __str__(self) -> str:
        of = f"p{self.group[0]}x{self.group[1]}"
        if self.shift is not None:
            of = f"w{self.group[0]}x{self.group[1]}s{self.shift[0]}x{self.shift[1]}"
        height, width = self.size
        dv = f"/{self.dv}" if self.dv else ""
        return f"{self.heads}x{self.d}{dv} {height}x{width} {of} {self.strides}{' bias' if self.bias else ''}"

    def arguments(self, dtype: torch.dtype) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(0)
        shape = (self.batch, self.heads, self.d, *self.size)
        value = (self.batch, self.heads, self.dv or self.d, *self.size)
        made = {
            name: testing.make_map(each, self.strides, dtype, "cpu", generator)
            for name, each in (("query", shape), ("key", shape), ("value", value))
        }
        named: dict[str, Any] = {**made, "scale": self.scale}
        if self.shift is None:
            named["patch_size"] = self.group
            tokens = math.prod(-(-size // step) for size, step in zip(self.size, self.group))
        else:
            named["window_size"], named["shift"] = self.group, self.shift
            tokens = math.prod(self.group)
        if self.bias:
            named["bias"] = torch.randn(self.heads, tokens, tokens, generator=generator).to(dtype)
        if self.change is not None:
            self.change(named)
        return named


def laid(cotangent: torch.Tensor, strides: str) -> torch.Tensor:
    """With strides that fit those of the other maps."""
    if strides in ("channels_last", "packed"):
        return cotangent.permute(0, 3, 4, 1, 2).contiguous().permute(0, 3, 4, 1, 2)
    if strides == "sliced":
        return testing.make_map(tuple(cotangent.shape), strides, cotangent.dtype).copy_(cotangent)
    return cotangent


def run(
    case: Case, kind: str, **options: Any
) -> tuple[list[testing.Comparison], list[launches.Executed], dict[str, torch.Tensor]]:
    """(comparisons with float64, launches, results): the output and all gradients, on memory filled with NaN."""
    return run_op(case.op, case.arguments(DTYPES[kind]), kind, case.strides, **options)


def run_op(
    name: str, given: dict[str, Any], kind: str, strides: str, **options: Any
) -> tuple[list[testing.Comparison], list[launches.Executed], dict[str, torch.Tensor]]:
    """As :func:`run`, of an op's arguments."""
    arguments = testing.normalised(OPS[name], given)
    wanted = list(testing.tensors_in(arguments))
    with launches.executed(tf32=kind == "tf32", **options) as log:
        held, cotangent = testing.yardstick(OPS[name], arguments, wanted)
        grad = laid(cotangent, strides)
        launcher = import_module(f"mvkernels.ops.{name}.cuda.launcher")
        maps = [arguments[name] for name in ("query", "key", "value")]
        groups = chain(*(arguments[name] for name in ("patch_size", "window_size", "shift") if name in arguments))
        scale = maps[0].shape[2] ** -0.5 if arguments["scale"] is None else arguments["scale"]
        settings = (*maps, *groups, arguments["bias"], scale)
        found = {"out": launcher.forward(*settings)}
        grads = launcher.backward(grad, *settings, "bias" in wanted)
        found |= {f"d{name}": each for name, each in zip(wanted, grads)}
        return held.compare(found), log, found


def faults(case: Case, kind: str, **options: Any) -> list[str]:
    """All that is wrong, in words; empty if nothing is."""
    comparisons, log, _ = run(case, kind, **options)
    return wrong(comparisons, log)


def wrong(comparisons: list[testing.Comparison], log: list[launches.Executed]) -> list[str]:
    assert {each.kernel.split("_")[1] for each in log} >= {"forward", "backward"}
    found = [str(each) for each in comparisons if not each.ok]
    return found + [f"{launch.kernel}: {fault}" for launch in log for fault in launch.findings]


def reason(case: Case, kind: str, arch: str = "sm_90") -> str | None:
    """Why the kernels decline a case, or None."""
    shape = (case.batch, case.heads, case.d, *case.size)
    return plan.why_not(shape, case.dv or case.d, DTYPES[kind], case.group, case.shift, not case.bias, arch)


FEW = (
    Case(2, 36, (9, 7), (2, 2), batch=2),
    Case(1, 36, (32, 32), (2, 2), strides="channels_last"),
    Case(3, 20, (5, 8), (1, 1), strides="contiguous", dv=24),
    Case(1, 64, (3, 17), (1, 1), strides="offset", bias=True),
    Case(2, 16, (21, 19), (2, 2)),
    Case(1, 44, (12, 9), (3, 2), strides="sliced"),
    Case(2, 32, (14, 14), (7, 7), (3, 3), bias=True),
    Case(1, 52, (9, 10), (4, 4), (2, 2), strides="transposed", bias=True),
    Case(5, 16, (8, 8), (4, 4), (0, 0), strides="channels_last"),
    Case(1, 28, (24, 12), (12, 12), (0, 0), strides="contiguous"),
    Case(2, 48, (13, 14), (12, 12), (6, 6), strides="expanded"),
    Case(3, 60, (2, 1), (1, 1), dv=64),
    Case(1, 48, (16, 16), (2, 2), strides="channels_last"),
    Case(2, 40, (12, 16), (8, 8), (4, 4), strides="channels_last", bias=True),
    Case(1, 24, (10, 10), (5, 5), (0, 0), strides="channels_last", bias=True),
    Case(2, 32, (12, 20), (12, 12), (0, 6), strides="channels_last", bias=True),
    Case(1, 16, (16, 16), (16, 16), (0, 0), strides="packed", batch=2),
)
"""Run in each dtype: each number of channels, of warps of a unit and of units of a block; each way to move a row."""


def _pixel(value: float) -> Callable[[dict[str, Any]], None]:
    def change(arguments: dict[str, Any]) -> None:
        for name in ("query", "key", "value"):
            arguments[name] = arguments[name].clone()
            arguments[name][0, 0, 3, 1, 2] = value

    return change


def peaked(arguments: dict[str, Any]) -> None:
    arguments["query"] = arguments["query"] * 200


def _constant(arguments: dict[str, Any]) -> None:
    arguments["key"] = torch.full_like(arguments["key"], 1.5)
    arguments["value"] = torch.full_like(arguments["value"], -0.75)


def _row_without_weight(arguments: dict[str, Any]) -> None:
    arguments["bias"][0, 2] = -math.inf
    arguments["bias"][0, :, 5] = -math.inf


def _rising(arguments: dict[str, Any]) -> None:
    # Of the rows of a map the last has keys whose weights pass 2^15 where the first ones give the maximum.
    arguments["key"] = arguments["key"].clone()
    arguments["key"][..., -1, :] *= 40


def _beyond_the_smallest(arguments: dict[str, Any]) -> None:
    # Of one query the scores with the first 64 keys are -inf in float32, all others are 0.
    query, key = (torch.zeros_like(arguments[name]) for name in ("query", "key"))
    query[:, :, 0, 0, 0] = 2.0**83
    key[:, :, 0, :4] = -(2.0**83)
    arguments |= {"query": query, "key": key}


_MANY = Case(1, 24, (16, 16), (1, 1), strides="channels_last")
_SMALL = Case(2, 36, (9, 7), (2, 2), batch=2)
_WINDOWS = Case(2, 32, (9, 10), (4, 4), (2, 2), bias=True)
_SWIN = Case(2, 32, (14, 14), (7, 7), (3, 3), strides="channels_last", bias=True)
ODD = {
    "nan in patches": replace(_SMALL, change=_pixel(math.nan)),
    "inf in patches": replace(_SMALL, change=_pixel(math.inf)),
    "nan in windows": replace(_WINDOWS, change=_pixel(math.nan)),
    "peaked": replace(_SMALL, change=peaked),
    "peaked, many keys": Case(1, 36, (32, 32), (2, 2), change=peaked),
    "peaked, many keys in whole rows": replace(_MANY, change=peaked),
    "nan in many keys": replace(_MANY, change=_pixel(math.nan)),
    "inf in many keys": replace(_MANY, change=_pixel(math.inf)),
    "constant, many keys": replace(_MANY, change=_constant),
    "later keys much higher": replace(_MANY, change=_rising),
    "first keys of -inf": replace(_MANY, change=_beyond_the_smallest),
    "constant": replace(_SMALL, change=_constant),
    "high scores": Case(1, 32, (8, 16), (8, 8), (0, 0), scale=3000 * 32**-0.5),
    "a row of -inf": replace(_WINDOWS, change=_row_without_weight),
    "negative scale": replace(_SMALL, scale=-0.3),
    "scale 0": replace(_WINDOWS, scale=0.0),
    "nan in whole rows": replace(_SWIN, change=_pixel(math.nan)),
    "inf in whole rows": replace(_SWIN, change=_pixel(math.inf)),
    "peaked whole rows": replace(_SWIN, change=peaked),
    "peaked whole rows of patches": Case(2, 48, (16, 16), (2, 2), strides="channels_last", change=peaked),
    "peaked windows of 12 x 12": Case(1, 32, (12, 20), (12, 12), (0, 2), "channels_last", True, change=peaked),
    "inf in windows of 12 x 12": Case(
        1, 32, (12, 12), (12, 12), (0, 0), "channels_last", True, change=_pixel(math.inf)
    ),
    "constant whole rows": replace(_SWIN, change=_constant),
    "a whole row of -inf": replace(_SWIN, change=_row_without_weight),
    "negative scale, whole rows": Case(2, 32, (8, 13), (8, 8), (0, 3), strides="channels_last", scale=-0.3),
}
"""Inputs that are unlike others."""
