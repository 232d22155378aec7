"""multiscale_linear_attention with its convolutions in CUDA C++; the attention is relu_linear_attention's, on Triton.

Forward: ``aggregate`` makes a scale's qkv, both convolutions in one pass; the attention reads the heads of each scale
where they lie in it and writes them where they belong in the output. Nothing is concatenated.
Backward: a scale's qkv is made again; the attention's gradient takes its place; ``weight_sums`` makes the gradients of
the weights of it and of qkv, in two stages; ``map_gradient`` brings it to qkv, and adds it to what is there.
The kernels read 16 bytes at once of a pixel's channels. A map that is not so is copied before, and the gradient of one
with channels first after.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from mvkernels.cuda import modules
from mvkernels.dispatch.checks import channels_last, empty_map
from mvkernels.dispatch.launches import run
from mvkernels.dispatch.registry import OPS
from mvkernels.ops.multiscale_linear_attention import scales
from mvkernels.ops.multiscale_linear_attention.cuda import plan
from mvkernels.ops.multiscale_linear_attention.cuda.plan import aggregate_launches, map_launches, weight_launches
from mvkernels.triton.maps import INT32, needed

_BYTES = 16
"""Of a load, and so the alignment of what is read so."""


def why_not(qkv: Tensor, depthwise: Sequence[Tensor], pointwise: Sequence[Tensor], head_dim: int, *more: object
            ) -> str | None:  # fmt: skip
    """Why these kernels cannot run a call, or None. Takes the op's checked arguments; never raises."""
    attention = OPS["multiscale_linear_attention"].why_not["triton"]
    if reason := modules.why_not(qkv) or attention(qkv, depthwise, pointwise, head_dim, *more):
        return reason
    batch, channels, height, width = qkv.shape
    if max(batch * channels * height * width // 64, channels, height, width) >= INT32:
        return "more than 2**31 tiles"
    return plan.why_not(qkv.dtype, head_dim, [w.shape[-1] for w in depthwise], modules.arch_of(qkv.device.index))


def _aligned(map_: Tensor) -> bool:
    # Whether the kernels may read a map (B, C, H, W) where it is.
    if not channels_last(map_) or map_.data_ptr() % _BYTES:
        return False
    strides = needed(map_.unsqueeze(1).stride(), map_.unsqueeze(1).shape)
    return all(stride * map_.element_size() % _BYTES == 0 for stride in (strides[0], *strides[3:]))


def readable(map_: Tensor) -> Tensor:
    """A map (B, C, H, W) as the kernels read it: itself, or a copy."""
    return map_ if _aligned(map_) else scales.empty_scale(map_).copy_(map_)


class Convolutions(scales.Convolutions):
    """Those of the kernels here, on maps as :func:`readable` gives them, and what these read of the weights."""

    @cached_property
    def _tensors(self) -> dict[str, Tensor]:
        mixing = self.mixing.contiguous()
        if mixing.data_ptr() % _BYTES:
            mixing = mixing.clone()
        # The pointer of a bias that is not there is not read.
        first, second = (mixing if b is None else b.contiguous() for b in self.biases)
        return {"wide": self.wide.contiguous(), "m": mixing, "wb": first, "mb": second}

    def aggregate(self, x: Tensor, to: Tensor) -> None:
        problem, maps = self.named(x=x, o=to)
        run(aggregate_launches(problem), maps | self._tensors, {})

    def add_map_gradient(self, grad: Tensor, to: Tensor) -> None:
        problem, maps = self.named(g=grad, o=to)
        run(map_launches(problem), maps | self._tensors, {})

    def weight_gradients(self, grad: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        problem, maps = self.named(g=grad, x=x)
        launches, shape = weight_launches(problem)
        found = self.empty_gradients()
        parts = x.new_empty(shape, dtype=torch.float32)
        run(launches, maps | self._tensors | {"parts": parts} | found, {})
        return tuple(found.values())


def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    """(out, sums): see :func:`mvkernels.ops.multiscale_linear_attention.scales.forward`."""
    return scales.forward(Convolutions, readable, *arguments)


def backward(grad: Tensor, qkv: Tensor, sums: Tensor, depthwise: Sequence[Tensor], *more: Any) -> list[Tensor]:
    """[dqkv, dense in qkv's order; then the gradients of the weights]: see ``scales.backward``."""
    in_place = not depthwise or channels_last(qkv)
    dqkv = empty_map(qkv, qkv.shape[1]) if in_place else scales.empty_scale(qkv)
    found = scales.backward(Convolutions, readable, dqkv, grad, qkv, sums, depthwise, *more)
    return [dqkv if in_place else empty_map(qkv, qkv.shape[1]).copy_(dqkv), *found]
