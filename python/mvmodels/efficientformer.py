"""EfficientFormer (Li et al., arXiv 2206.01191): l1, l3 and l7.

The first blocks mix pixels by pooling (MB4D). The last blocks of the fourth stage have attention over the whole 7×7
map, with a learned bias for each distance of two pixels (MB3D): ``patch_attention(patch_size=1, bias=…)``. Where the
equation of the paper differs from the authors' code, this follows the code: scores are scaled by the width of the key,
not by that of the map, and the bias is added to them.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mvkernels.nn import DropPath
from mvmodels.layers import (
    ConvNorm,
    LayerScale,
    Mlp,
    PoolMixer,
    attention_over_map,
    check_backend,
    check_picture,
    check_sizes,
)
from mvmodels.registry import ModelInfo, WeightSource, register, renaming

_PAPER = "EfficientFormer: Vision Transformers at MobileNet Speed, arXiv 2206.01191"
_HEADS = 8
_KEY_DIM = 32
_VALUE_DIM = 128
_MLP_RATIO = 4
_LAYER_SCALE = 1e-5


@dataclass(frozen=True)
class Size:
    """Widths, depths and other numbers of a network."""

    widths: tuple[int, int, int, int]
    depths: tuple[int, int, int, int]
    attention_blocks: int
    """How many of the last stage's blocks, its last ones, are MB3D."""


SIZES = {
    "l1": Size((48, 96, 224, 448), (3, 2, 6, 4), 1),
    "l3": Size((64, 128, 320, 512), (4, 4, 12, 6), 4),
    "l7": Size((96, 192, 384, 768), (6, 6, 18, 8), 8),
}


class ConvMlp(nn.Module):
    """1×1 convolution, BatchNorm, GELU, 1×1 convolution, BatchNorm, on (B, C, H, W)."""

    def __init__(self, channels: int, dropout: float) -> None:
        super().__init__()
        hidden = _MLP_RATIO * channels
        self.fc1, self.norm1 = nn.Conv2d(channels, hidden, 1), nn.BatchNorm2d(hidden)
        self.activation = nn.GELU()
        self.fc2, self.norm2 = nn.Conv2d(hidden, channels, 1), nn.BatchNorm2d(channels)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same shape."""
        hidden = self.dropout(self.activation(self.norm1(self.fc1(x))))
        return self.dropout(self.norm2(self.fc2(hidden)))


class MB4D(nn.Module):
    """x + scale * pool(x), without a norm, then x + scale * mlp(x), on (B, C, H, W)."""

    def __init__(self, channels: int, dropout: float, drop_path: float) -> None:
        super().__init__()
        self.mixer, self.scale1 = PoolMixer(), LayerScale(channels, _LAYER_SCALE)
        self.mlp, self.scale2 = ConvMlp(channels, dropout), LayerScale(channels, _LAYER_SCALE)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same shape."""
        x = x + self.drop_path(self.scale1(self.mixer(x)))
        return x + self.drop_path(self.scale2(self.mlp(x)))


class BiasedAttention(nn.Module):
    """Attention over the whole map (B, H, W, C), contiguous, with a bias for each head and distance (|dy|, |dx|).

    The biases (heads, side * side) are made for a map of side × side. For another map they are interpolated (bilinear,
    corners aligned); the authors' code does not support other maps.
    """

    def __init__(self, channels: int, side: int, backend: str | None) -> None:
        super().__init__()
        self.side, self.backend = side, backend
        self.qkv = nn.Linear(channels, _HEADS * (2 * _KEY_DIM + _VALUE_DIM))
        self.proj = nn.Linear(_HEADS * _VALUE_DIM, channels)
        self.attention_biases = nn.Parameter(torch.zeros(_HEADS, side * side))

    def bias(self, height: int, width: int) -> Tensor:
        """(heads, height * width, height * width), gathered from the parameter in every call."""
        table: Tensor = self.attention_biases
        if (height, width) != (self.side, self.side):
            table = table.view(1, _HEADS, self.side, self.side)
            table = F.interpolate(table, size=(height, width), mode="bilinear", align_corners=True).view(_HEADS, -1)
        return table[:, distances(height, width, table.device)]

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        bias = self.bias(x.shape[1], x.shape[2])
        sizes = (_KEY_DIM, _KEY_DIM, _VALUE_DIM)
        return self.proj(attention_over_map(self.qkv(x), sizes, _HEADS, bias, _KEY_DIM**-0.5, self.backend))

    def products(self, x: Tensor) -> int:
        """Multiply-adds of the two matrix products, for :func:`mvmodels.count_macs`."""
        pixels = x.shape[1] * x.shape[2]
        return x.shape[0] * pixels * pixels * _HEADS * (_KEY_DIM + _VALUE_DIM)


