"""multiscale_linear_attention on Triton, composed of two kinds of kernels.

Forward: ``aggregate`` makes a scale's qkv, both convolutions in one pass; relu_linear_attention's kernels read the
heads of each scale where they lie in it and write them where they belong in the output. Nothing is concatenated.
Backward: a scale's qkv is made again; the attention's gradient takes its place; ``weight_sums`` multiplies it with qkv
for the gradients of the weights, summed in two stages; ``pointwise_backward`` and ``depthwise_backward`` bring it to
qkv, and add it to what is there.
A depthwise convolution reads every pixel k * k times. With channels first neighbours in x are no whole words to load,
so such a map is copied to channels last before: two passes over it instead of k * k slow ones. What a scale makes lies
with channels last always.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mvkernels.dispatch.checks import channels_last, empty_map
from mvkernels.dispatch.launches import run
from mvkernels.ops.multiscale_linear_attention.triton.plan import (
    ScaleProblem,
    aggregate_launches,
    map_launches,
    weight_launches,
)
from mvkernels.ops.relu_linear_attention import backward_into, forward_into
from mvkernels.ops.relu_linear_attention import why_not_triton as why_not_attention
from mvkernels.triton.launch import INTERPRETED, parts
from mvkernels.triton.maps import INT32
from mvkernels.triton.problem import sums_dtype

_MAX_KERNEL = 31

Biases = Sequence[Tensor | None]


def why_not(qkv: Tensor, depthwise: Sequence[Tensor], pointwise: Sequence[Tensor], head_dim: int, *_: object
            ) -> str | None:  # fmt: skip
    """Why these kernels cannot run a call, or None. Takes the op's checked arguments; never raises."""
    groups = qkv.unflatten(1, (-1, head_dim))
    reason = why_not_attention(groups, groups, groups, 0.0)
    if reason is None and any(w.shape[-1] > _MAX_KERNEL for w in depthwise):
        reason = f"a depthwise kernel wider than {_MAX_KERNEL}"
    if reason is None and any(w.numel() >= INT32 for w in (*depthwise, *pointwise)):
        reason = "a weight passes 2**31 elements"
    return reason


def _heads(map_: Tensor, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    # q, k and v of a map (B, 3C, H, W): views (B, heads, head_dim, H, W).
    query, key, value = map_.unflatten(1, (-1, 3, head_dim)).unbind(2)
    return query, key, value


def _problem(named: Sequence[tuple[str, Tensor]], kernel: int, biases: Sequence[Tensor | None]) -> ScaleProblem:
    given = (biases[0] is not None, biases[1] is not None)
    return ScaleProblem.of(named[0][1], named, INTERPRETED, kernel=kernel, biases=given)


def _weights(source: Tensor, wide: Tensor, mixing: Tensor, biases: Sequence[Tensor | None]) -> dict[str, Tensor]:
    # What the kernels read of a scale's weights: the depthwise one in the type of the sums, channels last. The pointer
    # of a bias that is not there is not read.
    first, second = (source if b is None else b.contiguous() for b in biases)
    taps = wide.flatten(1).t()
    held = torch.empty(taps.shape, dtype=sums_dtype(wide.dtype), device=wide.device).copy_(taps)
    return {"taps": held, "m": mixing.contiguous(), "wb": first, "mb": second}


def _channels_last(map_: Tensor) -> Tensor:
    return map_ if channels_last(map_) else map_.contiguous(memory_format=torch.channels_last)


def _aggregate(x: Tensor, head_dim: int, weights: dict[str, Tensor], kernel: int, biases: Sequence[Tensor | None]
               ) -> Tensor:  # fmt: skip
    """A scale of the map x: a map of its size, channels last."""
    out = torch.empty_like(x, memory_format=torch.channels_last)
    named = [(name, each.unflatten(1, (-1, head_dim))) for name, each in (("x", x), ("o", out))]
    run(aggregate_launches(_problem(named, kernel, biases)), dict(named) | weights, {})
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
    x = _channels_last(qkv) if depthwise else qkv
    for scale, part in enumerate(out.unflatten(1, (scales, heads, head_dim)).unbind(1)):
        source = qkv
        if scale:
            i = scale - 1
            wide, biases = depthwise[i], (depthwise_bias[i], pointwise_bias[i])
            source = _aggregate(x, head_dim, _weights(x, wide, pointwise[i], biases), wide.shape[-1], biases)
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
    x = _channels_last(qkv) if depthwise else qkv
    found = []
    for i, (wide, mixing) in enumerate(zip(depthwise, pointwise)):
        biases, kernel = (depthwise_bias[i], pointwise_bias[i]), wide.shape[-1]
        held = _weights(x, wide, mixing, biases)
        scale = _aggregate(x, head_dim, held, kernel, biases)
        heads = _heads(scale, head_dim)
        backward_into(heads, grads[1 + i], *heads, sums[1 + i], eps)
        if weights:
            found.append(_weight_gradients(scale, x, head_dim, held, wide, mixing, biases))
        else:
            found.append(tuple(qkv.new_empty(0) for _ in range(4)))
        named = [(name, each.unflatten(1, (-1, head_dim))) for name, each in (("e", scale), ("o", dqkv))]
        run(map_launches(_problem(named, kernel, biases)), dict(named) | held, {})
    return [dqkv, *(each for kind in zip(*found) for each in kind)]


def _weight_gradients(
    grad: Tensor,
    x: Tensor,
    head_dim: int,
    held: dict[str, Tensor],
    wide: Tensor,
    mixing: Tensor,
    biases: Sequence[Tensor | None],
) -> tuple[Tensor, ...]:
    """The gradients of a scale's four weights, given that of its map; empty for a bias that is not there."""
    named = [(name, each.unflatten(1, (-1, head_dim))) for name, each in (("g", grad), ("x", x))]
    kernel = wide.shape[-1]
    problem = _problem(named, kernel, biases)
    launches, slices = weight_launches(problem)
    found = [t.new_empty(t.shape) for t in (wide, mixing)]
    found += [x.new_empty(0) if bias is None else bias.new_empty(bias.shape) for bias in biases]
    size = (x.shape[1] // head_dim, problem.sum_rows, head_dim)
    made = {
        "parts": parts(slices, x, size),
        "sums": x.new_empty(size, dtype=sums_dtype(x.dtype)),
    }
    run(launches, dict(named) | held | made | dict(zip(("dw", "dm", "dwb", "dmb"), found)), {})
    return tuple(found)
