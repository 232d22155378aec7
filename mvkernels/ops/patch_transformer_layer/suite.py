"""The layers of MobileViT's three stages, their floors, and the same work without this library's kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear, scaled_dot_product_attention, silu

from mvkernels.dispatch.checks import lay_as
from mvkernels.dispatch.registry import Case, Cost
from mvkernels.ops.common.groups import attention, fold, patch_pairs, unfold
from mvkernels.ops.common.maps import Drawn

# model, its stages as (channels, map side); four heads, a hidden layer of twice the channels, patches of 2
_MODELS: tuple[tuple[str, tuple[tuple[int, int], ...]], ...] = (
    ("mobilevit_xxs@256", ((64, 32), (80, 16), (96, 8))),
    ("mobilevit_xs@256", ((96, 32), (120, 16), (144, 8))),
    ("mobilevit_s@256", ((144, 32), (192, 16), (240, 8))),
    ("mobilevit_s@512", ((144, 64), (192, 32), (240, 16))),
)
_SMALL = ("mobilevit_xxs@256",)
_HEADS = 4


def cases(suite: str = "full") -> list[Case]:
    """The shape suite: "full", or "small" for a quick look."""
    found = []
    for model, stages in _MODELS:
        for channels, side in stages if suite != "small" or model in _SMALL else ():
            shape = {"channels": channels, "height": side, "width": side, "patch": 2}
            label = f"{_HEADS}x{channels // _HEADS}_{side}x{side}_p2"
            found.append(Case(label, model, partial(_make, shape), ("channels_last",), shape))
    return found


def _make(
    shape: Mapping[str, Any],
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    layout: str | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Arguments as a trained layer has them: rows of the products of about unit length."""
    drawn = Drawn(shape, batch, dtype, device, seed)
    draw = partial(drawn.normal, spread=0.1)
    c, f = shape["channels"], 2 * shape["channels"]
    return {
        "x": drawn.pixels(c, layout),
        "norm1_weight": draw(c, mean=1.0),
        "norm1_bias": draw(c),
        "qkv_weight": draw(3 * c, c, spread=c**-0.5),
        "qkv_bias": draw(3 * c),
        "proj_weight": draw(c, c, spread=c**-0.5),
        "proj_bias": draw(c),
        "norm2_weight": draw(c, mean=1.0),
        "norm2_bias": draw(c),
        "fc1_weight": draw(f, c, spread=c**-0.5),
        "fc1_bias": draw(f),
        "fc2_weight": draw(c, f, spread=f**-0.5),
        "fc2_bias": draw(c),
        "heads": _HEADS,
        "patch_size": (shape["patch"], shape["patch"]),
    }


def cost(arguments: Mapping[str, Any], backward: bool = False) -> Cost:
    """Floor of the forward, or of the backward alone (which reads x and dout and writes dx).

    The map moves once in each direction, as it would if the whole layer were one kernel; the weights are read once,
    and their gradients written once.
    """
    x, heads = arguments["x"], arguments["heads"]
    b, c, height, width = x.shape
    hidden = arguments["fc1_weight"].shape[0]
    pairs = b * patch_pairs((height, width), (height, width), arguments["patch_size"])
    pixels = b * height * width
    weights = 4 * c * c + 2 * c * hidden
    item = x.element_size()
    if backward:
        moved = (3 * pixels * c + 2 * weights) * item
        return Cost(moved, 4 * pixels * weights + 10 * pairs * c, pairs * heads + pixels * hidden)
    moved = (2 * pixels * c + weights) * item
    return Cost(moved, 2 * pixels * weights + 4 * pairs * c, pairs * heads + pixels * hidden)


def _plain(attend: Callable[[Tensor, Tensor, Tensor, float], Tensor]) -> Callable[..., Tensor]:
    """The layer between one unfold and one fold, as the models' own code has it; ``attend`` on (B', heads, N, D)."""

    def layer(
        x: Tensor,
        norm1_weight: Tensor,
        norm1_bias: Tensor,
        qkv_weight: Tensor,
        qkv_bias: Tensor | None,
        proj_weight: Tensor,
        proj_bias: Tensor,
        norm2_weight: Tensor,
        norm2_bias: Tensor,
        fc1_weight: Tensor,
        fc1_bias: Tensor,
        fc2_weight: Tensor,
        fc2_bias: Tensor,
        heads: int,
        patch_size: tuple[int, int] = (2, 2),
        eps: float = 1e-5,
        scale: float | None = None,
        activation: str = "silu",
    ) -> Tensor:
        b, c, height, width = x.shape
        scale = (c // heads) ** -0.5 if scale is None else scale
        tokens = unfold(x.unsqueeze(1), *patch_size).flatten(0, 2)
        packed = linear(layer_norm(tokens, (c,), norm1_weight, norm1_bias, eps), qkv_weight, qkv_bias)
        query, key, value = packed.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        out = attend(query, key, value, scale).transpose(1, 2).flatten(2)
        tokens = tokens + linear(out, proj_weight, proj_bias)
        hidden = silu(linear(layer_norm(tokens, (c,), norm2_weight, norm2_bias, eps), fc1_weight, fc1_bias))
        tokens = tokens + linear(hidden, fc2_weight, fc2_bias)
        return lay_as(fold(tokens.unflatten(0, (b, 1, -1)), *patch_size, height, width).squeeze(1), x)

    return layer


def _softmax(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    return attention(query, key, value, None, scale)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    return scaled_dot_product_attention(query, key, value, scale=scale)


PEERS = {"eager": _plain(_softmax), "sdpa": _plain(_sdpa)}
