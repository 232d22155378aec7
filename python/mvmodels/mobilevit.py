"""MobileViT (Mehta and Rastegari, arXiv 2110.02178): xxs, xs and s.

The network has the inverted residuals of MobileNetV2. Each of the last three stages also has a block in which the
pixels with the same position in their 2×2 patch attend to each other. The models with the dense heads of the paper,
DeepLabv3 and SSDLite, are in :mod:`mvmodels.mobilevit_dense`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mvkernels.dispatch.checks import known
from mvkernels.nn import PatchTransformer
from mvmodels.layers import ConvNorm, ToChannelsFirst, ToChannelsLast, check_picture, check_sizes
from mvmodels.registry import ModelInfo, WeightSource, register, renaming

_PAPER = "MobileViT: Light-weight, General-purpose, and Mobile-friendly Vision Transformer, arXiv 2110.02178"
_HEADS = 4
_PATCH = (2, 2)
_DEPTHS = (2, 4, 3)


@dataclass(frozen=True)
class Size:
    """Widths, depths and other numbers of a network (table 4 of the paper)."""

    widths: tuple[int, int, int, int, int]
    """Of the five stages."""
    dims: tuple[int, int, int]
    """Of the transformers in the last three; the feed-forward networks are twice as wide."""
    expansion: int
    """Of the inverted residuals."""
    last: int
    """Width of the 1×1 convolution before the classifier."""


SIZES = {
    "xxs": Size((16, 24, 48, 64, 80), (64, 80, 96), 2, 320),
    "xs": Size((32, 48, 64, 80, 96), (96, 120, 144), 4, 384),
    "s": Size((32, 64, 96, 128, 160), (144, 192, 240), 4, 640),
}
STEM = 16


class InvertedResidual(nn.Module):
    """1×1, depthwise 3×3 and 1×1 convolution, the last without activation. The input is added if the shapes match."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int, dilation: int = 1) -> None:
        super().__init__()
        hidden = in_channels * expansion
        self.residual = stride == 1 and in_channels == out_channels
        self.expand = ConvNorm(in_channels, hidden, activation=nn.SiLU)
        self.depthwise = ConvNorm(hidden, hidden, 3, stride, groups=hidden, dilation=dilation, activation=nn.SiLU)
        self.project = ConvNorm(hidden, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, out_channels, H / stride, W / stride), rounded up."""
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.residual else y


class MobileViTBlock(nn.Module):
    """MobileViT block (arXiv 2110.02178, section 3.1): 3×3 convolution, transformer, 3×3 convolution.

    The last convolution fuses the result of the transformer with the input. A map that the patch does not divide is
    resized before the transformer and back after it, as in the authors' code.
    """

    def __init__(self, channels: int, dim: int, depth: int, dropout: float, backend: str | None) -> None:
        super().__init__()
        self.local = ConvNorm(channels, channels, 3, activation=nn.SiLU)
        self.conv_in = ToChannelsLast(channels, dim, bias=False)
        self.transformer = PatchTransformer(dim, depth, _HEADS, patch_size=_PATCH, dropout=dropout, backend=backend)
        self.conv_out = ToChannelsFirst(dim, channels, bias=False)
        self.norm_out = nn.BatchNorm2d(channels)
        self.fusion = ConvNorm(2 * channels, channels, 3, activation=nn.SiLU)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) -> (B, channels, H, W)."""
        height, width = x.shape[2:]
        whole = tuple((side + patch - 1) // patch * patch for side, patch in zip((height, width), _PATCH))
        # In a graph for sizes that are not known always: where the patch divides them it changes nothing.
        resized = not all(known(new == old) for new, old in zip(whole, (height, width)))
        y = self.conv_in(self.local(x))
        if resized:
            y = F.interpolate(y, size=whole, mode="bilinear", align_corners=False)
        y = self.transformer(y)
        if resized:
            y = F.interpolate(y, size=(height, width), mode="bilinear", align_corners=False)
        y = F.silu(self.norm_out(self.conv_out(y)))
        return self.fusion(torch.cat((x, y), 1))


class Backbone(nn.Module):
    """The stem and the five stages of MobileViT.

    With ``output_stride`` 8 or 16 the stages after this reduction keep the resolution. Their depthwise convolutions are
    dilated instead, as in DeepLabv3.
    """

    def __init__(
        self, size: Size, in_chans: int, stem_stride: int, output_stride: int, dropout: float, backend: str | None
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if stem_stride not in (1, 2):
            raise ValueError(f"{name}: stem_stride is {stem_stride}, want 1 or 2")
        if output_stride not in (8, 16, 32):
            raise ValueError(f"{name}: output_stride is {output_stride}, want 8, 16 or 32")
        self.in_chans = in_chans
        self.stem = ConvNorm(in_chans, STEM, 3, stem_stride, activation=nn.SiLU)
        self.stages_of_blocks = nn.ModuleList()
        width, dilation, reduction, nominal = STEM, 1, stem_stride, 2
        stages = []
        for i, out in enumerate(size.widths):
            stride = 1 if i == 0 else 2
            nominal *= stride
            # The convolution that no longer strides is dilated as those before it were; those after it, more.
            inner = dilation
            if nominal > output_stride:
                stride, dilation = 1, 2 * dilation
            blocks: list[nn.Module] = [InvertedResidual(width, out, stride, size.expansion, inner)]
            if i == 1:
                blocks += [InvertedResidual(out, out, 1, size.expansion) for _ in range(2)]
            elif i >= 2:
                blocks.append(MobileViTBlock(out, size.dims[i - 2], _DEPTHS[i - 2], dropout, backend))
            self.stages_of_blocks.append(nn.Sequential(*blocks))
            width, reduction = out, reduction * stride
            stages.append((width, reduction))
        self.stages = tuple(stages)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Images (B, in_chans, H, W) -> the last map of each stage, finest first."""
        check_picture(self, x, self.in_chans)
        x = self.stem(x)
        maps = []
        for stage in self.stages_of_blocks:
            x = stage(x)
            maps.append(x)
        return maps


class MobileViT(nn.Module):
    """MobileViT for image classification or as a backbone.

    Args:
        size: widths and depths of the network, an entry of :data:`SIZES`.
        num_classes: number of classes.
        in_chans: channels of the images.
        drop_rate: dropout probability before the last layer (0.1 in the authors' recipe).
        features_only: return the list of each stage's last map, finest first, without a head.
        dropout: dropout probability in the transformers, after each projection (0.1 in the authors' recipe).
        output_stride: image side divided by the side of the last map: 32, or 16 or 8 for dense prediction.
        stem_stride: stride of the first convolution: 2, or 1 for small images.
        backend: passed to the fused ops.

    H and W of the images can be any size. Raises ValueError if a setting is out of range or an input is not
    (B, in_chans, H, W).
    """

    def __init__(
        self,
        size: Size,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        features_only: bool = False,
        dropout: float = 0.0,
        output_stride: int = 32,
        stem_stride: int = 2,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check_sizes("MobileViT", num_classes=num_classes, in_chans=in_chans)
        self.features_only = features_only
        self.backbone = Backbone(size, in_chans, stem_stride, output_stride, dropout, backend)
        self.last: ConvNorm | None = None
        self.dropout = nn.Dropout(drop_rate)
        self.classifier: nn.Linear | None = None
        if not features_only:
            self.last = ConvNorm(size.widths[-1], size.last, activation=nn.SiLU)
            self.classifier = nn.Linear(size.last, num_classes)
        self.apply(initialise)

    @property
    def stages(self) -> tuple[tuple[int, int], ...]:
        """For each stage: the channels of its map, and the reduction of H and W (image side / map side)."""
        return self.backbone.stages

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Images (B, in_chans, H, W) -> logits (B, num_classes), or with features_only a list of maps."""
        maps = self.backbone(x)
        if self.last is None or self.classifier is None:
            return maps
        return self.classifier(self.dropout(self.last(maps[-1]).mean((2, 3))))

    @property
    def weight_sources(self) -> dict[str, WeightSource]:
        headless = self.last is None
        return {
            "timm": WeightSource(timm_name, r"final_conv\.|head\." if headless else ""),
            "transformers": WeightSource(
                transformers_name, r"mobilevit\.conv_1x1_exp\.|classifier\.|segmentation_head\." if headless else ""
            ),
            "mvmodels": WeightSource(lambda name: name, r"last\.|classifier\.|head\." if headless else ""),
        }


def initialise(module: nn.Module) -> None:
    """Convolutions by the outputs that a weight reaches, Linears small."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


timm_name = renaming(
    [
        (r"^backbone\.stem\.norm\.", "stem.bn."),
        (r"^backbone\.stem\.", "stem."),
        (r"^backbone\.stages_of_blocks\.", "stages."),
        (r"\bexpand\.", "conv1_1x1."),
        (r"\bdepthwise\.", "conv2_kxk."),
        (r"\bproject\.", "conv3_1x1."),
        (r"\blocal\.", "conv_kxk."),
        (r"\bconv_in\.", "conv_1x1."),
        (r"\btransformer\.norm\.", "norm."),
        (r"\btransformer\.layers\.(\d+)\.(qkv|proj)\.", r"transformer.\1.attn.\2."),
        (r"\btransformer\.layers\.(\d+)\.(fc\d)\.", r"transformer.\1.mlp.\2."),
        (r"\btransformer\.layers\.", "transformer."),
        (r"\bconv_out\.", "conv_proj.conv."),
        (r"\bnorm_out\.", "conv_proj.bn."),
        (r"\bfusion\.", "conv_fusion."),
        (r"^last\.", "final_conv."),
        (r"^classifier\.", "head.fc."),
        (r"((?:conv\d_\dx\d|conv2_kxk|conv_kxk|conv_fusion|final_conv))\.norm\.", r"\1.bn."),
    ]
)


_transformers_name = renaming(
    [
        (r"^backbone\.stem\.", "mobilevit.conv_stem."),
        (r"^backbone\.stages_of_blocks\.([01])\.", r"mobilevit.encoder.layer.\1.layer."),
        (r"^backbone\.stages_of_blocks\.(\d)\.0\.", r"mobilevit.encoder.layer.\1.downsampling_layer."),
        (r"^backbone\.stages_of_blocks\.(\d)\.1\.", r"mobilevit.encoder.layer.\1."),
        (r"\bexpand\.", "expand_1x1."),
        (r"\bdepthwise\.", "conv_3x3."),
        (r"\bproject\.", "reduce_1x1."),
        (r"\blocal\.", "conv_kxk."),
        (r"\bconv_in\.", "conv_1x1.convolution."),
        (r"\btransformer\.norm\.", "layernorm."),
        (r"\btransformer\.layers\.(\d+)\.norm1\.", r"transformer.layer.\1.layernorm_before."),
        (r"\btransformer\.layers\.(\d+)\.norm2\.", r"transformer.layer.\1.layernorm_after."),
        (r"\btransformer\.layers\.(\d+)\.qkv\.", r"transformer.layer.\1.attention.attention.qkv."),
        (r"\btransformer\.layers\.(\d+)\.proj\.", r"transformer.layer.\1.attention.output.dense."),
        (r"\btransformer\.layers\.(\d+)\.fc1\.", r"transformer.layer.\1.intermediate.dense."),
        (r"\btransformer\.layers\.(\d+)\.fc2\.", r"transformer.layer.\1.output.dense."),
        (r"\bconv_out\.", "conv_projection.convolution."),
        (r"\bnorm_out\.", "conv_projection.normalization."),
        (r"^last\.", "mobilevit.conv_1x1_exp."),
        (r"\.conv\.", ".convolution."),
        (r"(?<!layer)\.norm\.", ".normalization."),
    ]
)


def transformers_name(name: str) -> str | tuple[str, ...]:
    """The names in transformers, which has separate query, key and value."""
    name = _transformers_name(name)
    if ".qkv." in name:
        return tuple(name.replace(".qkv.", f".{part}.") for part in ("query", "key", "value"))
    return name


def _register(size: str, params: int, macs: float, published: str, top1: float) -> None:
    build: Any = functools.partial(MobileViT, SIZES[size])
    register(ModelInfo(f"mobilevit_{size}", build, _PAPER, params, macs, published, "", top1, input_size=256))


_register("xxs", 1_272_024, 407.4, "1.3M", 69.0)
_register("xs", 2_317_848, 1025.9, "2.3M", 74.7)
_register("s", 5_578_632, 2000.8, "5.6M", 78.3)
