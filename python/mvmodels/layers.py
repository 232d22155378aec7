"""Layers and checks that several models share."""

from __future__ import annotations

from numbers import Integral

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mvkernels import patch_attention
from mvkernels.dispatch.backend import requested
from mvkernels.nn import pointwise_to_channels_first, pointwise_to_channels_last


def check_sizes(model: str, **sizes: int) -> None:
    """Raise TypeError if a size is not an integer, ValueError if it is less than 1."""
    for name, value in sizes.items():
        if not isinstance(value, Integral) or isinstance(value, bool):
            raise TypeError(f"{model}: {name} is {value!r}, want an integer")
        if value < 1:
            raise ValueError(f"{model}: {name} is {value}, want at least 1")


def picture_sides(model: str, image_size: int | tuple[int, int]) -> tuple[int, int]:
    """(height, width) of a setting that is an int or a pair. Raises TypeError for others, ValueError below 1."""
    sides = tuple(image_size) if isinstance(image_size, (tuple, list)) else (image_size, image_size)
    if len(sides) != 2:
        raise TypeError(f"{model}: image_size is {image_size!r}, want an integer or a pair of integers")
    check_sizes(
        model, **{f"image_size{'' if sides[0] == sides[1] else f'[{i}]'}": side for i, side in enumerate(sides)}
    )
    return sides


def check_backend(backend: str | None) -> None:
    """Raise ValueError if the name of a backend is unknown."""
    if backend is not None:
        requested(backend)


def check_picture(model: nn.Module, x: Tensor, in_chans: int, least: int = 1) -> None:
    """Raise TypeError unless x is a tensor, ValueError unless it is (B, in_chans, H, W) with H and W >= ``least``."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{type(model).__name__}: x is a {type(x).__name__}, want a torch.Tensor")
    if x.dim() != 4 or x.shape[1] != in_chans:
        raise ValueError(f"{type(model).__name__}: x is {tuple(x.shape)}, want (B, {in_chans}, H, W)")
    if min(x.shape[2:]) < least:
        raise ValueError(f"{type(model).__name__}: x is {tuple(x.shape)}, want H and W of at least {least}")


class ConvNorm(nn.Module):
    """Convolution, BatchNorm, and optionally an activation. The padding keeps H and W if the stride is 1."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        stride: int = 1,
        groups: int = 1,
        dilation: int = 1,
        bias: bool = False,
        activation: type[nn.Module] = nn.Identity,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        padding = (kernel_size - 1) // 2 * dilation
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, dilation=dilation, groups=groups, bias=bias
        )
        self.norm = nn.BatchNorm2d(out_channels, eps=eps)
        self.activation = activation()

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, out_channels, H / stride, W / stride), rounded up."""
        return self.activation(self.norm(self.conv(x)))


class ToChannelsLast(nn.Conv2d):
    """1×1 convolution with a result in channels-last memory, without an extra copy."""

    def __init__(self, in_channels: int, out_channels: int, bias: bool = True) -> None:
        super().__init__(in_channels, out_channels, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, out_channels, H, W)."""
        return pointwise_to_channels_last(x, self.weight, self.bias).permute(0, 3, 1, 2)


class ToChannelsFirst(nn.Conv2d):
    """1×1 convolution from a channels-last map to a contiguous one (channels-last if the weight is)."""

    def __init__(self, in_channels: int, out_channels: int, bias: bool = True) -> None:
        super().__init__(in_channels, out_channels, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, out_channels, H, W)."""
        return pointwise_to_channels_first(x.permute(0, 2, 3, 1).contiguous(), self.weight, self.bias)


class LayerScale(nn.Module):
    """A learned factor for each channel. ``axis`` is the axis of the channels."""

    def __init__(self, channels: int, init: float, axis: int = 1) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((channels,), init))
        self.axis = axis

    def forward(self, x: Tensor) -> Tensor:
        """Any shape with the channels on ``axis`` -> the same shape."""
        if self.axis in (-1, x.dim() - 1):
            return x * self.gamma
        return x * self.gamma.view(-1, *(1,) * (x.dim() - self.axis - 1))


class Mlp(nn.Module):
    """Linear, GELU, Linear over the last axis, each with dropout after it."""

    def __init__(self, channels: int, ratio: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, ratio * channels)
        self.activation = nn.GELU()
        self.fc2 = nn.Linear(ratio * channels, channels)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(..., channels) -> the same shape."""
        return self.dropout(self.fc2(self.dropout(self.activation(self.fc1(x)))))


class PoolMixer(nn.Module):
    """PoolFormer's token mixer: the mean over 3×3 pixels, without padding pixels, minus the pixel itself.

    The pixel is subtracted because the residual of the block adds it (Yu et al., arXiv 2111.11418, algorithm 1).
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False) - x


def attention_over_map(
    packed: Tensor, sizes: tuple[int, int, int], heads: int, bias: Tensor | None, scale: float, backend: str | None
) -> Tensor:
    """Global attention over a map, by :func:`mvkernels.patch_attention` with a patch of 1.

    Args:
        packed: (B, H, W, heads * sum(sizes)), contiguous. Each head is [q | k | v], with the three widths in ``sizes``.
        sizes: channels of q, of k and of v in a head.
        heads: number of heads.
        bias: (heads, H * W, H * W), added to the scores, or None.
        scale: factor of the scores.
        backend: passed to the fused op.

    Returns:
        (B, H, W, heads * sizes[2]). The parts of ``packed`` are read in place, without a copy.
    """
    maps = packed.unflatten(-1, (heads, -1)).permute(0, 3, 4, 1, 2).split(sizes, dim=2)
    out = patch_attention(maps[0], maps[1], maps[2], 1, bias=bias, scale=scale, backend=backend)
    return out.permute(0, 3, 4, 1, 2).flatten(-2)