def distances(height: int, width: int, device: torch.device) -> Tensor:
    """For each pair of pixels, row by row, |dy| * width + |dx|: (height * width, height * width)."""
    y = torch.arange(height, device=device).repeat_interleave(width)
    x = torch.arange(width, device=device).repeat(height)
    return (y[:, None] - y).abs() * width + (x[:, None] - x).abs()


class MB3D(nn.Module):
    """x + scale * attention(norm(x)), then x + scale * mlp(norm(x)), on (B, H, W, C)."""

    def __init__(self, channels: int, side: int, dropout: float, drop_path: float, backend: str | None) -> None:
        super().__init__()
        self.norm1, self.mixer = nn.LayerNorm(channels), BiasedAttention(channels, side, backend)
        self.scale1 = LayerScale(channels, _LAYER_SCALE, axis=-1)
        self.norm2, self.mlp = nn.LayerNorm(channels), Mlp(channels, _MLP_RATIO, dropout)
        self.scale2 = LayerScale(channels, _LAYER_SCALE, axis=-1)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> the same shape."""
        x = x + self.drop_path(self.scale1(self.mixer(self.norm1(x))))
        return x + self.drop_path(self.scale2(self.mlp(self.norm2(x))))


class Stage(nn.Sequential):
    """MB4D blocks, then MB3D blocks, which get a map in channels-last memory."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same shape."""
        last = False
        for block in self:
            if isinstance(block, MB3D) and not last:
                x, last = x.permute(0, 2, 3, 1).contiguous(), True
            x = block(x)
        return x.permute(0, 3, 1, 2) if last else x


