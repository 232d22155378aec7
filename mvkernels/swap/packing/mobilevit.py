"""The transformer of a MobileViT block, and what stands around it, on packed weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mvkernels.ops.patch_transformer_layer.cpp import of_products
from mvkernels.swap.folding import elementwise
from mvkernels.swap.packing import layers
from mvkernels.swap.packing.layers import Part
from mvkernels.swap.packing.plans import Keep, Run


def plan(
    block: Any,
    keep: Keep,
    conv_kxk: Any,
    conv_in: nn.Conv2d,
    block_layers: Sequence[dict[str, Any]],
    norm: nn.LayerNorm,
    projection: Part,
    fusion: Any,
    fusion_part: Part | None,
    patch_size: tuple[int, int],
) -> Run | None:
    """A whole block on (B, C, H, W): the convolutions ``conv_kxk`` and ``conv_in``, layers, LayerNorm, projection, and
    the ``fusion`` of the result with the block's input, if there is one.

    ``block_layers``: the arguments of :func:`mvkernels.nn.patch_transformer_layer`. ``fusion_part``: the convolution of
    ``fusion`` if this has no more in it. A map that the patch does not divide is resized before the layers and back
    after the norm, as MobileViT does. None if an activation is not known, or something drops now.
    """
    activation = layers.resting(*projection)
    if activation is None:
        return None
    each = [layer_of(layer, patch_size, block.mvk_backend, keep) for layer in block_layers]
    if not all(each):
        return None
    conv_out, norm_out, _ = projection
    into = layers.linear(conv_in, keep)
    out = layers.linear(conv_out, keep, activation, norm, norm_out)
    resized_out: list[layers.Multiply] = []  # packed once a map needs it: the norm is not in it
    fused = None if fusion_part is None else layers.convolution(fusion_part, keep)

    def transform(x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        size = (-(-height // patch_size[0]) * patch_size[0], -(-width // patch_size[1]) * patch_size[1])
        resized = size != (height, width)
        x = into(x)
        if resized:
            x = F.interpolate(x, size=size, mode="bilinear", align_corners=False)
        for layer in each:
            x = layer(x)  # type: ignore[misc]
        if not resized:
            return out(x)
        if not resized_out:
            resized_out.append(layers.linear(conv_out, keep, activation, after=norm_out))
        x = norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        x = F.interpolate(x, size=(height, width), mode="bilinear", align_corners=False)
        return resized_out[0](x)

    def run(x: Tensor) -> Tensor:
        y = transform(conv_kxk(x))
        if fusion is None:
            return y
        joined: Tensor = fusion(torch.cat((x, y), dim=1)) if fused is None else fused(x, y)
        return joined

    return run


def layer_of(
    layer: dict[str, Any], patch_size: tuple[int, int], backend: str | None, keep: Keep
) -> Callable[[Tensor], Tensor] | None:
    """One transformer layer on a channels-last map (B, C, H, W); None if it cannot run on packed weights now."""
    dropouts = (layer.get("proj_dropout"), layer.get("hidden_dropout"), layer.get("out_dropout"))
    activation = elementwise.activation_of((layer["activation"],))
    if activation is None or elementwise.activation_of([d for d in dropouts if d is not None]) != 0:
        return None
    heads, qkv, scale = layer["heads"], layer["qkv"], layer.get("scale")
    backend = layer.get("backend") or backend
    norm1 = layer["norm1"]
    queries = layers.joined(qkv, keep, norm1) if isinstance(qkv, tuple) else layers.linear(qkv, keep, norm=norm1)
    projection = layers.linear(layer["proj"], keep)
    widen = layers.linear(layer["fc1"], keep, activation, layer["norm2"])
    narrow = layers.linear(layer["fc2"], keep)

    def run(x: Tensor) -> Tensor:
        return of_products(x, queries, projection, widen, narrow, heads, patch_size, scale, backend)

    return run
