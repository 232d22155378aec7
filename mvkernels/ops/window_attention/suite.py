"""The shapes that window attention meets in models, its floors, and the same work without this library."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from mvkernels.dispatch.checks import lay_as
from mvkernels.dispatch.registry import Case, Cost, NotOffered
from mvkernels.ops.common.groups import attention, attention_cost, partition, reverse, window_pairs
from mvkernels.ops.common.maps import qkv

Pair = tuple[int, int]

# model, its stages as (heads, head_dim, map side, window), whether every other block is shifted, layouts
_MODELS: tuple[tuple[str, tuple[tuple[int, int, int, int], ...], bool, tuple[str, ...]], ...] = (
    ("swin_tiny@224", ((3, 32, 56, 7), (6, 32, 28, 7), (12, 32, 14, 7), (24, 32, 7, 7)), True, ("channels_last",)),
    ("swinv2_tiny@256", ((3, 32, 64, 8), (6, 32, 32, 8), (12, 32, 16, 8), (24, 32, 8, 8)), True, ("channels_last",)),
    ("swin_large@384", ((6, 32, 96, 12), (12, 32, 48, 12), (24, 32, 24, 12)), True, ("channels_last",)),
    ("swinv2_base@384", ((4, 32, 96, 24), (16, 32, 24, 24)), True, ("channels_last",)),
    ("maxvit_tiny@224", ((2, 32, 56, 7), (4, 32, 28, 7), (8, 32, 14, 7)), False, ("channels_last", "channels_first")),
    ("maxvit_base@512", ((6, 32, 64, 16), (12, 32, 32, 16)), False, ("channels_last",)),
    ("tiny_vit_5m@224", ((4, 32, 28, 7), (5, 32, 14, 14), (10, 32, 7, 7)), False, ("channels_last",)),
    ("tiny_vit_21m@512", ((6, 32, 64, 16), (12, 32, 32, 32)), False, ("channels_last",)),
)
_SMALL = ("swin_tiny@224",)


def cases(suite: str = "full") -> list[Case]:
    """The shape suite: "full", or "small" for a quick look."""
    found = []
    for model, stages, shifted, layouts in _MODELS:
        if suite == "small" and model not in _SMALL:
            continue
        for heads, dim, side, window in stages:
            # Models drop the shift where a window is the whole map.
            for shift in (0, window // 2) if shifted and window < side else (0,):
                shape = {
                    "heads": heads,
                    "head_dim": dim,
                    "value_dim": dim,
                    "height": side,
                    "width": side,
                    "window": window,
                    "shift": shift,
                }
                label = f"{heads}x{dim}_{side}x{side}_w{window}{f's{shift}' if shift else ''}"
                found.append(Case(label, model, partial(_make, shape, layouts[0]), layouts, shape))
    return found


def _make(
    shape: Mapping[str, Any],
    default_layout: str,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    layout: str | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Arguments as models have them."""
    generator = torch.Generator().manual_seed(seed)
    arguments: dict[str, Any] = dict(qkv(shape, batch, dtype, device, layout or default_layout, generator))
    window, shift = shape["window"], shape["shift"]
    bias = torch.randn(shape["heads"], window**2, window**2, generator=generator).to(device=device, dtype=dtype)
    return {**arguments, "window_size": (window, window), "shift": (shift, shift), "bias": bias}


def cost(arguments: Mapping[str, Any], backward: bool = False) -> Cost:
    """Floor of the forward, or of the backward alone."""
    window, shift = arguments["window_size"], arguments.get("shift", (0, 0))
    return attention_cost(arguments, window_pairs(arguments["query"].shape[3:], window, shift), backward)


@cache
def _mask(sizes: Pair, window: Pair, shift: Pair, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(windows, N, N): -100 between pixels of a rolled map that did not lie side by side, as Swin has it."""
    region = torch.zeros(1, 1, 1, *sizes)
    for axis, (extent, by) in enumerate(zip(window, shift)):
        place = torch.arange(sizes[axis]).view((-1, 1) if axis == 0 else (1, -1))
        region += (place >= sizes[axis] - extent).int() * 3**axis + (place >= sizes[axis] - by).int() * 3**axis
    region = partition(region, *window)[0, 0, :, :, 0]
    return ((region[:, None] != region[:, :, None]) * -100.0).to(device, dtype)


def over_windows(
    query: Tensor, key: Tensor, value: Tensor, window: Pair, shift: Pair, attend: Callable[..., Tensor]
) -> Tensor:
    """Roll, partition, ``attend`` on (B, heads, windows, N, D) and the mask, reverse, roll back, as models do."""
    sizes = (query.shape[3], query.shape[4])
    if sizes[0] % window[0] or sizes[1] % window[1]:
        raise NotOffered("peers roll maps that the windows divide")
    mask, maps = None, (query, key, value)
    if any(shift):
        mask = _mask(sizes, window, shift, query.dtype, query.device)
        maps = tuple(m.roll((-shift[0], -shift[1]), (3, 4)) for m in maps)  # type: ignore[assignment]
    out = reverse(attend(*(partition(m, *window) for m in maps), mask), *window, *sizes)
    return lay_as(out.roll(shift, (3, 4)) if any(shift) else out, query)


def eager(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window_size: Pair,
    shift: Pair = (0, 0),
    bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Matmul, bias, mask, softmax, matmul, as the models' own code does."""
    scale = query.shape[2] ** -0.5 if scale is None else scale

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        if mask is None:
            return attention(q, k, v, bias, scale)
        scores = q * scale @ k.transpose(-2, -1)
        scores = scores + mask if bias is None else scores + bias[:, None] + mask
        return scores.softmax(-1) @ v

    return over_windows(query, key, value, window_size, shift, attend)


def sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window_size: Pair,
    shift: Pair = (0, 0),
    bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """PyTorch's scaled_dot_product_attention with bias and mask as its one mask."""

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        added = None if bias is None else bias[None]
        if mask is not None:
            added = mask[:, None] if added is None else mask[:, None] + added
            added = added.repeat(q.shape[0], 1, 1, 1)  # (B * windows, heads, N, N)
        attend = partial(scaled_dot_product_attention, attn_mask=added, scale=scale)
        return over_batch(q, k, v, attend)

    return over_windows(query, key, value, window_size, shift, attend)


def over_batch(query: Tensor, key: Tensor, value: Tensor, attend: Callable[..., Tensor]) -> Tensor:
    """``attend`` on (B * windows, heads, N, D), the shape that fused kernels take."""
    flat = (m.transpose(1, 2).flatten(0, 1) for m in (query, key, value))
    return attend(*flat).unflatten(0, (query.shape[0], -1)).transpose(1, 2)


PEERS = {"eager": eager, "sdpa": sdpa}
