"""The shapes that patch attention meets in models, its floors, and the same work without this library."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from mvkernels.dispatch.checks import lay_as
from mvkernels.dispatch.registry import Case, Cost
from mvkernels.ops.common.groups import attention, attention_cost, fold, patch_pairs, unfold
from mvkernels.ops.common.maps import qkv


class _Stage(NamedTuple):
    heads: int
    head_dim: int
    side: int
    patch: int = 2
    bias: bool = False
    value_dim: int | None = None
    """Of the value, if not head_dim."""
    key_side: int | None = None
    """Of the key and value map, if it is another one; channels_last then, each map by itself."""
    shared: bool = False
    """Whether the heads share one key and one value (multi-query attention)."""


_LAST, _BOTH = ("channels_last",), ("channels_first", "channels_last")
_MODELS: tuple[tuple[str, tuple[_Stage, ...], tuple[str, ...]], ...] = (
    ("mobilevit_xxs@256", (_Stage(4, 16, 32), _Stage(4, 20, 16), _Stage(4, 24, 8)), _LAST),
    ("mobilevit_xs@256", (_Stage(4, 24, 32), _Stage(4, 30, 16), _Stage(4, 36, 8)), _LAST),
    ("mobilevit_s@256", (_Stage(4, 36, 32), _Stage(4, 48, 16), _Stage(4, 60, 8)), _LAST),
    ("mobilevit_s@512", (_Stage(4, 36, 64), _Stage(4, 48, 32), _Stage(4, 60, 16)), _LAST),
    ("efficientformer@224", (_Stage(8, 32, 7, 1, True, 128),), _LAST),
    ("coatnet_0@224", (_Stage(12, 32, 14, 1, True), _Stage(24, 32, 7, 1, True)), _BOTH),
    # MaxViT's grids of 7 x 7
    (
        "maxvit_tiny@224",
        (_Stage(2, 32, 56, 8, True), _Stage(4, 32, 28, 4, True), _Stage(8, 32, 14, 2, True)),
        _BOTH[::-1],
    ),
    ("levit_128@224", (_Stage(4, 16, 14, 1, True, 32), _Stage(8, 16, 7, 1, True, 32)), _LAST),
    ("levit_128@224", (_Stage(8, 16, 7, 1, True, 64, 14), _Stage(16, 16, 4, 1, True, 64, 7)), _LAST),
    ("mobilenetv4_hybrid@256", (_Stage(4, 64, 16, 1, key_side=8, shared=True),), ("channels_first",)),
    ("mobilenetv4_hybrid@256", (_Stage(4, 64, 8, 1, key_side=8, shared=True),), ("channels_first",)),
)
_SMALL = ("mobilevit_s@256", "efficientformer@224")


def cases(suite: str = "full") -> list[Case]:
    """The shape suite: "full", or "small" for a quick look."""
    found = []
    for model, stages, layouts in _MODELS:
        for stage in stages if suite != "small" or model in _SMALL else ():
            shape = {
                "heads": stage.heads,
                "head_dim": stage.head_dim,
                "value_dim": stage.value_dim or stage.head_dim,
                "height": stage.side,
                "width": stage.side,
                "patch": stage.patch,
                "bias": stage.bias,
                "key_side": stage.key_side,
                "shared": stage.shared,
            }
            label = f"{stage.heads}x{stage.head_dim}{f'/{stage.value_dim}' if stage.value_dim else ''}"
            label += f"_{stage.side}x{stage.side}_p{stage.patch}"
            if stage.key_side:
                label += f"_k{stage.key_side}x{stage.key_side}{'_shared' if stage.shared else ''}"
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
    heads, side = shape["heads"], shape["key_side"]
    arguments: dict[str, Any] = dict(qkv(shape, batch, dtype, device, layout or default_layout, generator))
    arguments["patch_size"] = (shape["patch"], shape["patch"])
    if side:
        of_keys = {**shape, "heads": 1 if shape["shared"] else heads, "height": side, "width": side}
        partner = qkv(of_keys, batch, dtype, device, layout or default_layout, generator)
        arguments |= {name: partner[name].expand(-1, heads, -1, -1, -1) for name in ("key", "value")}
    if shape["bias"]:
        tokens = [m.shape[3] * m.shape[4] // shape["patch"] ** 2 for m in (arguments["query"], arguments["key"])]
        arguments["bias"] = torch.randn(heads, *tokens, generator=generator).to(device=device, dtype=dtype)
    return arguments


def cost(arguments: Mapping[str, Any], backward: bool = False) -> Cost:
    """Floor of the forward, or of the backward alone."""
    pairs = patch_pairs(arguments["query"].shape[3:], arguments["value"].shape[3:], arguments["patch_size"])
    return attention_cost(arguments, pairs, backward)


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
    return lay_as(fold(attention(q, k, v, bias, scale), *patch_size, height, width), query)


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
    return lay_as(fold(out, *patch_size, *query.shape[-2:]), query)


PEERS = {"eager": eager, "sdpa": sdpa}
