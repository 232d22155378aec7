"""Which kernels run a call of the layer, with what: all that follows from shapes and dtype alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from mvkernels.ops.patch_transformer_layer.triton import backward_kernels, row_kernels
from mvkernels.ops.patch_transformer_layer.triton.configs import OP
from mvkernels.triton import configs
from mvkernels.triton.launch import INTERPRETED, Launch
from mvkernels.triton.maps import lanes, low_bit, pieces
from mvkernels.triton.problem import Problem


@dataclass(frozen=True)
class LayerProblem(Problem):
    """A call of the layer. Maps are dense and channels-last, parameters contiguous: the launcher sees to it."""

    hidden: int
    heads: int
    patch: tuple[int, int]
    bias: bool
    """Whether qkv has one."""

    @property
    def rows(self) -> int:
        """Pixels of all maps."""
        return self.shape[0] * self.shape[2] * self.shape[3]

    @property
    def nvidia(self) -> bool:
        """Whether the device executes PTX."""
        return self.device.arch.startswith("sm_")

    @property
    def ones(self) -> int:
        """Numbers after the channels of a normalised row, of which the first is 1: as many as keep rows aligned."""
        return 16 - self.shape[1] % 8

    @property
    def tokens(self) -> int:
        """Of the largest group."""
        height, width = self.shape[2:]
        ph, pw = min(self.patch[0], height), min(self.patch[1], width)
        return -(-height // ph) * -(-width // pw)


def key_of(problem: LayerProblem) -> dict[str, Any]:
    """What every configuration may depend on."""
    processors = problem.device.processors
    few = (problem.rows < 128 * processors) + (problem.rows < 32 * processors)
    return {"c": problem.shape[1], "dtype": problem.key_dtype, "few": few, "arch": problem.device.arch}


def problem_of(x: torch.Tensor, hidden: int, heads: int, patch: tuple[int, int], bias: bool = True) -> LayerProblem:
    """The launcher's description of a call on the map x (B, C, H, W)."""
    return LayerProblem.of(x, (), INTERPRETED, hidden=hidden, heads=heads, patch=patch, bias=bias)


def layer_key(problem: LayerProblem, grad: bool) -> dict[str, Any]:
    """Under which it is noted whether the layer is faster fused; ``grad``: forward and backward."""
    size = min(512, lanes(problem.tokens))
    return key_of(problem) | {"f": problem.hidden, "n": size, "grad": int(grad)}


@configs.memo
def measured_faster(problem: LayerProblem, grad: bool) -> bool:
    """Whether the device's configuration file says that such layers are faster fused."""
    return bool(configs.config(OP, "layer", problem.device.name, layer_key(problem, grad))["FUSED"])


def _many(problem: LayerProblem) -> int:
    return int(problem.rows >= 256 * problem.device.processors)


def _split(kernel: str, problem: LayerProblem, **more: int) -> tuple[dict[str, Any], dict[str, int]]:
    return problem.split(OP, kernel, key_of(problem) | more)


def _common(problem: LayerProblem) -> dict[str, Any]:
    channels = problem.shape[1]
    c0, c1 = pieces(channels)
    align = low_bit(channels, limit=16 // problem.dtype.itemsize)
    return {"C": channels, "C0": c0, "C1": c1, "ALIGN": align, "PRECISION": problem.precision}


def _linear(problem: LayerProblem, pointers: tuple[str, ...], outputs: int, **what: bool) -> Launch:
    blocks, options = _split("linear_rows", problem, n=outputs, many=_many(problem))
    columns = -(-outputs // blocks["BLOCK_N"])
    blocks["STEPS"] = min(blocks["STEPS"], columns)
    programs = -(-columns // blocks["STEPS"])
    grid = -(-problem.rows // blocks["BLOCK_M"]) * programs
    meta = _common(problem) | {"N": outputs, "PROGRAMS_PER_BLOCK": programs} | what | blocks
    return Launch(row_kernels.linear_rows, "linear_rows", grid, pointers, ("eps",), (problem.rows,), meta, options)


@configs.memo
def forward_launches(problem: LayerProblem) -> tuple[Launch, Launch, Launch]:
    """``linear_rows`` from ``x`` to ``qkv``; the projection by it, from ``attention`` to ``middle``; ``norm_ffn``.

    Tensors are the parameters by name, ``x qkv attention middle out``; floats ``eps``.
    """
    channels = problem.shape[1]
    qkv = _linear(
        problem, ("x", "norm1_weight", "norm1_bias", "qkv_weight", "qkv_bias", "x", "qkv"), 3 * channels,
        NORM=True, BIAS=problem.bias, RESIDUAL=False,
    )  # fmt: skip
    project = _linear(
        problem, ("attention", "proj_bias", "proj_bias", "proj_weight", "proj_bias", "x", "middle"), channels,
        NORM=False, BIAS=True, RESIDUAL=True,
    )  # fmt: skip
    blocks, options = _split("norm_ffn", problem, f=problem.hidden)
    pointers = ("middle", "norm2_weight", "norm2_bias", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias", "out")
    ffn = Launch(
        row_kernels.norm_ffn, "norm_ffn", -(-problem.rows // blocks["BLOCK_M"]), pointers, ("eps",), (problem.rows,),
        _common(problem) | {"F": problem.hidden, "PTX": problem.nvidia} | blocks, options,
    )  # fmt: skip
    return qkv, project, ffn


def _norm(problem: LayerProblem, pointers: tuple[str, ...], outer: bool) -> tuple[Launch, int]:
    blocks, options = _split("norm_backward", problem)
    blocks["ROWS"] = min(blocks["ROWS"], blocks["BLOCK_M"])
    programs = -(-problem.rows // blocks["BLOCK_M"])
    meta = _common(problem) | {"ONES": problem.ones, "OUTER": outer} | blocks
    launch = Launch(backward_kernels.norm_backward, "norm_backward", programs, pointers, ("eps",), (problem.rows,),
                    meta, options)  # fmt: skip
    return launch, programs


@configs.memo
def backward_launches(problem: LayerProblem) -> tuple[Launch, Launch, Launch, int]:
    """``ffn_backward``, ``norm_backward`` of the second norm, that of the first, and the programs of these two.

    Tensors beside forward's: ``grad``, ``hidden dhidden`` written by the first, ``dnormed2``, ``normed2 dmiddle sums2``
    written by the second, ``dnormed1``, and ``normed1 dx sums1`` written by the third. Each program has its own row of
    the sums.
    """
    blocks, options = _split("ffn_backward", problem, f=problem.hidden, many=_many(problem))
    meta = {
        "F": problem.hidden,
        "PTX": problem.nvidia,
        "FALIGN": low_bit(problem.hidden, limit=16 // problem.dtype.itemsize),
    }
    pointers = ("grad", "middle", "norm2_weight", "norm2_bias", "fc1_weight", "fc1_bias", "fc2_weight", "hidden",
                "dhidden")  # fmt: skip
    ffn = Launch(backward_kernels.ffn_backward, "ffn_backward", -(-problem.rows // blocks["BLOCK_M"]), pointers,
                 ("eps",), (problem.rows,), _common(problem) | meta | blocks, options)  # fmt: skip
    second, programs = _norm(
        problem, ("dnormed2", "middle", "grad", "norm2_weight", "norm2_bias", "normed2", "dmiddle", "sums2"), True
    )
    first, _ = _norm(
        problem, ("dnormed1", "x", "dmiddle", "norm1_weight", "norm1_bias", "normed1", "dx", "sums1"), False
    )
    return ffn, second, first, programs
