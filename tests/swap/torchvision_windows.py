"""Window attention of torchvision with random weights, and what it takes."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

from tests.swap.conftest import randomise

pytest.importorskip("torchvision")


def attention(
    kind: str = "ShiftedWindowAttention",
    window: Sequence[int] = (4, 4),
    shift: Sequence[int] = (2, 2),
    heads: int = 3,
    **settings: Any,
) -> nn.Module:
    from torchvision.models import swin_transformer

    return randomise(getattr(swin_transformer, kind)(12, [*window], [*shift], heads, **settings))


def drawn(batch: int = 2, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(batch, 8, 12, 12, dtype=dtype)


EVERY = {
    "torchvision_swin": (attention, drawn, "torchvision_swin", {"attention_dropout": 0.5}),
    "torchvision_swin, v2": (
        functools.partial(attention, "ShiftedWindowAttentionV2"), drawn, "torchvision_swin", {"attention_dropout": 0.5}
    ),
}  # fmt: skip
