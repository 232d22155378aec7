"""MobileViT for segmentation (DeepLabv3) and detection (SSDLite), arXiv 2110.02178, sections 4.2 and 4.3.

DeepLabv3 (Chen et al., arXiv 1706.05587) on maps of output stride 16, SSDLite (Sandler et al., arXiv
1801.04381: an SSD whose convolutions are separable) on six maps. Settings that the papers leave open are those of
the authors' configurations.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mvmodels.layers import ConvNorm, check_sizes
from mvmodels.mobilevit import SIZES, Backbone, Size, initialise, timm_name, transformers_name
from mvmodels.registry import ModelInfo, WeightSource, register

_PAPER = "MobileViT: Light-weight, General-purpose, and Mobile-friendly Vision Transformer, arXiv 2110.02178"
_ATROUS_RATES = (6, 12, 18)
_ASPP_WIDTH = 256
# SSDLite's maps: their strides (None: the whole picture), widths, aspect ratios beside 1.
_STRIDES: tuple[int | None, ...] = (16, 32, 64, 128, 256, None)
_WIDTHS = (512, 256, 256, 128, 128, 64)
_RATIOS: tuple[tuple[float, ...], ...] = (*((2.0, 3.0),) * 5, (2.0,))
_SCALES = (0.1, 1.05)
_VARIANCES = (0.1, 0.2)


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling: in parallel a 1×1 and three dilated 3×3 convolutions and the mean of the map."""

    def __init__(self, in_channels: int, width: int, dropout: float) -> None:
        super().__init__()
        relu: dict[str, Any] = {"activation": nn.ReLU}
        self.branches = nn.ModuleList(
            [ConvNorm(in_channels, width, **relu)]
            + [ConvNorm(in_channels, width, 3, dilation=rate, **relu) for rate in _ATROUS_RATES]
        )
        self.pooled = ConvNorm(in_channels, width, **relu)
        self.project = ConvNorm(width * (len(_ATROUS_RATES) + 2), width, **relu)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, width, H, W)."""
        pooled = self.pooled(x.mean((2, 3), keepdim=True)).expand(-1, -1, *x.shape[2:])
        return self.dropout(self.project(torch.cat([*(branch(x) for branch in self.branches), pooled], 1)))


class DeepLabV3(nn.Module):
    """MobileViT with the DeepLabv3 head for semantic segmentation (arXiv 2110.02178).

    Args:
        size: widths and depths of the backbone, an entry of :data:`mvmodels.mobilevit.SIZES`.
        num_classes: number of classes, 21 for Pascal VOC.
        in_chans: channels of the images.
        drop_rate: dropout probability of whole channels after the pyramid and before the last layer.
        features_only: return the maps of the backbone, without a head.
        output_stride: image side divided by the side of the last map: 16 as in the paper, or 8 or 32.
        upsample: whether the logits are resized (bilinear) from the size of the map to the size of the image.
        dropout: dropout probability in the transformers.
        backend: passed to the fused ops.
    """

    def __init__(
        self,
        size: Size,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        features_only: bool = False,
        output_stride: int = 16,
        upsample: bool = False,
        dropout: float = 0.0,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check_sizes("DeepLabV3", num_classes=num_classes, in_chans=in_chans)
        self.features_only, self.upsample = features_only, upsample
        self.backbone = Backbone(size, in_chans, 2, output_stride, dropout, backend)
        self.aspp = nn.Identity() if features_only else ASPP(size.widths[-1], _ASPP_WIDTH, drop_rate)
        self.dropout = nn.Dropout2d(drop_rate)
        self.classifier = nn.Identity() if features_only else nn.Conv2d(_ASPP_WIDTH, num_classes, 1)
        self.apply(initialise)

    @property
    def stages(self) -> tuple[tuple[int, int], ...]:
        """For each stage: the channels of its map, and the reduction of H and W (image side / map side)."""
        return self.backbone.stages

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Images (B, in_chans, H, W) -> logits (B, num_classes, H', W').

        H' is ceil(H / output_stride), or H with ``upsample``; W' likewise. With features_only the result is a list of
        maps.
        """
        maps = self.backbone(x)
        if self.features_only:
            return maps
        logits = self.classifier(self.dropout(self.aspp(maps[-1])))
        if self.upsample:
            logits = F.interpolate(logits, size=x.shape[2:], mode="bilinear", align_corners=False)
        return logits

    @property
    def weight_sources(self) -> dict[str, WeightSource]:
        headless = self.features_only
        return {
            "transformers": WeightSource(_transformers_name, r"segmentation_head\." if headless else ""),
            "mvmodels": WeightSource(lambda name: name, r"aspp\.|classifier\." if headless else ""),
        }


