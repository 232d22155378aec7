"""Window attention whose projections run on packed weights, and whose position biases are made once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from mvkernels.swap.packing import layers
from mvkernels.swap.packing.blocks import not_own
from mvkernels.swap.packing.plans import Keep

Product = Callable[[Tensor], Tensor]


def projections(
    attention: Any, bias: Tensor | None, after: Iterable[Any], keep: Keep
) -> tuple[Product, Product] | None:
    """The products of ``attention.qkv`` with this bias and of ``attention.proj`` with the modules ``after`` it, of
    tokens (..., C); None if there is no op for one, or not for its present state."""
    if layers.not_linear(attention.qkv) or (bias is not None and bias.dtype != torch.float32):
        return None
    out = layers.multiplication(attention.proj, keep, after)
    held = SimpleNamespace(weight=attention.qkv.weight, bias=bias)
    return None if out is None else (layers.of_tokens(layers.linear(held, keep)), out)


def not_continuous(mlp: Any) -> str:
    """Why Swin V2's MLP of the offsets cannot be called once for many calls; empty if it can."""
    kinds = (nn.Linear, nn.ReLU, nn.Linear)
    reason = not_own(mlp, nn.Sequential) or ("" if len(mlp) == len(kinds) else "it has other layers")
    return reason or next((r for part, kind in zip(mlp, kinds) if (r := not_own(part, kind))), "")
