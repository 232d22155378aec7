"""The launch of inverted_residual's kernel: all that follows from shapes, strides and dtype alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from mvkernels.ops.inverted_residual.triton import kernels
from mvkernels.ops.inverted_residual.triton.configs import OP
from mvkernels.triton import configs
from mvkernels.triton.launch import Launch
from mvkernels.triton.maps import INT32, lanes, low_bit, power_of_two
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


def _strides(problem: BlockProblem) -> tuple[int, ...]:
    # Of x; those of sizes of 1 lead nowhere.
    ((_, strides),) = problem.strides
    return tuple(stride if size > 1 else 0 for stride, size in zip(strides, problem.shape))


def key_of(problem: BlockProblem) -> dict[str, Any]:
    """What a configuration may depend on."""
    pixels = problem.shape[0] * math.prod(problem.after)
    sb, _, sy, sx = _strides(problem)
    aligned = low_bit(sb, sy, sx, limit=4) * problem.dtype.itemsize >= 4
    return {
        "c": problem.shape[1] if problem.expands else 0,
        "h": problem.hidden,
        "o": problem.outputs,
        "k": problem.kernel,
        "s": problem.stride,
        "dtype": problem.key_dtype,
        "few": int(pixels < 8 * problem.device.processors),
        "last": int(problem.strides[0][1][1] == 1 and aligned),
    }


@configs.memo
def forward_launches(problem: BlockProblem) -> list[Launch]:
    """The kernel; tensors ``x we be wd bd wp bp scratch o``, of which those that are not there are not read."""
    blocks, options = problem.split(OP, "forward_tiles", key_of(problem))
    batch, channels, height, width = problem.shape
    (after_y, after_x), outputs = problem.after, problem.outputs
    sb, sc, sy, sx = _strides(problem)
    last = problem.strides[0][1][1] == 1
    vector = 16 // problem.dtype.itemsize
    per = blocks.pop("PROGRAMS")
    blocks["BLOCK_H"] = min(blocks["BLOCK_H"], lanes(problem.hidden))
    ty = blocks["TY"] = min(blocks["TY"], power_of_two(after_y))
    tx = blocks["TX"] = min(blocks["TX"], power_of_two(after_x))
    blocks["SX"] = min(blocks["SX"], tx)
    down, across = -(-after_y // ty), -(-after_x // tx)
    tiles = batch * down * across * -(-outputs // blocks["BLOCK_O"])
    # Each program has a slice of the scratch: one for each tile would go through the memory.
    grid = min(tiles, per * problem.device.processors)
    halo = down > 1, across > 1
    rect = [(side - 1) * problem.stride + problem.kernel if more else side * problem.stride
            for side, more in zip((ty, tx), halo)]  # fmt: skip
    padded = -(-problem.hidden // blocks["BLOCK_H"]) * blocks["BLOCK_H"]
    taps = -(-(problem.kernel**2) * padded // 64) * 64
    pixels = -(-math.prod(rect) // blocks["BLOCK_M"]) * blocks["BLOCK_M"]
    slot = taps + pixels * blocks["BLOCK_H"] * problem.expands
    extent = channels * abs(sc) + (rect[0] + 2 * problem.kernel) * abs(sy) + (rect[1] + 2 * problem.kernel) * abs(sx)
    extent = max(extent, ty * after_x * outputs)
    meta: dict[str, Any] = {"C": channels, "HIDDEN": problem.hidden, "OUTPUTS": outputs, "K": problem.kernel}
    meta |= {"STRIDE": problem.stride, "EXPANDS": problem.expands, "RESIDUAL": problem.residual}
    meta |= dict(zip(("BE", "BD", "BP"), problem.biases)) | {"ACT": problem.activation or ""}
    meta |= {"PTX": problem.device.arch.startswith("sm_")}
    meta |= {"LX": int(last), "AX": low_bit(sb, sy, sx, limit=vector) if last else 1}
    meta |= {f"A{name}": low_bit(count, limit=vector)
             for name, count in (("C", channels), ("H", problem.hidden), ("O", outputs))}  # fmt: skip
    meta |= {"WIDE": extent >= INT32, "PRECISION": problem.precision}
    lanes_of_a_row = ty * tx // blocks["SX"] * blocks["BLOCK_H"]
    meta |= {"PAIRS": meta["PTX"] and problem.expands and lanes_of_a_row >= 64 * options["num_warps"]}
    meta |= {"HALO_Y": halo[0], "HALO_X": halo[1], "SLOT": slot, "TAPS": taps} | blocks
    ints = (sb, sc, sy, sx, height, width, after_y, after_x, down, across, tiles, grid, math.prod(rect))
    pointers = ("x", "we", "be", "wd", "bd", "wp", "bp", "scratch", "o")
    return [Launch(kernels.forward_tiles, "forward_tiles", grid, pointers, (), ints, meta, options)]
