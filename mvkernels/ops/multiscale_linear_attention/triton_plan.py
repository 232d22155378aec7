"""Launches of multiscale_linear_attention's convolutions: all that follows from shapes, strides and dtype alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mvkernels import launch
from mvkernels.ops.multiscale_linear_attention import triton_device
from mvkernels.ops.multiscale_linear_attention.triton_configs import OP
from mvkernels.ops.patch_attention.triton_plan import Launch, _low_bit, divides
from mvkernels.ops.relu_linear_attention import triton_plan as single
from mvkernels.ops.relu_linear_attention.triton_configs import width

_INT32 = 2**31
# Of parts of sums that one launch may leave: small beside any map that makes so many.
_PARTS_BYTES = 64 << 20
# Of a row side by side in the product that makes the weights' gradients: more would not fit beside the sums.
_TAPS = 8


@dataclass(frozen=True)
class Problem:
    """One scale of a call without its data."""

    maps: single.Problem
    """The maps as (B, groups, D, H, W), with their strides by name."""
    kernel: int
    """Side of the depthwise kernel."""
    biases: tuple[bool, bool]
    """Whether the depthwise and the pointwise convolution have one."""


class _Plan:
    def __init__(self, problem: Problem, kernel: str, source: str):
        self.problem, self.kernel = problem, kernel
        self.batch, self.groups, self.d, self.height, self.width = problem.maps.shape
        maps = problem.maps
        self.vector = 16 // maps.dtype.itemsize
        self.strides = {name: self._strides(s) for name, s in maps.strides}
        extents = [self.d * abs(s[2]) + (self.height + problem.kernel) * abs(s[3])
                   + (self.width + problem.kernel) * abs(s[4]) for s in self.strides.values()]  # fmt: skip
        self.wide = max(extents) >= _INT32 or not divides(self.height, self.width)
        key = {
            "d": self.d,
            "k": problem.kernel,
            "dtype": {2: "f16", 4: "f32" if maps.precision == "ieee" else "tf32", 8: "f64"}[maps.dtype.itemsize],
            "last": int(self.strides[source][2] == 1),
            "arch": maps.device.arch,
        }
        self.config = launch.config(OP, kernel, maps.device.name, key)
        self.options = {name: value for name, value in self.config.items() if name.islower()}
        area = self.height * self.width
        self.block = min(self.config["BLOCK"], max(16, 1 << (area - 1).bit_length()))
        self.tiles = -(-area // self.block)
        self.interpreted = maps.device.arch == "interpreter"

    def _strides(self, stride: tuple[int, ...]) -> tuple[int, ...]:
        sb, sh, sd, sy, sx = stride
        return (
            sb if self.batch > 1 else 0,
            sh if self.groups > 1 else 0,
            sd if self.d > 1 else 1,
            sy if self.height > 1 else 0,
            sx if self.width > 1 else 0,
        )

    def _layout(self, name: str) -> tuple[int, int]:
        sb, sh, sd, sy, sx = self.strides[name]
        if sd == 1:
            return 1, _low_bit(sb, sh, sy, sx, limit=self.vector)
        # A tile's pixels may go on in the next row, so that nothing is known of where a run begins.
        return 2 if sx == 1 else 0, 1

    def split(self, items: int, programs: int, limit: int) -> tuple[int, int]:
        """(slices, steps) of so many items, for kernels that run ``programs`` programs a slice."""
        wanted = self.config["PROGRAMS"] * self.problem.maps.device.processors // programs
        steps = -(-items // max(1, min(wanted, items, limit)))
        return -(-items // steps), steps

    def launch(self, kernel: Any, pointers: str, names: str, programs: int, split: tuple[int, int],
               extra: tuple[int, ...] = (), **meta: Any) -> Launch:  # fmt: skip
        """``names``: the maps among the pointers, in the order of their strides."""
        problem = self.problem
        first, second = problem.biases
        meta = {"D": self.d, "WIDTH": width(self.d), "K": problem.kernel, "WB": first, "MB": second} | meta
        for name in names.split():
            meta["L" + name.upper()], meta["A" + name.upper()] = self._layout(name)
        meta |= {"WIDE": self.wide, "PRECISION": problem.maps.precision, "BLOCK": self.block}
        strides = tuple(stride for name in names.split() for stride in self.strides[name])
        ints = (*strides, self.groups, self.height, self.width, self.tiles, *split, *extra)
        return Launch(kernel, self.kernel, programs, tuple(pointers.split()), (), ints, meta, self.options)

    def loop(self, steps: int) -> int:
        return steps if self.interpreted else 0


@launch.memo
def aggregate_launches(problem: Problem) -> list[Launch]:
    """Both convolutions of the map ``x`` to the map ``o``; tensors ``x taps m wb mb o``."""
    plan = _Plan(problem, "aggregate", "x")
    programs = plan.batch * plan.groups * plan.tiles
    return [plan.launch(triton_device.aggregate, "x taps m wb mb o", "x o", programs, (1, 1))]


@launch.memo
def weight_launches(problem: Problem) -> tuple[list[Launch], int]:
    """(launches, slices) of the gradients of a scale's weights, given that of its map, ``g``.

    Tensors ``g x taps m wb parts sums dw dm dwb dmb``: ``parts`` (slices, groups, k * k * D + 1, D) holds the parts of
    ``sums``. Without a bias its gradient is not written.
    """
    plan = _Plan(problem, "weight_sums", "x")
    size, items = plan.groups * (problem.kernel**2 * plan.d + 1) * plan.d, plan.batch * plan.tiles
    itemsize = max(4, problem.maps.dtype.itemsize)
    taps = min(_TAPS, 1 << (problem.kernel - 1).bit_length())
    chunks = -(-problem.kernel // taps)
    programs = plan.groups * problem.kernel * chunks
    slices, steps = plan.split(items, programs, max(1, _PARTS_BYTES // (itemsize * size)))
    first, second = problem.biases
    meta = {"D": plan.d, "WIDTH": width(plan.d), "K": problem.kernel, "WB": first, "MB": second}
    return [
        plan.launch(triton_device.weight_sums, "g x parts", "g x", programs * slices, (slices, steps), (items,),
                    TAPS=taps, CHUNKS=chunks, LOOP=plan.loop(steps)),
        single.sum_slices("parts", "sums", size, slices, plan.interpreted),
        Launch(triton_device.weight_gradients, "weight_gradients", plan.groups * (problem.kernel**2 + 1),
               ("sums", "taps", "m", "wb", "dw", "dm", "dwb", "dmb"), (), (plan.groups,),
               meta | {"LOOP": plan.loop(problem.kernel**2)}, {"num_warps": 4, "num_stages": 1}),
    ], slices  # fmt: skip


@launch.memo
def map_launches(problem: Problem) -> list[Launch]:
    """From the gradient of a scale's map, ``e``, which is written over, to that of ``x``, added to the map ``o``.

    Tensors ``e m taps o``.
    """
    first, second = (_Plan(problem, kernel, "e") for kernel in ("pointwise_backward", "depthwise_backward"))
    units = first.batch * first.groups
    return [
        first.launch(triton_device.pointwise_backward, "e m", "e", units * first.tiles, (1, 1)),
        second.launch(triton_device.depthwise_backward, "e taps o", "e o", units * second.tiles, (1, 1)),
    ]
