"""Launches of relu_linear_attention's Triton kernels: all that follows from shapes, strides and dtype alone."""

from __future__ import annotations

from typing import Any

import torch

from mvkernels.ops.relu_linear_attention.triton import kernels
from mvkernels.ops.relu_linear_attention.triton.configs import OP, by_warp
from mvkernels.triton import configs
from mvkernels.triton.launch import Launch, sum_slices
from mvkernels.triton.maps import Geometry, lanes
from mvkernels.triton.problem import Problem

EPS = ("eps", "eps_low")


def product_precision(problem: Problem) -> str:
    """How matrix instructions take the float32 sums beside half inputs: in parts on NVIDIA, and else whole.

    Of few pixels the gradients of q and k are small differences: those products are exact.
    """
    many = problem.shape[3] * problem.shape[4] > 16
    parts = many and problem.dtype.itemsize == 2 and problem.device.arch.startswith("sm_")
    return ("bf16x3" if problem.dtype == torch.bfloat16 else "tf32x2") if parts else problem.precision


def turned(problem: Problem) -> bool:
    """Whether q's gradient is a product from the left of the sums: they are the operand that warps share out.

    Where instructions are one warp's, warps divide the rows of all products of a kernel alike. An operand on the right
    is whole in every warp, and in parts the sums of 64 channels alone are all of its registers.
    """
    wide = lanes(problem.shape[2]) > 32
    return wide and by_warp(problem.device.arch) and product_precision(problem) in ("bf16x3", "tf32x2")


class _Plan:
    def __init__(self, problem: Problem, kernel: str):
        self.problem, self.kernel = problem, kernel
        batch, heads, d = problem.shape[:3]
        self.map = Geometry(problem.shape, problem.strides, problem.dtype.itemsize)
        maps = self.map.maps.values()
        wide = int(all(layout and align * problem.dtype.itemsize >= 8 for layout, align in maps))
        config, self.options = problem.split(OP, kernel, {"d": d, "dtype": problem.key_dtype, "wide": wide})
        self.block = min(config["BLOCK"], lanes(self.map.area))
        tiles = -(-self.map.area // self.block)
        self.units = batch * heads
        # Few units: their pixels are cut, such that every processor has programs.
        wanted = config["PROGRAMS"] * problem.device.processors // self.units
        self.steps = -(-tiles // max(1, min(wanted, tiles)))
        self.slices = -(-tiles // self.steps)
        self.sums = (d + 1) * d

    def launch(self, kernel: Any, pointers: tuple[str, ...], stage: int) -> Launch:
        problem, d = self.problem, self.problem.shape[2]
        names = [name for name, _ in problem.strides]
        product = product_precision(problem)
        # Where channels are not contiguous, bfloat16 goes through registers of which nothing wrote the other half.
        if product == "bf16x3" and lanes(d) > 16 and self.kernel == "backward_slices" and self.map.maps["q"][0] != 1:
            product = "tf32x2"
        meta: dict[str, Any] = {"D": d, "WIDTH": lanes(d)}
        for name in names:
            meta["L" + name.upper()], meta["A" + name.upper()] = self.map.maps[name]
        meta |= {"N_ALIGN": self.map.n_align, "LINEAR": self.map.linear, "WIDE": self.map.wide}
        meta |= {"PRECISION": problem.precision, "PRODUCT": product, "STAGE": stage}
        meta |= {"BLOCK": self.block, "LOOP": problem.loop(self.steps)}
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
            sum_slices(self.problem, ("parts",), (sums,), self.units * self.sums, self.slices),
            self.launch(kernel, with_sums(sums), 2),
        ]


@configs.memo
def forward_launches(problem: Problem) -> tuple[list[Launch], int]:
    """(launches, slices) of a forward call; tensors ``q k v o sums``, with more than one slice ``parts``."""
    plan = _Plan(problem, "forward_slices")
    return plan.stages(kernels.forward_slices, "q k v o sums", "sums"), plan.slices


@configs.memo
def backward_launches(problem: Problem) -> tuple[list[Launch], int]:
    """(launches, slices) of a backward call; tensors ``g q k v sums dq dk dv dsums``, with several slices ``parts``."""
    plan = _Plan(problem, "backward_slices")
    return plan.stages(kernels.backward_slices, "g q k v sums dq dk dv dsums", "dsums"), plan.slices
