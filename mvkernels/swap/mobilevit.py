"""The middle part of a MobileViT block: 1×1 convolution, transformer layers, LayerNorm, 1×1 convolution."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from mvkernels.dispatch.checks import known
from mvkernels.dispatch.exporting import exports_reference
from mvkernels.nn import patch_transformer_layer, pointwise_to_channels_first, pointwise_to_channels_last
from mvkernels.nn.patch_transformer import gather_groups, scatter_groups
from mvkernels.swap.eligibility import log_once, unusual_call
from mvkernels.swap.watch import examine

Layers = list[dict[str, Any]]


def layers_for_call(
    block: nn.Module, x: Tensor, more: bool, watched: Sequence[str], examine_block: Callable[[Any], tuple[str, Layers]]
) -> Layers | None:
    """The arguments of the block's layers. None if the original forward has to run; the reason is then logged once.

    ``more``: whether the call has other arguments than the map.
    """
    reason = "the call has other arguments than the map" if more else unusual_call(x)
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
    is resized before the layers and back after them (bilinear, corners not aligned), as MobileViT does. In an export a
    map of unknown size always is: if the patch divides it, that changes nothing.
    """
    if exports_reference("patch_attention"):
        return _exported(features, conv_in, layers, norm, conv_out, patch_size)
    height, width = features.shape[-2:]
    size = (_up(height, patch_size[0]), _up(width, patch_size[1]))
    resized = not (known(size[0] == height) and known(size[1] == width))
    x = pointwise_to_channels_last(features, conv_in.weight, conv_in.bias)
    if resized:
        x = _resize(x, size)
    for layer in layers:
        x = patch_transformer_layer(x, **layer, patch_size=patch_size, backend=backend)
    x = norm(x)
    if resized:
        x = _resize(x, (height, width))
    return pointwise_to_channels_first(x, conv_out.weight, conv_out.bias)


def _up(size: int, patch: int) -> int:
    """The next multiple of ``patch``. All numbers are positive: for negative ones ONNX rounds a quotient otherwise."""
    return (size + patch - 1) // patch * patch


def _exported(
    features: Tensor,
    conv_in: nn.Conv2d,
    layers: Sequence[dict[str, Any]],
    norm: nn.Module,
    conv_out: nn.Conv2d,
    patch_size: tuple[int, int],
) -> Tensor:
    """:func:`transform` for an export of PyTorch's ops: the pixels are gathered by group once, and scattered once."""
    x = F.conv2d(features, conv_in.weight, conv_in.bias)
    height, width = x.shape[-2:]
    size = (_up(height, patch_size[0]), _up(width, patch_size[1]))
    resized = not (known(size[0] == height) and known(size[1] == width))
    if resized:
        x = F.interpolate(x, size=size, mode="bilinear", align_corners=False)
    x = gather_groups(x, patch_size)
    for layer in layers:
        x = patch_transformer_layer(x, **layer)
    x = scatter_groups(norm(x), patch_size, *size)
    if resized:
        x = F.interpolate(x, size=(height, width), mode="bilinear", align_corners=False)
    return F.conv2d(x, conv_out.weight, conv_out.bias)


def _resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear, on (B, H, W, C)."""
    x = F.interpolate(x.permute(0, 3, 1, 2), size=size, mode="bilinear", align_corners=False)
    return x.permute(0, 2, 3, 1).contiguous()
