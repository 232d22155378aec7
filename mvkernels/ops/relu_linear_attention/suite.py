"""The maps of EfficientViT, DC-AE and Sana, the floors of linear attention, and the same work without this library."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from mvkernels.dispatch.registry import Case, Cost
from mvkernels.ops.common.linear import LAYOUTS, eager, shapes
from mvkernels.ops.common.maps import convolved


def cases(suite: str = "full") -> list[Case]:
    """The shape suite: "full", or "small" for a quick look. All scales' heads are one call's."""
    found = []
    for model, heads, dim, kernel, side in shapes(suite):
        shape = {"heads": heads * (2 if kernel else 1), "head_dim": dim, "height": side, "width": side}
        label = f"{shape['heads']}x{dim}_{side}x{side}"
        found.append(Case(label, model, partial(_make, shape), LAYOUTS, shape))
    return found


def _make(
    shape: Mapping[str, Any],
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    layout: str | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Query, key and value as slices of one map, by head [q | k | v]."""
    heads, dim = shape["heads"], shape["head_dim"]
    generator = torch.Generator().manual_seed(seed)
    qkv = convolved(3 * heads * dim, shape, batch, dtype, device, layout, generator)
    return dict(zip(("query", "key", "value"), qkv.unflatten(1, (heads, 3, dim)).unbind(2)))


def cost(arguments: Mapping[str, Any], backward: bool = False) -> Cost:
    """Floor of the forward, or of the backward alone (which reads q, k, v, dout and writes dq, dk, dv)."""
    query = arguments["query"]
    size, dim = query.numel(), query.shape[2]
    if backward:
        return Cost(7 * size * query.element_size(), 8 * size * dim, 0)
    return Cost(4 * size * query.element_size(), 4 * size * dim, 0)


PEERS = {"eager": eager}