def _transformers_name(name: str) -> str | tuple[str, ...]:
    head = (
        ("aspp.branches.", "segmentation_head.aspp.convs."),
        ("aspp.pooled.", "segmentation_head.aspp.convs.4.conv_1x1."),
        ("aspp.project.", "segmentation_head.aspp.project."),
        ("classifier.", "segmentation_head.classifier.convolution."),
    )
    for ours, theirs in head:
        if name.startswith(ours):
            name = theirs + name.removeprefix(ours)
            return name.replace(".conv.", ".convolution.").replace(".norm.", ".normalization.")
    return transformers_name(name)


class Separable(nn.Module):
    """Depthwise 3×3 convolution, BatchNorm, 1×1 convolution; with ``norm`` also BatchNorm and ReLU."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, norm: bool = True) -> None:
        super().__init__()
        self.depthwise = ConvNorm(in_channels, in_channels, 3, stride, groups=in_channels)
        self.pointwise: nn.Module = (
            ConvNorm(in_channels, out_channels, activation=nn.ReLU) if norm else nn.Conv2d(in_channels, out_channels, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, out_channels, H / stride, W / stride), rounded up."""
        return self.pointwise(self.depthwise(x))


class Pooled(nn.Module):
    """The mean of a map, a 1×1 convolution and ReLU: the last and coarsest map of SSDLite."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, out_channels, 1, 1)."""
        return F.relu(self.conv(x.mean((2, 3), keepdim=True)))


