"""Maps as models have them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def convolved(
    channels: int,
    shape: Mapping[str, Any],
    batch: int,
    dtype: torch.dtype,
    device: torch.device | str,
    layout: str | None,
    generator: torch.Generator,
) -> Tensor:
    """A map (B, channels, H, W) as a convolution leaves it."""
    x = torch.randn(batch, channels, shape["height"], shape["width"], generator=generator)
    last = layout == "channels_last"
    return x.to(device, dtype, memory_format=torch.channels_last if last else torch.contiguous_format)
