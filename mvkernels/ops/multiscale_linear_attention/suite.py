"""The qkv maps of EfficientViT, DC-AE and Sana, the floors of LiteMLA, and the same work without this library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from mvkernels.dispatch.registry import Case, Cost
from mvkernels.ops.common import linear
from mvkernels.ops.common.maps import convolved


def cases(suite: str = "full") -> list[Case]:
    """The shape suite: "full", or "small" for a quick look."""
    found = []
    for model, heads, dim, kernel, side in linear.shapes(suite):
        shape = {"heads": heads, "head_dim": dim, "kernel": kernel, "height": side, "width": side}
        label = f"{heads}x{dim}_{side}x{side}" + (f"_k{kernel}" if kernel else "_s0")
        found.append(Case(label, model, partial(_make, shape), linear.LAYOUTS, shape))
    return found


def _make(
    shape: Mapping[str, Any],
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    layout: str | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    channels, dim, kernel = 3 * shape["heads"] * shape["head_dim"], shape["head_dim"], shape["kernel"]
    generator = torch.Generator().manual_seed(seed)
    arguments: dict[str, Any] = {
        "qkv": convolved(channels, shape, batch, dtype, device, layout, generator),
        "depthwise": (),
        "pointwise": (),
        "head_dim": dim,
    }
    if kernel:
        wide = torch.randn(channels, 1, kernel, kernel, generator=generator) / kernel
        mixing = torch.randn(channels, dim, 1, 1, generator=generator) * dim**-0.5
        arguments |= {"depthwise": (wide.to(device, dtype),), "pointwise": (mixing.to(device, dtype),)}
    return arguments


def cost(arguments: Mapping[str, Any], backward: bool = False) -> Cost:
    """Floor of the forward, or of the backward alone (which reads qkv and dout and writes dqkv)."""
    qkv, dim = arguments["qkv"], arguments["head_dim"]
    size, scales = qkv.numel() // 3, len(arguments["depthwise"])
    convolutions = sum(2 * 3 * size * (weight.shape[-1] ** 2 + dim) for weight in arguments["depthwise"])
    attention = 4 * (1 + scales) * size * dim
    if backward:
        return Cost((7 + scales) * size * qkv.element_size(), 2 * convolutions + 2 * attention, 0)
    return Cost((4 + scales) * size * qkv.element_size(), convolutions + attention, 0)


def eager(
    qkv: Tensor,
    depthwise: Sequence[Tensor],
    pointwise: Sequence[Tensor],
    head_dim: int,
    depthwise_bias: Sequence[Tensor | None] | None = None,
    pointwise_bias: Sequence[Tensor | None] | None = None,
    eps: float = 1e-15,
) -> Tensor:
    """Convolutions, concatenation and linear attention, as the models' own code does."""
    scales, none = [qkv], [None] * len(depthwise)
    for wide, mixing, first, second in zip(depthwise, pointwise, depthwise_bias or none, pointwise_bias or none):
        each = conv2d(qkv, wide, first, padding=wide.shape[-1] // 2, groups=qkv.shape[1])
        scales.append(conv2d(each, mixing, second, groups=qkv.shape[1] // head_dim))
    q, k, v = torch.cat(scales, 1).unflatten(1, (-1, 3, head_dim)).unbind(2)
    return linear.eager(q, k, v, eps).flatten(1, 2)


PEERS = {"eager": eager}
