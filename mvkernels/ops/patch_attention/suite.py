"""The shapes that patch attention meets in models, its floors, and the same work without this library."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from mvkernels.dispatch.registry import Case, Cost
from mvkernels.ops.common.groups import attention, fold, patch_pairs, unfold
from mvkernels.ops.common.maps import qkv

# model, its stages as (heads, head_dim, value_dim, map side), patch, bias, layouts
_MODELS: tuple[tuple[str, tuple[tuple[int, int, int, int], ...], int, bool, tuple[str, ...]], ...] = (
    ("mobilevit_xxs@256", ((4, 16, 16, 32), (4, 20, 20, 16), (4, 24, 24, 8)), 2, False, ("channels_last",)),
    ("mobilevit_xs@256", ((4, 24, 24, 32), (4, 30, 30, 16), (4, 36, 36, 8)), 2, False, ("channels_last",)),
    ("mobilevit_s@256", ((4, 36, 36, 32), (4, 48, 48, 16), (4, 60, 60, 8)), 2, False, ("channels_last",)),
    ("mobilevit_s@512", ((4, 36, 36, 64), (4, 48, 48, 32), (4, 60, 60, 16)), 2, False, ("channels_last",)),
    ("efficientformer@224", ((8, 32, 128, 7),), 1, True, ("channels_last",)),
    ("coatnet_0@224", ((12, 32, 32, 14), (24, 32, 32, 7)), 1, True, ("channels_first", "channels_last")),
)
_SMALL = ("mobilevit_s@256", "efficientformer@224")


def cases(suite: str = "full") -> list[Case]:
    """The shape suite: "full", or "small" for a quick look."""
    found = []
    for model, stages, patch, bias, layouts in _MODELS:
        if suite == "small" and model not in _SMALL:
            continue
        for heads, dim, value_dim, side in stages:
            shape = {
                "heads": heads,
                "head_dim": dim,
                "value_dim": value_dim,
                "height": side,
                "width": side,
                "patch": patch,
                "bias": bias,
            }
            label = f"{heads}x{dim}{f'/{value_dim}' if value_dim != dim else ''}_{side}x{side}_p{patch}"
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
    heads, height, width = shape["heads"], shape["height"], shape["width"]
    arguments: dict[str, Any] = dict(qkv(shape, batch, dtype, device, layout or default_layout, generator))
    arguments["patch_size"] = (shape["patch"], shape["patch"])
    if shape["bias"]:
        n = height * width // shape["patch"] ** 2
        arguments["bias"] = torch.randn(heads, n, n, generator=generator).to(device=device, dtype=dtype)
    return arguments


def cost(arguments: Mapping[str, Any], backward: bool = False) -> Cost:
    """Floor of the forward, or of the backward alone (which reads q, k, v, out, dout and writes dq, dk, dv)."""
    query, value, bias = arguments["query"], arguments["value"], arguments.get("bias")
    b, h, d, height, width = query.shape
    dv, pixels, partners = value.shape[2], height * width, value.shape[3] * value.shape[4]
    pairs = patch_pairs(query.shape[3:], value.shape[3:], arguments["patch_size"])
    bias_bytes = 0 if bias is None else bias.numel() * bias.element_size()
    if backward:
        moved = 2 * b * h * (d + dv) * (pixels + partners) * query.element_size() + 2 * bias_bytes
        return Cost(moved, b * h * pairs * (6 * d + 4 * dv), b * h * pairs)
    moved = b * h * (d + dv) * (pixels + partners) * query.element_size() + bias_bytes
    return Cost(moved, b * h * pairs * 2 * (d + dv), b * h * pairs)


def eager(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    patch_size: tuple[int, int],
    bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Unfold, matmul, softmax, matmul, fold, as the models' own code does."""
    height, width = query.shape[-2:]
    scale = query.shape[2] ** -0.5 if scale is None else scale
    q, k, v = (unfold(m, *patch_size) for m in (query, key, value))
    return fold(attention(q, k, v, bias, scale), *patch_size, height, width)


def sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    patch_size: tuple[int, int],
    bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Unfold, PyTorch's scaled_dot_product_attention, fold."""
    mask = None if bias is None else bias[None]
    return over_groups(
        query, key, value, patch_size, partial(scaled_dot_product_attention, attn_mask=mask, scale=scale)
    )


def over_groups(
    query: Tensor, key: Tensor, value: Tensor, patch_size: tuple[int, int], attend: Callable[..., Tensor]
) -> Tensor:
    """Unfold, ``attend`` on (B · groups, heads, N, head_dim), fold.

    Groups come before heads, so that a bias (heads, N, N) broadcasts over the 4-D shape that fused kernels take.
    """
    q, k, v = (unfold(m, *patch_size).transpose(1, 2).flatten(0, 1) for m in (query, key, value))
    out = attend(q, k, v).unflatten(0, (query.shape[0], -1)).transpose(1, 2)
    return fold(out, *patch_size, *query.shape[-2:])


PEERS = {"eager": eager, "sdpa": sdpa}
