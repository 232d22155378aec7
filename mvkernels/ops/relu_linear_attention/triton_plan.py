"""Launches of relu_linear_attention's Triton kernels: all that follows from shapes, strides and dtype alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from mvkernels import launch
from mvkernels.launch import Device
from mvkernels.ops.mobile_to_former import triton_device as bridge
from mvkernels.ops.patch_attention import triton_plan as maps
from mvkernels.ops.patch_attention.triton_plan import Launch
from mvkernels.ops.relu_linear_attention import triton_device
from mvkernels.ops.relu_linear_attention.triton_configs import OP, by_warp, width

EPS = ("eps", "eps_low")

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Problem:
    """A call without its data: all that kernels and their configurations may depend on."""

    shape: Shape
    """Of each map: (B, heads, head_dim, H, W)."""
    strides: tuple[tuple[str, Shape], ...]
    """By name, of every map that is read or written: ``q k v o``, or ``g q k v dq dk dv``."""
    dtype: torch.dtype
    precision: str
    """Of products of the inputs among themselves."""
    device: Device


def product_precision(problem: Problem) -> str:
    """How matrix instructions take the float32 sums beside half inputs: in two parts on NVIDIA, and else whole.

    Of few pixels the gradients of q and k are small differences: those products are exact.
    """
    many = problem.shape[3] * problem.shape[4] > 16
    parts = many and problem.dtype.itemsize == 2 and problem.device.arch.startswith("sm_")
    return "tf32x2" if parts else problem.precision


def turned(problem: Problem) -> bool:
    """Whether q's gradient is a product from the left of the sums: they are the operand that warps share out.

    Where instructions are one warp's, warps divide the rows of all products of a kernel alike. An operand on the right
    is whole in every warp, and in parts the sums of 64 channels alone are all of its registers.
    """
    wide = width(problem.shape[2]) > 32
    return wide and by_warp(problem.device.arch) and product_precision(problem) == "tf32x2"


def sum_slices(source: str, target: str, size: int, slices: int, interpreted: bool) -> Launch:
    """The second stage of sums: ``source`` (slices, size) to ``target``, in the order of the slices."""
    return Launch(
        bridge.sum_slices, "sum_slices", -(-size // 512), (source, source, target, target), (), (size, slices),
        {"PAIR": False, "BLOCK": 512, "LOOP": slices if interpreted else 0}, {"num_warps": 4, "num_stages": 1},
    )  # fmt: skip


class _Plan:
    def __init__(self, problem: Problem, kernel: str):
        self.problem, self.kernel = problem, kernel
        batch, heads, d = problem.shape[:3]
        self.map = maps._Geometry(
            maps.Problem(problem.shape, d, problem.strides, None, 1, (1, 1), problem.dtype, problem.precision,
                         problem.device)
        )  # fmt: skip
        itemsize = problem.dtype.itemsize
        exact = "f32" if problem.precision == "ieee" else "tf32"
        key = {
            "d": d,
            "dtype": {2: "f16", 4: exact, 8: "f64"}[itemsize],
            "wide": int(all(layout and align * itemsize >= 8 for layout, align in self.map.maps.values())),
            "arch": problem.device.arch,
        }
        config = launch.config(OP, kernel, problem.device.name, key)
        self.options = {name: value for name, value in config.items() if name.islower()}
        self.block = min(config["BLOCK"], max(16, 1 << (self.map.area - 1).bit_length()))
        tiles = -(-self.map.area // self.block)
        self.units = batch * heads
        # Few units: their pixels are cut, such that every processor has programs.
        wanted = config["PROGRAMS"] * problem.device.processors // self.units
        self.steps = -(-tiles // max(1, min(wanted, tiles)))
        self.slices = -(-tiles // self.steps)
        self.sums = (d + 1) * d
        self.interpreted = problem.device.arch == "interpreter"

    def launch(self, kernel: Any, pointers: tuple[str, ...], stage: int) -> Launch:
        problem, d = self.problem, self.problem.shape[2]
        names = [name for name, _ in problem.strides]
        meta: dict[str, Any] = {"D": d, "WIDTH": width(d)}
        for name in names:
            meta["L" + name.upper()], meta["A" + name.upper()] = self.map.maps[name]
        meta |= {"N_ALIGN": self.map.n_align, "LINEAR": self.map.linear, "WIDE": self.map.wide}
        meta |= {"PRECISION": problem.precision, "PRODUCT": product_precision(problem), "STAGE": stage}
        # The interpreter takes loop bounds as constants; 0: the kernel takes the bound from its own data.
        meta |= {"BLOCK": self.block, "LOOP": self.steps if self.interpreted else 0}
        strides = tuple(stride for name in names for stride in self.map.strides[name])
        if self.kernel == "backward_slices":
            meta["TURN"] = turned(problem)
        ints = (*strides, *self.map.sizes[:3], self.slices, self.steps, self.units)
        return Launch(kernel, self.kernel, self.units * self.slices, pointers, EPS, ints, meta, self.options)

    def stages(self, kernel: Any, pointers: str, sums: str) -> list[Launch]:
        def with_sums(name: str) -> tuple[str, ...]:
            return tuple(name if pointer == sums else pointer for pointer in pointers.split())

        if self.slices == 1:
            return [self.launch(kernel, with_sums(sums), 0)]
        return [
            self.launch(kernel, with_sums("parts"), 1),
            sum_slices("parts", sums, self.units * self.sums, self.slices, self.interpreted),
            self.launch(kernel, with_sums(sums), 2),
        ]


@launch.memo
def forward_launches(problem: Problem) -> tuple[list[Launch], int]:
    """(launches, slices) of a forward call; tensors ``q k v o sums``, with more than one slice ``parts``."""
    plan = _Plan(problem, "forward_slices")
    return plan.stages(triton_device.forward_slices, "q k v o sums", "sums"), plan.slices


@launch.memo
def backward_launches(problem: Problem) -> tuple[list[Launch], int]:
    """(launches, slices) of a backward call; tensors ``g q k v sums dq dk dv dsums``, with several slices ``parts``."""
    plan = _Plan(problem, "backward_slices")
    return plan.stages(triton_device.backward_slices, "g q k v sums dq dk dv dsums", "dsums"), plan.slices
