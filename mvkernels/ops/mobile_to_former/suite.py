"""The maps and tokens of Mobile-Former, the floors of reading a map once, and the same work without this library."""

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
    return cases_of(_make, suite, written=False)


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
    return {"query": make_tokens(shape, batch, dtype, device, generator), "x": x}


def cost(arguments: Mapping[str, Any], backward: bool = False) -> Cost:
    """Floor of the forward, which reads the map, or of the backward alone, which reads it and writes its gradient."""
    query, x = arguments["query"], arguments["x"]
    pairs = x.numel() // x.shape[2] * query.shape[2]
    moved = x.numel() * x.element_size()
    return Cost(2 * moved, 10 * pairs * x.shape[2], pairs) if backward else Cost(moved, 4 * pairs * x.shape[2], pairs)


def eager(query: Tensor, x: Tensor, scale: float | None = None) -> Tensor:
    """Product, softmax, product, as the models' own code does."""
    scale = query.shape[3] ** -0.5 if scale is None else scale
    pixels = x.flatten(3)
    return (query @ pixels * scale).softmax(-1) @ pixels.transpose(-2, -1)


def sdpa(query: Tensor, x: Tensor, scale: float | None = None) -> Tensor:
    """PyTorch's scaled_dot_product_attention."""
    pixels = x.flatten(3).transpose(-2, -1)
    return scaled_dot_product_attention(query, pixels, pixels, scale=scale)


def flex(query: Tensor, x: Tensor, scale: float | None = None) -> Tensor:
    """PyTorch's FlexAttention."""
    pixels = x.flatten(3).transpose(-2, -1)
    return flex_attention(query, pixels, pixels, query.shape[3] ** -0.5 if scale is None else scale)


PEERS = {"eager": eager, "sdpa": sdpa}
THIRD_PARTY = {"flex": flex}