class SSDHead(nn.Module):
    """Class scores and box offsets for the default boxes of every pixel of one map."""

    def __init__(self, in_channels: int, width: int, boxes: int, num_classes: int, separable: bool) -> None:
        super().__init__()
        self.num_classes, self.boxes = num_classes, boxes
        out = boxes * (4 + num_classes)
        self.project: nn.Module = nn.Identity()
        if separable and in_channels != width:
            self.project = ConvNorm(in_channels, width, activation=nn.ReLU)
            in_channels = width
        self.predict = Separable(in_channels, out, norm=False) if separable else nn.Conv2d(in_channels, out, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, in_channels, H, W) -> scores (B, H * W * boxes, num_classes), offsets (B, H * W * boxes, 4)."""
        each = 4 + self.num_classes
        found = self.predict(self.project(x)).permute(0, 2, 3, 1).unflatten(3, (self.boxes, each)).flatten(1, 3)
        offsets, scores = found.split((4, self.num_classes), -1)
        return scores, offsets


class SSDLite(nn.Module):
    """MobileViT with the SSDLite head for object detection (arXiv 2110.02178).

    Args:
        size: widths and depths of the backbone, an entry of :data:`mvmodels.mobilevit.SIZES`.
        num_classes: number of classes, including the background (class 0): 81 for COCO.
        in_chans: channels of the images.
        drop_rate: dropout probability of whole channels of each map before its head.
        features_only: return the maps of the backbone, without a head.
        dropout: dropout probability in the transformers.
        backend: passed to the fused ops.
    """

    def __init__(
        self,
        size: Size,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        features_only: bool = False,
        dropout: float = 0.0,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check_sizes("SSDLite", num_classes=num_classes, in_chans=in_chans)
        self.features_only = features_only
        self.backbone = Backbone(size, in_chans, 2, 32, dropout, backend)
        self.extra, self.heads = nn.ModuleList(), nn.ModuleList()
        self.dropout = nn.Dropout2d(drop_rate)
        if not features_only:
            width = size.widths[-1]
            channels = list(size.widths[-2:])
            for stride, out in zip(_STRIDES[2:], _WIDTHS[2:]):
                self.extra.append(Pooled(width, out) if stride is None else Separable(width, out, 2))
                channels.append(out)
                width = out
            for stride, found, out, ratios in zip(_STRIDES, channels, _WIDTHS, _RATIOS):
                boxes = 2 + 2 * len(ratios)
                self.heads.append(SSDHead(found, out, boxes, num_classes, separable=stride is not None))
        self.apply(initialise)

    @property
    def stages(self) -> tuple[tuple[int, int], ...]:
        """For each stage: the channels of its map, and the reduction of H and W (image side / map side)."""
        return self.backbone.stages

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor] | list[Tensor]:
        """Images (B, in_chans, H, W) -> scores (B, N, num_classes), offsets (B, N, 4), anchors (N, 4).

        Scores are before the softmax. Anchors are (x, y, width, height) with x and y of the centre, relative to the
        sides of the image. :func:`decode` computes boxes from offsets and anchors.
        """
        maps = self.backbone(x)
        if self.features_only:
            return maps
        maps = maps[-2:]
        for layer in self.extra:
            maps.append(layer(maps[-1]))
        found = [head(self.dropout(m)) for head, m in zip(self.heads, maps)]
        boxes = anchors([(m.shape[2], m.shape[3]) for m in maps]).to(x)
        return torch.cat([scores for scores, _ in found], 1), torch.cat([offsets for _, offsets in found], 1), boxes

    @property
    def weight_sources(self) -> dict[str, WeightSource]:
        if not self.features_only:
            return {}
        return {
            "timm": WeightSource(timm_name, r"final_conv\.|head\."),
            "mvmodels": WeightSource(lambda name: name, r"extra\.|heads\."),
        }


def anchors(sides: list[tuple[int, int]]) -> Tensor:
    """SSD's default boxes (N, 4) as (x, y, width, height) for maps of sizes ``sides`` (H, W), clipped to the image.

    The finest map comes first. Every pixel has a square of the scale of its map, a larger square between this scale and
    that of the next map, and for each aspect ratio an upright and a wide box with the area of the first square.
    """
    scales = [_SCALES[0] + (_SCALES[1] - _SCALES[0]) * i / len(_STRIDES) for i in range(len(_STRIDES) + 1)]
    found = []
    for (height, width), small, large, ratios in zip(sides, scales, scales[1:], _RATIOS):
        between = math.sqrt(small * large)
        shapes = [(small, small), (between, between)]
        for ratio in ratios:
            wide = math.sqrt(ratio)
            shapes += [(small * wide, small / wide), (small / wide, small * wide)]
        y, x = torch.meshgrid((torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij")
        centres = torch.stack((x, y), -1).reshape(-1, 1, 2).expand(-1, len(shapes), -1)
        found.append(torch.cat((centres, torch.tensor(shapes).expand(height * width, -1, -1)), -1).flatten(0, 1))
    return torch.cat(found).clamp(0.0, 1.0)


def decode(offsets: Tensor, boxes: Tensor) -> Tensor:
    """Boxes (B, N, 4) as corners (x0, y0, x1, y1), relative to the image, from offsets (B, N, 4) and anchors (N, 4).

    The inverse of SSD's encoding, with variances of 0.1 for centres and 0.2 for sides.
    """
    centre = boxes[:, :2] + offsets[..., :2] * _VARIANCES[0] * boxes[:, 2:]
    half = boxes[:, 2:] * (offsets[..., 2:] * _VARIANCES[1]).exp() / 2
    return torch.cat((centre - half, centre + half), -1)


def _register(size: str, deeplab: tuple[int, float, str], ssd: tuple[int, float, str]) -> None:
    build: Any = functools.partial(DeepLabV3, SIZES[size])
    name, note = f"mobilevit_{size}_deeplabv3", "segmentation, with the 21 classes of Pascal VOC"
    register(ModelInfo(name, build, _PAPER, *deeplab, "", None, input_size=512, num_classes=21, note=note))
    build = functools.partial(SSDLite, SIZES[size])
    name, note = f"mobilevit_{size}_ssdlite", "detection, with the 80 classes of COCO and the background"
    register(ModelInfo(name, build, _PAPER, *ssd, "", None, input_size=320, num_classes=81, note=note))


_register("xxs", (1_854_853, 3952.8, "1.9M"), (1_755_114, 842.0, "1.7M"))
_register("xs", (2_944_069, 7378.4, "2.9M"), (2_742_106, 1845.4, "2.7M"))
_register("s", (6_357_941, 13693.5, "6.4M"), (5_738_890, 3426.7, "5.7M"))
