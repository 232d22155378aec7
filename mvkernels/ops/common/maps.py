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


def qkv(
    shape: Mapping[str, Any],
    batch: int,
    dtype: torch.dtype,
    device: torch.device | str,
    layout: str | None,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """query, key and value as views of one packed map, channels_last of a Linear or channels_first of a convolution."""
    heads, dim, value_dim = shape["heads"], shape["head_dim"], shape["value_dim"]
    packed = torch.randn(batch, shape["height"], shape["width"], heads * (2 * dim + value_dim), generator=generator)
    packed = packed.to(device=device, dtype=dtype).permute(0, 3, 1, 2)
    if layout == "channels_first":
        packed = packed.contiguous()
    parts = packed.split((heads * dim, heads * dim, heads * value_dim), dim=1)
    return dict(zip(("query", "key", "value"), (part.unflatten(1, (heads, -1)) for part in parts)))


class Drawn:
    """Random weights and maps of one call, drawn one after the other."""

    def __init__(
        self, shape: Mapping[str, Any], batch: int, dtype: torch.dtype, device: torch.device | str, seed: int
    ) -> None:
        self._size = (batch, shape["height"], shape["width"])
        self._dtype, self._device = dtype, device
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, *size: int, spread: float = 1.0, mean: float = 0.0) -> Tensor:
        """Normally distributed numbers."""
        drawn = torch.randn(*size, generator=self._generator) * spread + mean
        return drawn.to(device=self._device, dtype=self._dtype)

    def pixels(self, channels: int, layout: str | None = None) -> Tensor:
        """A map (B, channels, H, W), channels-last unless the layout says "channels_first"."""
        x = self.normal(*self._size, channels).permute(0, 3, 1, 2)
        return x.contiguous() if layout == "channels_first" else x
