"""Launches of multiscale_linear_attention's convolutions: all that follows from shapes, strides and dtype alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mvkernels.ops.multiscale_linear_attention.triton import kernels
from mvkernels.ops.multiscale_linear_attention.triton.configs import OP
from mvkernels.triton import configs
from mvkernels.triton.launch import Launch, sum_slices
from mvkernels.triton.maps import INT32, divides, lanes, low_bit, needed, power_of_two
from mvkernels.triton.problem import PARTS_BYTES, Problem

# Taps times channels side by side in the product that makes the weights' gradients: more would not fit beside the sums.
_LANES = 256


@dataclass(frozen=True)
class ScaleProblem(Problem):
    """One scale of a call. Maps are (B, groups, D, H, W)."""

    kernel: int
    """Side of the depthwise kernel."""
    biases: tuple[bool, bool]
    """Whether the depthwise and the pointwise convolution have one."""

    @property
    def sum_rows(self) -> int:
        """Of the sums that the weights' gradients are made of: a channel of a tap each, and one for the biases."""
        return self.kernel**2 * self.shape[2] + any(self.biases)


def _even(items: int, wanted: int) -> tuple[int, int]:
    # (slices, items of one) of so many items, slices at most as wanted.
    each = -(-items // max(1, min(wanted, items)))
    return -(-items // each), each


class _Plan:
    def __init__(self, problem: ScaleProblem, kernel: str, source: str):
        self.problem = problem
        self.batch, self.groups, self.d, self.height, self.width = problem.shape
        self.vector = 16 // problem.dtype.itemsize
        self.strides = {name: needed(s, problem.shape) for name, s in problem.strides}
        extents = [self.d * abs(s[2]) + (self.height + problem.kernel) * abs(s[3])
                   + (self.width + problem.kernel) * abs(s[4]) for s in self.strides.values()]  # fmt: skip
        self.wide = max(extents) >= INT32 or not divides(self.height, self.width)
        last = int(self.strides[source][2] == 1)
        key = {"d": self.d, "k": problem.kernel, "dtype": problem.key_dtype, "last": last}
        self.config, self.options = problem.split(OP, kernel, key)
        area = self.height * self.width
        self.block = min(self.config["BLOCK"], lanes(area))
        self.tiles = -(-area // self.block)

    def _layout(self, name: str) -> tuple[int, int]:
        sb, sh, sd, sy, sx = self.strides[name]
        if sd == 1:
            return 1, low_bit(sb, sh, sy, sx, limit=self.vector)
        # A tile's pixels may go on in the next row, so that nothing is known of where a run begins.
        return 2 if sx == 1 else 0, 1

    def split(self, programs: int, limit: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """(slices, steps) of the tiles and of the batch, for kernels that run ``programs`` programs a slice."""
        wanted = max(1, min(self.config["PROGRAMS"] * self.problem.device.processors // programs, limit))
        tiles = _even(self.tiles, wanted)
        return tiles, _even(self.batch, wanted // tiles[0])

    def launch(self, kernel: Any, pointers: str, names: str, programs: int, split: tuple[int, int],
               extra: tuple[int, ...] = (), **meta: Any) -> Launch:  # fmt: skip
        """``names``: the maps among the pointers, in the order of their strides."""
        problem = self.problem
        first, second = problem.biases
        meta = {"D": self.d, "WIDTH": lanes(self.d), "K": problem.kernel, "WB": first, "MB": second} | meta
        for name in names.split():
            meta["L" + name.upper()], meta["A" + name.upper()] = self._layout(name)
        meta |= {"WIDE": self.wide, "PRECISION": problem.precision, "BLOCK": self.block}
        strides = tuple(stride for name in names.split() for stride in self.strides[name])
        ints = (*strides, self.groups, self.height, self.width, self.tiles, *split, *extra)
        return Launch(kernel, kernel.__name__, programs, tuple(pointers.split()), (), ints, meta, self.options)


@configs.memo
def aggregate_launches(problem: ScaleProblem) -> list[Launch]:
    """Both convolutions of the map ``x`` to the map ``o``; tensors ``x taps m wb mb o``."""
    plan = _Plan(problem, "aggregate", "x")
    programs = plan.batch * plan.groups * plan.tiles
    return [plan.launch(kernels.aggregate, "x taps m wb mb o", "x o", programs, (1, 1))]


@configs.memo
def weight_launches(problem: ScaleProblem) -> tuple[list[Launch], int]:
    """(launches, slices) of the gradients of a scale's weights, given that of its map, ``g``.

    Tensors ``g x taps m wb parts sums dw dm dwb dmb``: ``parts`` (slices, groups, sum_rows, D) holds the parts
    of ``sums``. Without a bias its gradient is not written.
    """
    plan = _Plan(problem, "weight_sums", "x")
    size = plan.groups * problem.sum_rows * plan.d
    itemsize = max(4, problem.dtype.itemsize)
    taps = min(max(1, _LANES // lanes(plan.d)), power_of_two(problem.kernel**2))
    chunks = -(-(problem.kernel**2) // taps)
    programs = plan.groups * chunks
    (parts, steps), (batch_parts, images) = plan.split(programs, max(1, PARTS_BYTES // (itemsize * size)))
    slices = parts * batch_parts
    first, second = problem.biases
    meta = {"D": plan.d, "WIDTH": lanes(plan.d), "K": problem.kernel, "WB": first, "MB": second}
    split, images_of = (slices, steps), (plan.batch, images, parts)
    loops = {"LOOP": problem.loop(steps), "IMAGES": problem.loop(images)}
    launches = [plan.launch(kernels.weight_sums, "g x parts", "g x", programs * slices, split, images_of,
                            TAPS=taps, CHUNKS=chunks, **loops)]  # fmt: skip
    if first or second:
        launches.append(plan.launch(kernels.bias_sums, "g parts", "g", plan.groups * slices, split, images_of, **loops))
    # What it has to keep for a bias does not fit the registers of four warps.
    warps = 8 if (first or second) and plan.d > 32 else 4
    return [
        *launches,
        sum_slices(problem, ("parts",), ("sums",), size, slices),
        Launch(kernels.weight_gradients, "weight_gradients", plan.groups * (problem.kernel**2 + 1),
               ("sums", "taps", "m", "wb", "dw", "dm", "dwb", "dmb"), (), (plan.groups,),
               meta | {"LOOP": problem.loop(problem.kernel**2)}, {"num_warps": warps, "num_stages": 1}),
    ], slices  # fmt: skip


@configs.memo
def map_launches(problem: ScaleProblem) -> list[Launch]:
    """From the gradient of a scale's map, ``e``, which is written over, to that of ``x``, added to the map ``o``.

    Tensors ``e m taps o``.
    """
    first, second = (_Plan(problem, kernel, "e") for kernel in ("pointwise_backward", "depthwise_backward"))
    units = first.batch * first.groups
    return [
        first.launch(kernels.pointwise_backward, "e m", "e", units * first.tiles, (1, 1)),
        second.launch(kernels.depthwise_backward, "e taps o", "e o", units * second.tiles, (1, 1)),
    ]
