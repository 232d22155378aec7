"""inverted_residual on Triton: one kernel, forward alone."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from mvkernels.dispatch.launches import run
from mvkernels.ops.common.activations import ACTIVATIONS
from mvkernels.ops.common.packed import why_not_recorded
from mvkernels.ops.inverted_residual.triton.configs import OP
from mvkernels.ops.inverted_residual.triton.plan import BlockProblem, forward_launches, key_of
from mvkernels.triton import configs
from mvkernels.triton.launch import INTERPRETED, why_not_triton
from mvkernels.triton.maps import INT32, power_of_two

_NAMES = tuple(ACTIVATIONS)
_MAX_KERNEL = 7
_MOST = dict.fromkeys(("float32", "float16", "bfloat16", "tf32"), 1 << 30)


def why_not(x: Tensor, expand: Any, depthwise: Any, project: Any, *rest: Any) -> str | None:
    """Why the kernel cannot run a call, or None. Takes the op's checked arguments; never raises."""
    recorded = why_not_recorded(x, *(expand or ()), *depthwise, *project, kernel="Triton")
    reason = recorded or why_not_triton(x, 1, _MOST)
    if reason:
        return reason
    if depthwise[0].shape[-1] > _MAX_KERNEL:
        return f"a depthwise kernel wider than {_MAX_KERNEL}"
    if any(weight.numel() >= INT32 for weight, _ in (expand or depthwise, depthwise, project)):
        return "a weight passes 2**31 elements"
    if 2 * x.shape[0] * x.shape[2] * x.shape[3] >= INT32:
        return "batch * pixels passes 2**30"
    return None


def problem_of(
    x: Tensor,
    expand: Any,
    depthwise: tuple[Tensor, Tensor | None],
    project: tuple[Tensor, Tensor | None],
    stride: int,
    activation: str | None,
    residual: bool,
) -> BlockProblem:
    """The description of a call with these arguments of the op."""
    biases = (expand is not None and expand[1] is not None, depthwise[1] is not None, project[1] is not None)
    return BlockProblem.of(
        x, [("x", x)], INTERPRETED, hidden=depthwise[0].shape[0], outputs=project[0].shape[0],
        kernel=depthwise[0].shape[-1], stride=stride, activation=activation, expands=expand is not None,
        residual=residual, biases=biases,
    )  # fmt: skip


def block_key(problem: BlockProblem) -> dict[str, Any]:
    """Under which it is noted whether such a block is faster by the kernel."""
    pixels = problem.shape[0] * math.prod(problem.after)
    more = {"act": problem.activation or "", "residual": int(problem.residual), "arch": problem.device.arch}
    return key_of(problem) | {"n": power_of_two(pixels)} | more


@configs.memo
def faster(problem: BlockProblem) -> bool:
    """Whether such a block was measured, or else is predicted, to be faster by the kernel than by PyTorch's own."""
    return bool(configs.config(OP, "block", problem.device.name, block_key(problem))["FUSED"])


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
    pairs = (None if expand is None else (expand, expand_bias), (depthwise, depthwise_bias), (project, project_bias))
    problem = problem_of(x, *pairs, stride, _NAMES[activation], residual)
    b, o, (height, width) = x.shape[0], project.shape[0], problem.after
    if x.stride(1) == 1:
        out = x.new_empty((b, height, width, o)).permute(0, 3, 1, 2)
    else:
        out = x.new_empty((b, o, height, width))
    launches = forward_launches(problem)
    scratch = x.new_empty(launches[0].grid * launches[0].meta["SLOT"])
    run(launches, tensors | {"scratch": scratch, "o": out}, {})
    return out