class EfficientFormer(nn.Module):
    """EfficientFormer for image classification or as a backbone.

    It has two classifiers: one learns the labels, the other the output of a teacher (distillation). In eval mode the
    result is the mean of their logits. In training mode it is the pair (logits, logits for the teacher), unless
    ``distilled`` is False.

    Args:
        size: widths and depths of the network, an entry of :data:`SIZES`.
        num_classes: number of classes.
        in_chans: channels of the images.
        drop_rate: dropout probability before the last layers.
        features_only: return the list of each stage's last map, finest first, without a head.
        image_size: side of the images that the biases are made for, 32 times the side of the last map. Images may have
            another size: the biases are then interpolated.
        drop_path_rate: drop path probability of the last block; it grows linearly over the blocks.
        dropout: dropout probability in the MLPs of the blocks.
        distilled: whether the model returns the pair in training mode.
        backend: passed to the fused op.

    Raises ValueError if a setting is out of range or an input is not (B, in_chans, H, W).
    """

    def __init__(
        self,
        size: Size,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        features_only: bool = False,
        image_size: int = 224,
        drop_path_rate: float = 0.0,
        dropout: float = 0.0,
        distilled: bool = True,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check_sizes("EfficientFormer", num_classes=num_classes, in_chans=in_chans, image_size=image_size)
        check_backend(backend)
        self.in_chans, self.features_only, self.distilled = in_chans, features_only, distilled
        widths, side = size.widths, -(-image_size // 32)
        relu: dict[str, Any] = {"bias": True, "activation": nn.ReLU}
        self.stem = nn.Sequential(
            ConvNorm(in_chans, widths[0] // 2, 3, 2, **relu), ConvNorm(widths[0] // 2, widths[0], 3, 2, **relu)
        )
        self.downsample = nn.ModuleList(ConvNorm(widths[i], widths[i + 1], 3, 2, bias=True) for i in range(3))
        total = sum(size.depths)
        rates = iter([drop_path_rate * i / max(1, total - 1) for i in range(total)])
        self.blocks = nn.ModuleList()
        for i, (width, depth) in enumerate(zip(widths, size.depths)):
            pooling = depth if i < 3 else depth - size.attention_blocks
            blocks: list[nn.Module] = [MB4D(width, dropout, next(rates)) for _ in range(pooling)]
            blocks += [MB3D(width, side, dropout, next(rates), backend) for _ in range(depth - pooling)]
            self.blocks.append(Stage(*blocks))
        self.first_attention = size.depths[3] - size.attention_blocks
        self.stages = tuple((width, 4 * 2**i) for i, width in enumerate(widths))
        """For each stage: the channels of its map, and the reduction of H and W (image side / map side)."""
        self.dropout = nn.Dropout(drop_rate)
        self.norm: nn.LayerNorm | None = None
        if not features_only:
            self.norm = nn.LayerNorm(widths[-1])
            self.classifier = nn.Linear(widths[-1], num_classes)
            self.teacher_classifier = nn.Linear(widths[-1], num_classes)
        self.apply(_initialise)

    def forward_features(self, x: Tensor) -> list[Tensor]:
        """Images (B, in_chans, H, W) -> the last map of each stage, finest first."""
        check_picture(self, x, self.in_chans)
        x = self.stem(x)
        maps = []
        for i, blocks in enumerate(self.blocks):
            if i > 0:
                x = self.downsample[i - 1](x)
            x = blocks(x)
            maps.append(x)
        return maps

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor] | list[Tensor]:
        """Images (B, in_chans, H, W) -> logits (B, num_classes), a pair of them, or a list of maps."""
        maps = self.forward_features(x)
        if self.norm is None:
            return maps
        pooled = self.dropout(self.norm(maps[-1].permute(0, 2, 3, 1)).mean((1, 2)))
        labels, teachers = self.classifier(pooled), self.teacher_classifier(pooled)
        return (labels, teachers) if self.training and self.distilled else (labels + teachers) / 2

    @property
    def weight_sources(self) -> dict[str, WeightSource]:
        headless = self.norm is None
        index = r".*\.attention_bias_idxs$"
        return {
            "authors": WeightSource(
                lambda name: _authors_name(self._shifted(name)),
                rf"{index}|norm\.|head\.|dist_head\." if headless else index,
            ),
            "timm": WeightSource(
                lambda name: _timm_name(self._shifted(name)),
                rf"{index}|norm\.|head\.|head_dist\." if headless else index,
            ),
            "mvmodels": WeightSource(
                lambda name: name, r"norm\.|classifier\.|teacher_classifier\." if headless else ""
            ),
        }

    def _shifted(self, name: str) -> str:
        """In the authors' code and in timm a module that flattens the map has the number before the first MB3D."""
        parts = name.split(".")
        if parts[:2] == ["blocks", "3"] and int(parts[2]) >= self.first_attention:
            parts[2] = str(int(parts[2]) + 1)
        return ".".join(parts)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


_timm_name = renaming(
    [
        (r"^stem\.0\.conv\.", "stem.conv1."),
        (r"^stem\.0\.norm\.", "stem.norm1."),
        (r"^stem\.1\.conv\.", "stem.conv2."),
        (r"^stem\.1\.norm\.", "stem.norm2."),
        (r"^downsample\.0\.", "stages.1.downsample."),
        (r"^downsample\.1\.", "stages.2.downsample."),
        (r"^downsample\.2\.", "stages.3.downsample."),
        (r"^blocks\.(\d)\.", r"stages.\1.blocks."),
        (r"\.mixer\.", ".token_mixer."),
        (r"\bscale(\d)\.", r"ls\1."),
        (r"^classifier\.", "head."),
        (r"^teacher_classifier\.", "head_dist."),
    ]
)
# In the authors' list a stage of blocks and the convolution after it take turns.
_authors_name = renaming(
    [
        (r"^stem\.0\.conv\.", "patch_embed.0."),
        (r"^stem\.0\.norm\.", "patch_embed.1."),
        (r"^stem\.1\.conv\.", "patch_embed.3."),
        (r"^stem\.1\.norm\.", "patch_embed.4."),
        (r"^downsample\.0\.", "network.1."),
        (r"^downsample\.1\.", "network.3."),
        (r"^downsample\.2\.", "network.5."),
        (r"^(network\.\d)\.conv\.", r"\1.proj."),
        (r"^blocks\.0\.", "network.0."),
        (r"^blocks\.1\.", "network.2."),
        (r"^blocks\.2\.", "network.4."),
        (r"^blocks\.3\.", "network.6."),
        (r"\.mixer\.", ".token_mixer."),
        (r"\bscale(\d)\.gamma$", r"layer_scale_\1"),
        (r"^classifier\.", "head."),
        (r"^teacher_classifier\.", "dist_head."),
    ]
)


def _register(size: str, params: int, macs: float, published: str, top1: float) -> None:
    build: Any = functools.partial(EfficientFormer, SIZES[size])
    register(ModelInfo(f"efficientformer_{size}", build, _PAPER, params, macs, published, "", top1))


_register("l1", 12_289_928, 1291.3, "12.3M", 79.2)
_register("l3", 31_406_000, 3906.6, "31.3M", 82.4)
_register("l7", 82_229_328, 10119.3, "82.1M", 83.3)
