"""inverted_residual on Triton: one kernel, forward alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mvkernels.ops.common.activations import ACTIVATIONS
from mvkernels.ops.common.packed import why_not_recorded
from mvkernels.ops.inverted_residual.triton.plan import BlockProblem, forward_launches
from mvkernels.triton.launch import INTERPRETED, run, why_not_triton
from mvkernels.triton.maps import INT32

_NAMES = tuple(ACTIVATIONS)
_MOST = dict.fromkeys(("float32", "float16", "bfloat16", "tf32"), 1 << 30)
KERNELS = (3, 5)


def why_not(x: Tensor, expand: Any, depthwise: Any, project: Any, *rest: Any) -> str | None:
    """Why the kernel cannot run a call, or None. Takes the op's checked arguments; never raises."""
    reason = why_not_recorded(x, *(expand or ()), *depthwise, *project) or why_not_triton(x, 1, _MOST)
    if reason:
        return reason
    if depthwise[0].shape[-1] not in KERNELS:
        return f"the depthwise kernel is {depthwise[0].shape[-1]}, want 3 or 5"
    if any(weight.numel() >= INT32 for weight, _ in (expand or depthwise, depthwise, project)):
        return "a weight passes 2**31 elements"
    if x.shape[0] * x.shape[2] * x.shape[3] >= INT32:
        return "batch * pixels passes 2**31"
    return None


def problem_of(
    x: Tensor, hidden: int, outputs: int, kernel: int, stride: int, activation: str | None, expands: bool,
    residual: bool, biases: tuple[bool, bool, bool],
) -> BlockProblem:  # fmt: skip
    """The description of a call on the map x (B, C, H, W)."""
    return BlockProblem.of(
        x, [("x", x)], INTERPRETED, hidden=hidden, outputs=outputs, kernel=kernel, stride=stride,
        activation=activation, expands=expands, residual=residual, biases=biases,
    )  # fmt: skip


def forward(
    x: Tensor,
    expand: Tensor | None,
    expand_bias: Tensor | None,
    depthwise: Tensor,
    depthwise_bias: Tensor | None,
    project: Tensor,
    project_bias: Tensor | None,
    stride: int,
    activation: int,
    residual: bool,
) -> Tensor:
    """x (B, C, H, W), any strides -> (B, C_out, ceil(H / stride), ceil(W / stride)), dense in the order of x."""
    given = {"we": expand, "be": expand_bias, "wd": depthwise, "bd": depthwise_bias, "wp": project, "bp": project_bias}
    tensors = {name: x if value is None else value.contiguous() for name, value in given.items()} | {"x": x}
    biases = (expand_bias is not None, depthwise_bias is not None, project_bias is not None)
    problem = problem_of(
        x, depthwise.shape[0], project.shape[0], depthwise.shape[-1], stride, _NAMES[activation], expand is not None,
        residual, biases,
    )  # fmt: skip
    b, o, (height, width) = x.shape[0], project.shape[0], problem.after
    if x.stride(1) == 1:
        out = x.new_empty((b, height, width, o)).permute(0, 3, 1, 2)
    else:
        out = x.new_empty((b, o, height, width))
    run(forward_launches(problem), tensors | {"o": out}, {})
    return out
