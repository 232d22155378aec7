"""The launch of inverted_residual's kernel: all that follows from shapes, strides and dtype alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from mvkernels.ops.inverted_residual.triton import kernels
from mvkernels.ops.inverted_residual.triton.configs import OP
from mvkernels.triton import configs
from mvkernels.triton.launch import Launch
from mvkernels.triton.maps import INT32, lanes, low_bit, pieces
from mvkernels.triton.problem import Problem


@dataclass(frozen=True)
class BlockProblem(Problem):
    """A call. Its map x is (B, C, H, W) of any strides, named "x"; weights are contiguous: the launcher sees to it."""

    hidden: int
    outputs: int
    kernel: int
    stride: int
    activation: str | None
    expands: bool
    residual: bool
    biases: tuple[bool, bool, bool]
    """Whether the three convolutions have one."""

    @property
    def after(self) -> tuple[int, int]:
        """Sides of the result."""
        return -(-self.shape[2] // self.stride), -(-self.shape[3] // self.stride)


def key_of(problem: BlockProblem) -> dict[str, Any]:
    """What a configuration may depend on."""
    pixels = problem.shape[0] * math.prod(problem.after)
    return {
        "c": problem.shape[1] if problem.expands else 0,
        "h": problem.hidden,
        "o": problem.outputs,
        "k": problem.kernel,
        "s": problem.stride,
        "dtype": problem.key_dtype,
        "few": int(pixels < 128 * problem.device.processors),
        "last": int(problem.strides[0][1][1] == 1),
    }


@configs.memo
def forward_launches(problem: BlockProblem) -> list[Launch]:
    """The kernel; tensors ``x we be wd bd wp bp o``, of which those that are not there are not read."""
    blocks, options = problem.split(OP, "forward_cells", key_of(problem))
    batch, channels, height, width = problem.shape
    (after_y, after_x), outputs = problem.after, problem.outputs
    ((_, strides),) = problem.strides
    # Strides of sizes of 1 lead nowhere.
    sb, sc, sy, sx = (stride if size > 1 else 0 for stride, size in zip(strides, problem.shape))
    last = strides[1] == 1
    vector = 16 // problem.dtype.itemsize
    reach = problem.kernel + 2 * (blocks["SY"] + blocks["SX"])
    extent = channels * abs(sc) + (height + reach) * abs(sy) + (width + reach) * abs(sx)
    c0, c1 = pieces(channels)
    blocks["SY"], blocks["SX"] = min(blocks["SY"], after_y), min(blocks["SX"], after_x)
    blocks["BLOCK_H"] = min(blocks["BLOCK_H"], lanes(problem.hidden))
    down, across = -(-after_y // blocks["SY"]), -(-after_x // blocks["SX"])
    cells = batch * down * across
    grid = -(-cells // blocks["BLOCK"]) * -(-outputs // blocks["BLOCK_O"])
    meta: dict[str, Any] = {
        "C": channels,
        "C0": c0,
        "C1": c1,
        "HIDDEN": problem.hidden,
        "OUTPUTS": outputs,
        "K": problem.kernel,
    }
    meta |= {"STRIDE": problem.stride, "EXPANDS": problem.expands, "RESIDUAL": problem.residual}
    meta |= dict(zip(("BE", "BD", "BP"), problem.biases)) | {"ACT": problem.activation or ""}
    meta |= {"LX": int(last), "AX": low_bit(sb, sy, sx, limit=vector) if last else 1}
    meta |= {f"A{name}": low_bit(count, limit=vector)
             for name, count in (("C", channels), ("H", problem.hidden), ("O", outputs))}  # fmt: skip
    meta |= {"WIDE": extent >= INT32, "PRECISION": problem.precision} | blocks
    ints = (sb, sc, sy, sx, height, width, after_y, after_x, down, across, cells)
    pointers = ("x", "we", "be", "wd", "bd", "wp", "bp", "o")
    return [Launch(kernels.forward_cells, "forward_cells", grid, pointers, (), ints, meta, options)]
