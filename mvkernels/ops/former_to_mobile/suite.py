"""The maps and tokens of Mobile-Former, the floors of one pass over a map, and the same work without this library."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from mvkernels.dispatch.registry import Case, Cost
from mvkernels.ops.common.bridges import cases_of, make_map, make_tokens
from mvkernels.ops.common.peers import flex_attention


def cases(suite: str = "full") -> list[Case]:
    """The shape suite: "full", or "small" for a quick look."""
    return cases_of(_make, suite, written=True)


def _make(
    shape: Mapping[str, Any],
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    layout: str | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    x = make_map(shape, batch, dtype, device, layout, generator)
    key, value = (make_tokens(shape, batch, dtype, device, generator) for _ in range(2))
    return {"x": x, "key": key, "value": value}


def cost(arguments: Mapping[str, Any], backward: bool = False) -> Cost:
    """Floor of the forward, which reads and writes a map, or of the backward alone, which reads two and writes one."""
    x, key = arguments["x"], arguments["key"]
    pairs = x.numel() // x.shape[2] * key.shape[2]
    moved = x.numel() * x.element_size()
    return Cost((3 if backward else 2) * moved, (10 if backward else 4) * pairs * x.shape[2], pairs)


def eager(x: Tensor, key: Tensor, value: Tensor, scale: float | None = None, residual: bool = True) -> Tensor:
    """Product, softmax, product, sum, as the models' own code does."""
    scale = x.shape[2] ** -0.5 if scale is None else scale
    out = value.transpose(-2, -1) @ (key @ x.flatten(3) * scale).softmax(-2)
    out = out.unflatten(3, x.shape[3:])
    return x + out if residual else out


def sdpa(x: Tensor, key: Tensor, value: Tensor, scale: float | None = None, residual: bool = True) -> Tensor:
    """PyTorch's scaled_dot_product_attention, and the sum."""
    out = scaled_dot_product_attention(x.flatten(3).transpose(-2, -1), key, value, scale=scale)
    out = out.transpose(-2, -1).unflatten(3, x.shape[3:])
    return x + out if residual else out


def flex(x: Tensor, key: Tensor, value: Tensor, scale: float | None = None, residual: bool = True) -> Tensor:
    """PyTorch's FlexAttention, and the residual."""
    pixels = x.flatten(3).transpose(-2, -1)
    out = flex_attention(pixels, key, value, key.shape[3] ** -0.5 if scale is None else scale)
    out = out.transpose(-2, -1).unflatten(3, x.shape[3:])
    return x + out if residual else out


PEERS = {"eager": eager, "sdpa": sdpa}
THIRD_PARTY = {"flex": flex}
