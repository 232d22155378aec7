"""Launches of mobile_to_former's Triton kernels, and what both bridges' launchers share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from mvkernels import launch
from mvkernels.launch import Device
from mvkernels.ops.mobile_to_former import triton_device, triton_wide
from mvkernels.ops.mobile_to_former.triton_configs import TOKENS, is_wide
from mvkernels.ops.patch_attention import triton_plan as maps
from mvkernels.ops.patch_attention.triton_configs import pieces
from mvkernels.ops.patch_attention.triton_plan import Launch

SCALE2 = ("scale2", "scale2_low")
SCALES = ("scale", "scale_low", *SCALE2)

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Problem:
    """A call without its data: all that kernels and their configurations may depend on."""

    op: str
    shape: Shape
    """Of the map: (B, heads, head_dim, H, W)."""
    tokens: int
    strides: tuple[tuple[str, Shape], ...]
    """By name: ``x``, and ``g`` where it is a map, have five; the token sets have four."""
    residual: bool
    dtype: torch.dtype
    precision: str
    device: Device


class Plan:
    """Sizes, strides and alignments of a call as the kernels see them, and the configuration of one of them."""

    def __init__(self, problem: Problem, kernel: str, names: str):
        self.problem, self.names = problem, names
        batch, heads, d = problem.shape[:3]
        of_maps = tuple((name, s) for name, s in problem.strides if len(s) == 5)
        self.map = maps._Geometry(
            maps.Problem(problem.shape, d, of_maps, None, 1, (1, 1), problem.dtype, problem.precision, problem.device)
        )
        self.token_strides = {name: s for name, s in problem.strides if len(s) == 4}
        key = self._key()
        self.wide = is_wide(key)
        self.kernel = kernel.partition("_")[0] + "_wide" if self.wide else kernel
        config = launch.config(problem.op, self.kernel, problem.device.name, key)
        self.options = {name: value for name, value in config.items() if name.islower()}
        self.block = min(config["BLOCK"], max(16, 1 << (self.map.area - 1).bit_length()))
        self.tiles = -(-self.map.area // self.block)
        self.units, self.rows = batch * heads, batch * heads * problem.tokens
        self.token_blocks = -(-problem.tokens // TOKENS)
        # Pieces of a wide head, a program each.
        self.pieces = -(-d // config["SLICE"]) if self.wide else 1
        # Few units: their pixels are cut, such that every processor has programs.
        wanted = config["PROGRAMS"] * problem.device.processors // (self.units * self.token_blocks * self.pieces)
        self.steps = -(-self.tiles // max(1, min(wanted, self.tiles)))
        self.slices = -(-self.tiles // self.steps)
        self.meta = self._meta() | ({name: config[name] for name in ("SLICE", "DEPTH")} if self.wide else self._whole())

    def _key(self) -> dict[str, Any]:
        problem, size = self.problem, self.problem.dtype.itemsize
        exact = "f32" if problem.precision == "ieee" else "tf32"
        return {
            "d": problem.shape[2],
            "m": TOKENS if problem.tokens <= TOKENS else 2 * TOKENS,
            "dtype": {2: "f16", 4: exact, 8: "f64"}[size],
            "last": int(self.map.maps["x"][0] == 1),
            "arch": problem.device.arch,
        }

    def _meta(self) -> dict[str, Any]:
        meta = {"M": self.problem.tokens, "D": self.problem.shape[2], "TOKENS": TOKENS, "BLOCK": self.block}
        meta |= {"N_ALIGN": self.map.n_align, "LINEAR": self.map.linear, "WIDE": self.map.wide}
        for name in self.names:
            layout = self.map.maps[name] if name in self.map.maps else self._token_layout(*self.token_strides[name])
            meta["L" + name.upper()], meta["A" + name.upper()] = layout
        return meta | {"PRECISION": self.problem.precision}

    def _whole(self) -> dict[str, int]:
        problem, d = self.problem, self.problem.shape[2]
        d0, d1 = pieces(d, problem.dtype.itemsize == 4 and problem.precision == "ieee")
        if problem.dtype == torch.float64:
            d0, d1 = max(16, 1 << (d - 1).bit_length()), 0
        return {"D0": d0, "D1": d1}

    def _token_layout(self, sb: int, sh: int, sm: int, sd: int) -> tuple[int, int]:
        return (1, maps._low_bit(sb, sh, sm, limit=self.map.vector)) if sd == 1 else (0, 1)

    def made_map(self, name: str) -> dict[str, Any]:
        """Layout of the map that is allocated like x, under ``L<name>`` and ``A<name>``."""
        layout, align = self.map.dense(dict(self.problem.strides)["x"][2] == 1, self.problem.shape[2])
        return {"L" + name: layout, "A" + name: align}

    def loop(self, bound: int) -> int:
        """The interpreter takes loop bounds as constants; 0: the kernel takes the bound from its own data."""
        return bound if self.problem.device.arch == "interpreter" else 0

    def strides(self) -> tuple[int, ...]:
        of = self.map.strides | self.token_strides
        return tuple(stride for name in self.names for stride in of[name])

    def launch(self, kernel: Any, blocks: int, pointers: tuple[str, ...], floats: tuple[str, ...],
               meta: dict[str, Any]) -> Launch:  # fmt: skip
        """A program for every slice of every unit, for each of so many blocks of tokens (and pieces of a head)."""
        ints = (*self.strides(), *self.map.sizes[:3], blocks, self.slices, self.steps, self.rows)
        grid, meta = self.units * blocks * self.slices, meta | {"LOOP": self.loop(self.steps)}
        return Launch(kernel, kernel.fn.__name__, grid, pointers, floats, ints, meta, self.options)

    def merge(self, kernel: Any, rows: int, pointers: tuple[str, ...], meta: dict[str, Any]) -> Launch:
        """A program for so many of the rows (batch, head, token), over all slices."""
        meta = meta | {"ROWS": rows, "LOOP": self.loop(self.slices)}
        grid, ints, options = -(-self.rows // rows), (self.rows, self.slices), {"num_warps": 4, "num_stages": 1}
        return Launch(kernel, kernel.fn.__name__, grid, pointers, (), ints, meta, options)

    def backward(self, kernel: Any, pointers: tuple[str, ...], meta: dict[str, Any]) -> list[Launch]:
        """Gradients of map and tokens: at once with one block of tokens, else one after the other."""
        both = [(1, True, True)] if self.token_blocks == 1 else [(1, True, False), (self.token_blocks, False, True)]
        meta = self.meta | meta
        return [
            self.launch(kernel, blocks * self.pieces, pointers, SCALES, meta | {"DX": dx, "DTOKENS": dtokens})
            for blocks, dx, dtokens in both
        ]

    def sum_slices(self, first: str, second: str = "") -> Launch:
        """The second stage: ``<name>_sums`` (slices, rows, D) to ``<name>``, one tensor or two."""
        size = self.rows * self.problem.shape[2]
        names = (first, second or first)
        return Launch(
            triton_device.sum_slices,
            "sum_slices",
            -(-size // 512) * (2 if second else 1),
            tuple(name + "_sums" for name in names) + names,
            (),
            (size, self.slices),
            {"PAIR": bool(second), "BLOCK": 512, "LOOP": self.loop(self.slices)},
            {"num_warps": 4, "num_stages": 1},
        )


@launch.memo
def forward_launches(problem: Problem) -> tuple[list[Launch], int]:
    """(launches, slices) of a forward call; tensors ``q x o``, with more than one slice ``sums stats``."""
    plan = Plan(problem, "forward_slices", "qx")
    split = plan.slices > 1
    # A pointer that is not used must be one.
    pointers = ("q", "x", "sums", "stats") if split else ("q", "x", "o", "o")
    kernel = triton_wide.forward_wide if plan.wide else triton_device.forward_slices
    blocks = plan.token_blocks * plan.pieces
    launches = [plan.launch(kernel, blocks, pointers, SCALE2, plan.meta | {"SPLIT": split})]
    if split:
        d = problem.shape[2]
        wide = max(16, 1 << (d - 1).bit_length())
        meta = {"D": d, "WIDTH": wide}
        launches.append(plan.merge(triton_device.forward_merge, max(1, 512 // wide), ("sums", "stats", "o"), meta))
    return launches, plan.slices


@launch.memo
def backward_launches(problem: Problem) -> tuple[list[Launch], int]:
    """(launches, slices) of a backward call; tensors ``g q x stats index dq dx``.

    With more than one slice also ``stats_parts index_parts dq_sums``. Floats ``scale scale_low scale2 scale2_low``.
    Both stages have one plan, and so the same tiles: a score is the same bits in both.
    """
    plan = Plan(problem, "backward_slices", "gqx")
    split = plan.slices > 1
    rows, whole = ("stats_parts", "index_parts"), ("stats", "index")
    kernel = triton_wide.rows_wide if plan.wide else triton_device.backward_rows
    meta = {name: value for name, value in plan.meta.items() if name != "SLICE"}
    launches = [plan.launch(kernel, plan.token_blocks, ("g", "q", "x", *(rows if split else whole)), SCALE2, meta)]
    if split:
        launches.append(plan.merge(triton_device.backward_merge, 128, (*rows, *whole), {}))
    kernel = triton_wide.backward_wide if plan.wide else triton_device.backward_slices
    pointers = ("g", "q", "x", *whole, "dq_sums" if split else "dq", "dx")
    launches += plan.backward(kernel, pointers, plan.made_map("D"))
    return launches + ([plan.sum_slices("dq")] if split else []), plan.slices
