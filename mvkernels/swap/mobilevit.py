"""The middle of a MobileViT block: from the 1×1 convolution in to the 1×1 convolution out."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from mvkernels.nn import patch_transformer_layer, pointwise_to_channels_first, pointwise_to_channels_last
from mvkernels.swap.eligibility import log_once, unusual_call
from mvkernels.swap.watch import examine

Layers = list[dict[str, Any]]


def as_original(block: Any) -> nn.Module:
    """The block with its original class, sharing all it holds: what torch.jit.script compiles."""
    original = copy.copy(block)
    original.__class__ = block.mvk_original
    return original


def layers_for_call(
    block: nn.Module, x: Tensor, more: bool, watched: Sequence[str], examine_block: Callable[[Any], tuple[str, Layers]]
) -> Layers | None:
    """The arguments of the block's layers as it stands, or None if this call is the original's; logs why, once.

    ``more``: the call has arguments beside the map.
    """
    reason = "it was called with more than a map" if more else unusual_call(x)
    if not reason:
        reason, layers = examine(block, watched, examine_block)
        if not reason:
            return layers
    log_once(block, reason)
    return None


def transform(
    features: Tensor,
    conv_in: nn.Conv2d,
    layers: Sequence[dict[str, Any]],
    norm: nn.Module,
    conv_out: nn.Conv2d,
    patch_size: tuple[int, int],
    backend: str | None,
) -> Tensor:
    """features (B, C, H, W) -> (B, C_out, H, W): 1×1 convolution, layers, LayerNorm, 1×1 convolution.

    ``layers`` are the arguments of :func:`patch_transformer_layer`. A map that the patch does not divide
    is resized before the layers and back after them (bilinear, corners not aligned), as MobileViT does.
    """
    height, width = features.shape[-2:]
    size = (-(-height // patch_size[0]) * patch_size[0], -(-width // patch_size[1]) * patch_size[1])
    resized = size != (height, width)
    x = pointwise_to_channels_last(features, conv_in.weight, conv_in.bias)
    if resized:
        x = _resize(x, size)
    for layer in layers:
        x = patch_transformer_layer(x, **layer, patch_size=patch_size, backend=backend)
    x = norm(x)
    if resized:
        x = _resize(x, (height, width))
    return pointwise_to_channels_first(x, conv_out.weight, conv_out.bias)


def _resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear, on (B, H, W, C)."""
    x = F.interpolate(x.permute(0, 3, 1, 2), size=size, mode="bilinear", align_corners=False)
    return x.permute(0, 2, 3, 1).contiguous()
