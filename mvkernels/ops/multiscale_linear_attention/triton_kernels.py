"""multiscale_linear_attention on Triton, composed of two kinds of kernels.

Forward: ``aggregate`` makes a scale's qkv, both convolutions in one pass; relu_linear_attention's kernels read the
heads of each scale where they lie in it and write them where they belong in the output. Nothing is concatenated.
Backward: a scale's qkv is made again; the attention's gradient takes its place; ``pointwise_backward`` and
``depthwise_backward`` bring that to qkv, and add it to what is there; ``pointwise_backward`` and ``depthwise_weight``
sum the gradients of the weights, in two stages.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mvkernels.checks import empty_map
from mvkernels.ops.mobile_to_former.triton_kernels import sums_dtype
from mvkernels.ops.multiscale_linear_attention.triton_plan import Problem, aggregate_launches, gradient_launches
from mvkernels.ops.relu_linear_attention.triton_kernels import (
    backward_into,
    forward_into,
    problem_of,
    run,
    why_no_kernel,
)

_INT32 = 2**31
_MAX_KERNEL = 31

Biases = Sequence[Tensor | None]


def why_not(qkv: Tensor, depthwise: Sequence[Tensor], pointwise: Sequence[Tensor], head_dim: int, *_: object
            ) -> str | None:  # fmt: skip
    """Why these kernels cannot run a call, or None. Takes the op's checked arguments; never raises."""
    batch, channels, height, width = qkv.shape
    reason = why_no_kernel(qkv, batch * channels // head_dim, channels, head_dim, height, width)
    if reason is None and any(w.shape[-1] > _MAX_KERNEL for w in depthwise):
        reason = f"a depthwise kernel wider than {_MAX_KERNEL}"
    if reason is None and any(w.numel() >= _INT32 for w in (*depthwise, *pointwise)):
        reason = "a weight passes 2**31 elements"
    return reason


def _heads(map_: Tensor, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    # q, k and v of a map (B, 3C, H, W): views (B, heads, head_dim, H, W).
    query, key, value = map_.unflatten(1, (-1, 3, head_dim)).unbind(2)
    return query, key, value


def _problem(named: Sequence[tuple[str, Tensor]], kernel: int, biases: Sequence[Tensor | None]) -> Problem:
    return Problem(problem_of(named), kernel, (biases[0] is not None, biases[1] is not None))


def _weights(source: Tensor, wide: Tensor, mixing: Tensor, biases: Sequence[Tensor | None]) -> dict[str, Tensor]:
    # What the kernels read of a scale's weights, contiguous. The pointer of a bias that is not there is not read.
    first, second = (source if b is None else b.contiguous() for b in biases)
    return {"w": wide.contiguous(), "m": mixing.contiguous(), "wb": first, "mb": second}


def _aggregate(qkv: Tensor, head_dim: int, wide: Tensor, mixing: Tensor, biases: Sequence[Tensor | None]) -> Tensor:
    """A scale: a map as qkv, dense in its order."""
    out = empty_map(qkv, qkv.shape[1])
    named = [(name, each.unflatten(1, (-1, head_dim))) for name, each in (("x", qkv), ("o", out))]
    launches = aggregate_launches(_problem(named, wide.shape[-1], biases))
    run(launches, dict(named) | _weights(qkv, wide, mixing, biases))
    return out


def forward(
    qkv: Tensor,
    depthwise: Sequence[Tensor],
    pointwise: Sequence[Tensor],
    head_dim: int,
    depthwise_bias: Biases,
    pointwise_bias: Biases,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """qkv (B, 3C, H, W), any strides -> (out (B, (1 + S) C, H, W), dense in qkv's order; sums, contiguous).

    sums (1 + S, B, heads, D + 1, D) are relu_linear_attention's of each scale.
    """
    batch, channels = qkv.shape[0], qkv.shape[1] // 3
    scales, heads = 1 + len(depthwise), channels // head_dim
    out = empty_map(qkv, scales * channels)
    sums = qkv.new_empty((scales, batch, heads, head_dim + 1, head_dim), dtype=sums_dtype(qkv.dtype))
    for scale, part in enumerate(out.unflatten(1, (scales, heads, head_dim)).unbind(1)):
        source = qkv
        if scale:
            i = scale - 1
            source = _aggregate(qkv, head_dim, depthwise[i], pointwise[i], (depthwise_bias[i], pointwise_bias[i]))
        forward_into(part, sums[scale], *_heads(source, head_dim), eps)
    return out, sums


def backward(
    grad: Tensor,
    qkv: Tensor,
    sums: Tensor,
    depthwise: Sequence[Tensor],
    pointwise: Sequence[Tensor],
    head_dim: int,
    depthwise_bias: Biases,
    pointwise_bias: Biases,
    eps: float,
    weights: bool,
) -> list[Tensor]:
    """[dqkv, dense in qkv's order; then the gradients of the weights, list by list].

    Empty tensors for what is not there, and for all weights without ``weights``. No atomics: the same bits each time.
    """
    grads = grad.unflatten(1, (1 + len(depthwise), -1, head_dim)).unbind(1)
    dqkv = empty_map(qkv, qkv.shape[1])
    backward_into(_heads(dqkv, head_dim), grads[0], *_heads(qkv, head_dim), sums[0], eps)
    found = []
    for i, (wide, mixing) in enumerate(zip(depthwise, pointwise)):
        biases = (depthwise_bias[i], pointwise_bias[i])
        scale = _aggregate(qkv, head_dim, wide, mixing, biases)
        parts = _heads(scale, head_dim)
        backward_into(parts, grads[1 + i], *parts, sums[1 + i], eps)
        found.append(_gradients(scale, qkv, dqkv, head_dim, wide, mixing, biases, weights))
    return [dqkv, *(each for kind in zip(*found) for each in kind)]


def _gradients(
    grad: Tensor,
    qkv: Tensor,
    dqkv: Tensor,
    head_dim: int,
    wide: Tensor,
    mixing: Tensor,
    biases: Sequence[Tensor | None],
    weights: bool,
) -> tuple[Tensor, ...]:
    """Add to dqkv what a scale's gradient brings; return the gradients of its four weights."""
    between = torch.empty_like(grad)
    of = (("g", grad), ("x", qkv), ("e", between), ("o", dqkv))
    named = [(name, each.unflatten(1, (-1, head_dim))) for name, each in of]
    launches, pointwise_parts, depthwise_parts = gradient_launches(_problem(named, wide.shape[-1], biases), weights)
    tensors = dict(named) | _weights(qkv, wide, mixing, biases)
    if not weights:
        run(launches, tensors | {"p": between})  # not written
        return tuple(qkv.new_empty(0) for _ in range(4))
    dtype, groups = sums_dtype(qkv.dtype), qkv.shape[1] // head_dim
    mixed, wide_grad = qkv.new_empty((groups, head_dim + 2, head_dim)), wide.new_empty(wide.shape)
    tensors["p"] = qkv.new_empty((pointwise_parts, *mixed.shape), dtype=dtype)
    tensors["pw"] = qkv.new_empty((depthwise_parts, *wide.shape), dtype=dtype)
    run(launches, tensors | {"dm": mixed, "dw": wide_grad})
    mixing_grad = mixed[:, :head_dim].reshape(mixing.shape)
    rows = zip(biases, (head_dim + 1, head_dim))
    first, second = (qkv.new_empty(0) if bias is None else mixed[:, row].reshape(-1) for bias, row in rows)
    return wide_grad, mixing_grad, first, second
