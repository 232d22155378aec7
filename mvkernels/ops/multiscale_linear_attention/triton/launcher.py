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
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from mvkernels.dispatch.checks import channels_last, empty_map
from mvkernels.dispatch.launches import run
from mvkernels.ops.multiscale_linear_attention import scales
from mvkernels.ops.multiscale_linear_attention.triton.plan import (
    ScaleProblem,
    aggregate_launches,
    map_launches,
    weight_launches,
)
from mvkernels.ops.relu_linear_attention import why_not_triton as why_not_attention
from mvkernels.triton.launch import INTERPRETED, parts
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


@dataclass(frozen=True)
class Convolutions:
    """The two convolutions that make a scale, and what the kernels read of their weights."""

    head_dim: int
    wide: Tensor
    mixing: Tensor
    biases: tuple[Tensor | None, Tensor | None]

    def _named(self, **maps: Tensor) -> dict[str, Tensor]:
        return {name: each.unflatten(1, (-1, self.head_dim)) for name, each in maps.items()}

    def _problem(self, named: dict[str, Tensor]) -> ScaleProblem:
        given = (self.biases[0] is not None, self.biases[1] is not None)
        maps = list(named.items())
        return ScaleProblem.of(maps[0][1], maps, INTERPRETED, kernel=self.wide.shape[-1], biases=given)

    @cached_property
    def _weights(self) -> dict[str, Tensor]:
        # The depthwise one in the type of the sums, channels last. The pointer of a bias that is not there is not read.
        mixing, taps = self.mixing.contiguous(), self.wide.flatten(1).t()
        first, second = (mixing if b is None else b.contiguous() for b in self.biases)
        held = torch.empty(taps.shape, dtype=sums_dtype(taps.dtype), device=taps.device).copy_(taps)
        return {"taps": held, "m": mixing, "wb": first, "mb": second}

    def aggregate(self, x: Tensor) -> Tensor:
        """The scale of a map: a map of its size, channels last."""
        out = torch.empty_like(x, memory_format=torch.channels_last)
        named = self._named(x=x, o=out)
        run(aggregate_launches(self._problem(named)), named | self._weights, {})
        return out

    def add_map_gradient(self, grad: Tensor, to: Tensor) -> None:
        """Add the gradient of x, given that of the scale, which is written over."""
        named = self._named(e=grad, o=to)
        run(map_launches(self._problem(named)), named | self._weights, {})

    def weight_gradients(self, grad: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        """The gradients of the four weights, given that of the scale; empty for a bias that is not there."""
        named = self._named(g=grad, x=x)
        problem = self._problem(named)
        launches, slices = weight_launches(problem)
        found = [t.new_empty(t.shape) for t in (self.wide, self.mixing)]
        found += [x.new_empty(0) if bias is None else bias.new_empty(bias.shape) for bias in self.biases]
        size = (x.shape[1] // self.head_dim, problem.sum_rows, self.head_dim)
        made = {"parts": parts(slices, x, size), "sums": x.new_empty(size, dtype=sums_dtype(x.dtype))}
        results = dict(zip(("dw", "dm", "dwb", "dmb"), found))
        run(launches, named | self._weights | made | results, {})
        return tuple(found)


def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    """(out, sums): see :func:`mvkernels.ops.multiscale_linear_attention.scales.forward`."""
    return scales.forward(Convolutions, _channels_last, *arguments)


def backward(grad: Tensor, qkv: Tensor, *more: Any) -> list[Tensor]:
    """[dqkv, dense in qkv's order; then the gradients of the weights]: see ``scales.backward``."""
    dqkv = empty_map(qkv, qkv.shape[1])
    return [dqkv, *scales.backward(Convolutions, _channels_last, dqkv, grad, qkv, *more)]
