"""The transformer of a MobileViT block, and what stands around it, on packed weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from mvkernels.ops.patch_attention import patch_attention
from mvkernels.swap.folding import elementwise
from mvkernels.swap.folding.forms import packs_now, rests
from mvkernels.swap.packing import layers


def activation_now(
    block: Any, x: Tensor, block_layers: Sequence[dict[str, Any]], conv: Any, norm: Any, after: Any
) -> int | None:
    """The activation of a block's projection (``conv``, ``norm``, then ``after``), if the call runs on packed weights.

    Then its layers, which were examined, have known activations and drop nothing. None if it does not.
    """
    if not packs_now(block, x) or any(
        elementwise.activation_of((layer["activation"],)) is None
        or elementwise.activation_of([d for d in _dropouts(layer) if d is not None]) != 0
        for layer in block_layers
    ):
        return None
    return rests(conv, norm, after)


def _dropouts(layer: dict[str, Any]) -> tuple[Any, ...]:
    return layer.get("proj_dropout"), layer.get("hidden_dropout"), layer.get("out_dropout")


def transform(
    features: Tensor,
    conv_in: Any,
    block_layers: Sequence[dict[str, Any]],
    norm: nn.LayerNorm,
    conv_out: Any,
    norm_out: Any,
    activation: int,
    patch_size: tuple[int, int],
    backend: str | None,
) -> Tensor:
    """features (B, C, H, W) -> (B, C_out, H, W): convolution, layers, LayerNorm, convolution, batch norm, activation.

    A map that the patch does not divide is resized before the layers and back after the norm, as MobileViT does.
    """
    height, width = features.shape[-2:]
    size = (-(-height // patch_size[0]) * patch_size[0], -(-width // patch_size[1]) * patch_size[1])
    x = layers.multiply(conv_in, features)
    if size == (height, width):
        for layer in block_layers:
            x = _layer(x, layer, patch_size, backend)
        return layers.multiply(conv_out, x, norm=norm, activation=activation, after=norm_out)
    x = F.interpolate(x, size=size, mode="bilinear", align_corners=False)
    for layer in block_layers:
        x = _layer(x, layer, patch_size, backend)
    x = norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    x = F.interpolate(x, size=(height, width), mode="bilinear", align_corners=False)
    return layers.multiply(conv_out, x, activation=activation, after=norm_out)


def _layer(x: Tensor, layer: dict[str, Any], patch_size: tuple[int, int], backend: str | None) -> Tensor:
    """One transformer layer on a channels-last map (B, C, H, W)."""
    heads, qkv = layer["heads"], layer["qkv"]
    if isinstance(qkv, tuple):
        joined = layers.joined(qkv, x, layer["norm1"])
    else:
        joined = layers.multiply(qkv, x, norm=layer["norm1"])
    query, key, value = joined.unflatten(1, (3, heads, -1)).unbind(1)
    out = patch_attention(query, key, value, patch_size, scale=layer.get("scale"), backend=backend)
    x = layers.multiply(layer["proj"], out.flatten(1, 2), residual=x)
    activation = elementwise.activation_of((layer["activation"],)) or 0
    hidden = layers.multiply(layer["fc1"], x, norm=layer["norm2"], activation=activation)
    return layers.multiply(layer["fc2"], hidden, residual=x)
