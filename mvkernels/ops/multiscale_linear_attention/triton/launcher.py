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
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from mvkernels.dispatch.checks import channels_last, empty_map
from mvkernels.dispatch.launches import run
from mvkernels.ops.multiscale_linear_attention import scales
from mvkernels.ops.multiscale_linear_attention.triton.plan import (
    aggregate_launches,
    map_launches,
    weight_launches,
)
from mvkernels.ops.relu_linear_attention import why_not_triton as why_not_attention
from mvkernels.triton.launch import parts
from mvkernels.triton.maps import INT32
from mvkernels.triton.problem import sums_dtype

_MAX_KERNEL = 31


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


def _channels_last(map_: Tensor) -> Tensor:
    return map_ if channels_last(map_) else map_.contiguous(memory_format=torch.channels_last)


class Convolutions(scales.Convolutions):
    """Those of the kernels here, on maps with channels last, and what these read of the weights."""

    @cached_property
    def _weights(self) -> dict[str, Tensor]:
        # The depthwise one in the type of the sums, channels last. The pointer of a bias that is not there is not read.
        mixing, taps = self.mixing.contiguous(), self.wide.flatten(1).t()
        first, second = (mixing if b is None else b.contiguous() for b in self.biases)
        held = torch.empty(taps.shape, dtype=sums_dtype(taps.dtype), device=taps.device).copy_(taps)
        return {"taps": held, "m": mixing, "wb": first, "mb": second}

    def aggregate(self, x: Tensor, to: Tensor) -> None:
        problem, maps = self.named(x=x, o=to)
        run(aggregate_launches(problem), maps | self._weights, {})

    def add_map_gradient(self, grad: Tensor, to: Tensor) -> None:
        problem, maps = self.named(e=grad, o=to)
        run(map_launches(problem), maps | self._weights, {})

    def weight_gradients(self, grad: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        problem, maps = self.named(g=grad, x=x)
        launches, slices = weight_launches(problem)
        found = self.empty_gradients()
        size = (x.shape[1] // self.head_dim, problem.sum_rows, self.head_dim)
        made = {"parts": parts(slices, x, size), "sums": x.new_empty(size, dtype=sums_dtype(x.dtype))}
        run(launches, maps | self._weights | made | found, {})
        return tuple(found.values())


def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    """(out, sums): see :func:`mvkernels.ops.multiscale_linear_attention.scales.forward`."""
    return scales.forward(Convolutions, _channels_last, *arguments)


def backward(grad: Tensor, qkv: Tensor, *more: Any) -> list[Tensor]:
    """[dqkv, dense in qkv's order; then the gradients of the weights]: see ``scales.backward``."""
    dqkv = empty_map(qkv, qkv.shape[1])
    return [dqkv, *scales.backward(Convolutions, _channels_last, dqkv, grad, qkv, *more)]
