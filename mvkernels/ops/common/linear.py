"""The maps that linear attention meets in EfficientViT, DC-AE and Sana, and how their own code computes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

LAYOUTS = ("channels_first", "channels_last")
# model, head_dim, kernel of its one further scale (0: none), its maps as (heads of a scale, side)
MODELS: tuple[tuple[str, int, int, tuple[tuple[int, int], ...]], ...] = (
    ("efficientvit_b0@224", 16, 5, ((4, 14), (8, 7))),
    ("efficientvit_b0@512", 16, 5, ((4, 32), (8, 16))),
    ("efficientvit_b1@224", 16, 5, ((8, 14), (16, 7))),
    ("efficientvit_b1@512", 16, 5, ((8, 32), (16, 16))),
    ("efficientvit_b1@1024", 16, 5, ((8, 64),)),
    ("efficientvit_b2@224", 32, 5, ((6, 14), (12, 7))),
    ("efficientvit_b2@512", 32, 5, ((6, 32), (12, 16))),
    ("efficientvit_b3@224", 32, 5, ((8, 14), (16, 7))),
    ("efficientvit_b3@512", 32, 5, ((8, 32), (16, 16))),
    ("efficientvit_l1@224", 32, 5, ((16, 7),)),  # L2 has the maps of L1
    ("efficientvit_l1@512", 32, 5, ((16, 16),)),
    ("efficientvit_l3@224", 32, 5, ((32, 7),)),
    ("efficientvit_l3@512", 32, 5, ((32, 16),)),
    ("dc_ae_f32@512", 32, 5, ((16, 64), (32, 32), (32, 16))),
    ("sana_600m@1024", 32, 0, ((36, 32),)),
    ("sana_1600m@1024", 32, 0, ((70, 32),)),
)
_SMALL = ("efficientvit_b0@224", "efficientvit_b3@224", "efficientvit_b1@512")

Make = Callable[..., dict[str, Any]]


def shapes(suite: str) -> Iterator[tuple[str, int, int, int, int]]:
    """(model, heads of a scale, head_dim, kernel, side) of the suite, "full" or "small"."""
    for model, dim, kernel, maps in MODELS:
        if suite == "full" or model in _SMALL:
            for heads, side in maps:
                yield model, heads, dim, kernel, side


def eager(query: Tensor, key: Tensor, value: Tensor, eps: float = 1e-15) -> Tensor:
    """As the models' own code: float32, the keys' sum by a row of ones under the values, two products, a division."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    q, k, v = (m.flatten(3).to(dtype) for m in (query, key, value))
    v = pad(v, (0, 0, 0, 1), value=1.0)
    out = v @ k.relu().transpose(-2, -1) @ q.relu()
    return (out[:, :, :-1] / (out[:, :, -1:] + eps)).to(query.dtype).unflatten(3, query.shape[3:])
