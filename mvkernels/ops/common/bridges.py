"""The maps and tokens that Mobile-Former's bridges meet."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mvkernels.dispatch.registry import Case
from mvkernels.ops.common.maps import convolved

HEADS = 2
LAYOUTS = ("channels_first", "channels_last")
# model, tokens, channels and side of the maps that its blocks read; those of 112 x 112 are read and not written.
# The 52M has the maps and tokens of the 26M, the 151M the maps of the 96M with the tokens of the 214M.
_MODELS: tuple[tuple[str, int, tuple[tuple[int, int], ...]], ...] = (
    ("mobile_former_26m@224", 3, ((12, 56), (24, 28), (48, 14), (64, 14), (96, 7))),
    ("mobile_former_96m@224", 4, ((12, 112), (16, 56), (32, 28), (64, 14), (88, 14), (128, 7))),
    ("mobile_former_214m@224", 6, ((12, 112), (20, 56), (40, 28), (80, 14), (112, 14), (160, 7))),
    ("mobile_former_294m@224", 6, ((16, 112), (24, 56), (48, 28), (96, 14), (128, 14), (192, 7))),
    ("mobile_former_508m@224", 6, ((24, 112), (40, 56), (72, 28), (128, 14), (176, 14), (240, 7))),
)
_SMALL = ("mobile_former_26m@224", "mobile_former_508m@224")

Make = Callable[..., dict[str, Any]]


def cases_of(make: Make, suite: str, written: bool) -> list[Case]:
    """The shape suite, "full" or "small"; ``written``: only the maps that Former to Mobile writes."""
    found = []
    for model, tokens, maps in _MODELS:
        if suite == "small" and model not in _SMALL:
            continue
        for channels, side in maps:
            if side == 112 and (written or suite == "small"):
                continue
            dim = channels // HEADS
            shape = {"heads": HEADS, "head_dim": dim, "tokens": tokens, "height": side, "width": side}
            label = f"{HEADS}x{dim}_{side}x{side}_m{tokens}"
            found.append(Case(label, model, partial(make, shape), LAYOUTS, shape))
    return found


def make_map(
    shape: Mapping[str, Any],
    batch: int,
    dtype: torch.dtype,
    device: torch.device | str,
    layout: str | None,
    generator: torch.Generator,
) -> Tensor:
    """A map (B, heads, head_dim, H, W) as a convolution leaves it."""
    channels = shape["heads"] * shape["head_dim"]
    x = convolved(channels, shape, batch, dtype, device, layout, generator)
    return x.unflatten(1, (shape["heads"], -1))


def make_tokens(
    shape: Mapping[str, Any], batch: int, dtype: torch.dtype, device: torch.device | str, generator: torch.Generator
) -> Tensor:
    """Tokens (B, heads, M, head_dim) as a Linear leaves them."""
    channels = shape["heads"] * shape["head_dim"]
    tokens = torch.randn(batch, shape["tokens"], channels, generator=generator).to(device=device, dtype=dtype)
    return tokens.unflatten(-1, (shape["heads"], -1)).transpose(1, 2)
