"""Launches of the bridges' Triton kernels: what both ops' plans and launchers share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mvkernels.dispatch.launches import run
from mvkernels.triton.bridge.configs import TOKENS, is_wide, rounded, tokens_at_once
from mvkernels.triton.launch import (
    INTERPRETED,
    Launch,
    in_two,
    merge_tile,
    sum_slices,
    why_not_triton,
    why_too_large,
)
from mvkernels.triton.maps import INT32, Geometry, lanes, low_bit, pieces
from mvkernels.triton.problem import LOG2E, Problem

SCALE2 = ("scale2", "scale2_low")
SCALES = ("scale", "scale_low", *SCALE2)
# Tiles that one program takes where all processors have one.
_FEW = 4
_MOST = dict.fromkeys(("float32", "float16", "bfloat16", "float64", "tf32"), 256)


@dataclass(frozen=True)
class BridgeProblem(Problem):
    """A call of a bridge. The strides of ``x``, and of ``g`` where it is a map, are five; token sets have four."""

    op: str
    tokens: int
    residual: bool = False


def problem_of(
    op: str, x: torch.Tensor, tokens: int, named: Sequence[tuple[str, torch.Tensor]], residual: bool = False
) -> BridgeProblem:
    """The description of a call on the map ``x`` and the tensors ``named``, x among them."""
    return BridgeProblem.of(x, named, INTERPRETED, op=op, tokens=tokens, residual=residual)


def why_no_bridge(x: torch.Tensor, tokens: torch.Tensor) -> str | None:
    """Why neither bridge's kernels can run on a map and a token set, or None."""
    batch, heads, d, height, width = x.shape
    m = tokens.shape[2]
    reason = why_not_triton(x, d, _MOST) or why_too_large(width, heads * d, 2 * height * width)
    if reason is None and batch * heads * (height * width + m + 16) * (1 + m // TOKENS) >= INT32:
        reason = "batch * heads * pixels * tokens / 16 passes 2**31"
    return reason


def launch(launches: Sequence[Launch], tensors: dict[str, torch.Tensor], scale: float) -> None:
    """Run a bridge's launches."""
    run(launches, tensors, in_two(tensors["x"].dtype, scale=scale, scale2=scale * LOG2E))


class Plan:
    """Sizes, strides and alignments of a call as the kernels see them, and the configuration of one of them."""

    def __init__(self, problem: BridgeProblem, kernel: str, names: str):
        self.problem, self.names = problem, names
        batch, heads, d = problem.shape[:3]
        of_maps = tuple((name, s) for name, s in problem.strides if len(s) == 5)
        self.map = Geometry(problem.shape, of_maps, problem.dtype.itemsize)
        self.token_strides = {name: s for name, s in problem.strides if len(s) == 4}
        key = self._key()
        self.wide = is_wide(key)
        self.kernel = kernel.partition("_")[0] + "_wide" if self.wide else kernel
        config, self.options = problem.split(problem.op, self.kernel, key)
        self.block = min(config["BLOCK"], lanes(self.map.area))
        self.tiles = -(-self.map.area // self.block)
        self.units, self.rows = batch * heads, batch * heads * problem.tokens
        self.tokens = TOKENS if self.wide else tokens_at_once(key)
        self.token_blocks = -(-problem.tokens // self.tokens)
        # Pieces of a wide head, a program each.
        self.pieces = -(-d // config["SLICE"]) if self.wide else 1
        # Few units: their pixels are cut, such that every processor has programs.
        programs = self.units * self.token_blocks * self.pieces
        wanted = config["PROGRAMS"] * problem.device.processors // programs
        if 4 * programs >= 3 * problem.device.processors and (self.tiles <= _FEW or config.get("ALONE")):
            wanted = 1  # another launch would take longer than some idle processors
        self.steps = -(-self.tiles // max(1, min(wanted, self.tiles)))
        self.slices = -(-self.tiles // self.steps)
        # Whether all tiles are whole, and all slices have as many.
        self.exact = self.map.area % self.block == 0 and self.tiles % self.steps == 0
        self.parts = min(config.get("PARTS", 1), self.block // 16)  # of as many pixels as a product takes
        self.meta = self._meta() | ({name: config[name] for name in ("SLICE", "DEPTH")} if self.wide else self._whole())

    def _key(self) -> dict[str, Any]:
        problem = self.problem
        return {
            "d": problem.shape[2],
            "m": rounded(problem.op, problem.tokens),
            "dtype": problem.key_dtype,
            "last": int(self.map.maps["x"][0] == 1),
            "arch": problem.device.arch,
        }

    def _meta(self) -> dict[str, Any]:
        meta = {"M": self.problem.tokens, "D": self.problem.shape[2], "TOKENS": self.tokens, "BLOCK": self.block}
        meta |= {"N_ALIGN": self.map.n_align, "LINEAR": self.map.linear, "WIDE": self.map.wide}
        for name in self.names:
            layout = self.map.maps[name] if name in self.map.maps else self._token_layout(*self.token_strides[name])
            meta["L" + name.upper()], meta["A" + name.upper()] = layout
        return meta | {"PRECISION": self.problem.precision}

    def _whole(self) -> dict[str, int]:
        problem, d = self.problem, self.problem.shape[2]
        d0, d1 = pieces(d, problem.dtype.itemsize == 4 and problem.precision == "ieee")
        if problem.dtype == torch.float64:
            d0, d1 = lanes(d), 0
        return {"D0": d0, "D1": d1, "WHOLE": self.exact}

    def _token_layout(self, sb: int, sh: int, sm: int, sd: int) -> tuple[int, int]:
        return (1, low_bit(sb, sh, sm, limit=self.map.vector)) if sd == 1 else (0, 1)

    def made_map(self, name: str) -> dict[str, Any]:
        """Layout of the map that is allocated like x, under ``L<name>`` and ``A<name>``."""
        layout, align = self.map.dense(dict(self.problem.strides)["x"][2] == 1, self.problem.shape[2])
        return {"L" + name: layout, "A" + name: align}

    def strides(self) -> tuple[int, ...]:
        of = self.map.strides | self.token_strides
        return tuple(stride for name in self.names for stride in of[name])

    def launch(self, kernel: Any, blocks: int, pointers: tuple[str, ...], floats: tuple[str, ...],
               meta: dict[str, Any]) -> Launch:  # fmt: skip
        """A program for every slice of every unit, for each of so many blocks of tokens (and pieces of a head)."""
        ints = (*self.strides(), *self.map.sizes[:3], blocks, self.slices, self.steps, self.rows)
        grid, meta = self.units * blocks * self.slices, meta | {"LOOP": self.problem.loop(self.steps)}
        return Launch(kernel, kernel.fn.__name__, grid, pointers, floats, ints, meta, self.options)

    def merge(self, kernel: Any, wide: int, pointers: tuple[str, ...], meta: dict[str, Any]) -> Launch:
        """The second stage of the rows (batch, head, token), of which each has ``wide`` lanes."""
        at_once, columns, options = merge_tile(self.slices, 1024 if wide > 1 else 256, wide)
        rows = columns // wide
        meta = meta | {"PARTS": at_once, "ROWS": rows, "LOOP": self.problem.loop(-(-self.slices // at_once))}
        grid, ints = -(-self.rows // rows), (self.rows, self.slices)
        return Launch(kernel, kernel.fn.__name__, grid, pointers, (), ints, meta, options)

    def backward(self, kernel: Any, pointers: tuple[str, ...], meta: dict[str, Any]) -> list[Launch]:
        """Gradients of map and tokens: at once with one block of tokens, else one after the other."""
        both = [(1, True, True)] if self.token_blocks == 1 else [(1, True, False), (self.token_blocks, False, True)]
        meta = self.meta | meta
        return [
            self.launch(kernel, blocks * self.pieces, pointers, SCALES, meta | {"DX": dx, "DTOKENS": dtokens})
            for blocks, dx, dtokens in both
        ]

    def sum_slices(self, *names: str) -> Launch:
        """The second stage: ``<name>_sums`` (slices, rows, D) to ``<name>``, one tensor or two."""
        size = self.rows * self.problem.shape[2]
        return sum_slices(self.problem, tuple(name + "_sums" for name in names), names, size, self.slices)
