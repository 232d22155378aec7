"""What the ops' third-party peers share: FlexAttention, and modules of packages. A call imports, nothing before it."""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from mvkernels.dispatch.registry import NotOffered


@cache
def _flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, fullgraph=True, dynamic=False)


def flex_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, bias: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:
    """PyTorch's FlexAttention, compiled as it is meant to be, on (B, heads, N, D), with ``bias`` (heads, N, M).

    ``mask`` (windows, N, M) is added too, that of window ``b % windows`` to item b of the batch.
    """
    if query.device.type == "cpu" and torch.is_grad_enabled() and query.requires_grad:
        raise NotOffered("FlexAttention has no backward on a CPU")

    def biased(score: Tensor, batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        score = score if bias is None else score + bias[head, row, column]
        return score if mask is None else score + mask[batch % mask.shape[0], row, column]

    plain = bias is None and mask is None
    return _flex()(query, key, value, score_mod=None if plain else biased, scale=scale)


def package(name: str, part: str) -> Any:
    """``part`` of another package; ImportError where that is not installed, or does not import."""
    from mvkernels import third_party  # not at the top: the ops must not need what the commands need
    from mvkernels.report import UsageError

    try:
        third_party.load(name)
        return importlib.import_module(f"{name}.{part}")
    except UsageError as error:
        raise ImportError(str(error)) from None


class Given(nn.Module):
    """In place of a projection: gives what it was given, whatever it is called with."""

    value: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor | None:
        return self.value


class Part(nn.Module):
    """In place of a projection: the first, second or third part of the channels, which are last in the shape."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index

    def forward(self, x: Tensor) -> Tensor:
        return x.chunk(3, dim=-1)[self.index]


def weigh(module: nn.Module, weight: Tensor) -> None:
    """Put a tensor where a module has its weight, as it is, so that gradients reach it."""
    module._parameters.pop("weight", None)
    module.weight = weight


def in_float32(who: str, tensor: Tensor) -> None:
    """Raise NotOffered for float64, which this package would round."""
    if tensor.dtype == torch.float64:
        raise NotOffered(f"{who} computes in float32")
