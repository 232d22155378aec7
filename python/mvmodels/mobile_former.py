"""Mobile-Former (Chen et al., arXiv 2108.05895): the seven sizes from 26M to 508M multiply-adds.

The models follow the authors' published code where it has details that are not in the paper: the gate of Mobile→Former,
four heads in Former and two in the bridges, the order of the sub-blocks, and in the 26M model grouped convolutions with
channel shuffles. ``plain=True`` builds the bridges as in the equations of the paper instead.
"""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mvkernels.nn import DownsampleMobile, Former, FormerToMobile, Mobile, MobileToFormer
from mvmodels.layers import check_picture, check_sizes
from mvmodels.registry import ModelInfo, WeightSource, register, renaming

_PAPER = "Mobile-Former: Bridging MobileNet and Transformer, arXiv 2108.05895"


@dataclass(frozen=True)
class Size:
    """Widths, depths and other numbers of a network."""

    stem: int
    """Width of the stem."""
    first: tuple[int, int, int]
    """Width, expansion and stride of the first block, which knows no tokens."""
    blocks: str
    """The others: "24/2" halves the resolution at width 24, "12(3)" keeps it, with an expansion of 3."""
    tokens: tuple[int, int]
    """How many, and their width."""
    features: int
    """Width of the classifier's hidden layer."""
    groups: int = 1
    """Of the 1×1 convolutions."""


_SMALL = "12(3) 24/2 24(3) 48/2 48(4) 64(6) 96/2 96(6)"
SIZES = {
    "26m": Size(8, (12, 3, 2), _SMALL, (3, 128), 1024, groups=4),
    "52m": Size(8, (12, 3, 2), _SMALL, (3, 128), 1024),
    "96m": Size(12, (12, 2, 1), "16/2 32/2 32(3) 64/2 64(4) 88(6) 128/2 128(6)", (4, 128), 1280),
    "151m": Size(12, (12, 2, 1), "16/2 16(3) 32/2 32(3) 64/2 64(4) 88(6) 88(6) 128/2 128(6) 128(6)", (6, 192), 1280),
    "214m": Size(12, (12, 2, 1), "20/2 20(3) 40/2 40(4) 80/2 80(4) 112(6) 112(6) 160/2 160(6) 160(6)", (6, 192), 1600),
    "294m": Size(16, (16, 2, 1), "24/2 24(4) 48/2 48(4) 96/2 96(4) 128(6) 128(6) 192/2 192(6) 192(6)", (6, 192), 1920),
    "508m": Size(
        24, (24, 2, 1), "40/2 40(3) 72/2 72(3) 128/2 128(4) 176(6) 176(6) 240/2 240(6) 240(6)", (6, 192), 1920
    ),
}
# Of the halving blocks: the widths of their two depthwise convolutions over the block's input and output.
_DOWNSAMPLE = (6, 4)
_FORMER_HEADS = 4
_BRIDGE_HEADS = 2
_HEAD_EXPANSION = 6


class MobileFormerBlock(nn.Module):
    """A Mobile-Former block: Mobile→Former, Former, Mobile, Former→Mobile, in this order.

    The tokens read the input map. The slopes of Mobile's activations are computed from the first token after Former. So
    Mobile runs after Former, although the paper calls the two paths parallel.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        expansion: int | None,
        token_dim: int,
        groups: int,
        drop_path: float,
        plain: bool,
        backend: str | None,
    ) -> None:
        super().__init__()
        bridge: dict[str, Any] = {"headwise": plain, "drop_path": drop_path, "backend": backend}
        self.mobile_to_former = MobileToFormer(in_channels, token_dim, _BRIDGE_HEADS, gate=not plain, **bridge)
        self.former = Former(token_dim, _FORMER_HEADS, drop_path=drop_path)
        self.mobile: nn.Module
        if expansion is None:
            self.mobile = DownsampleMobile(in_channels, out_channels, _DOWNSAMPLE, token_dim, groups, drop_path)
        else:
            self.mobile = Mobile(in_channels, out_channels, expansion, token_dim, groups, drop_path)
        self.former_to_mobile = FormerToMobile(out_channels, token_dim, _BRIDGE_HEADS, **bridge)

    def forward(self, x: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, in_channels, H, W), tokens (B, M, token_dim) -> the same after the block."""
        tokens = self.former(self.mobile_to_former(x, tokens))
        return self.former_to_mobile(self.mobile(x, tokens[:, 0]), tokens), tokens


class FirstBlock(nn.Module):
    """Depthwise 3×3 that widens, BatchNorm, ReLU6, 1×1, BatchNorm. The input is added if the shapes match.

    The tokens are not changed.
    """

    def __init__(self, in_channels: int, out_channels: int, expansion: int, stride: int, groups: int) -> None:
        super().__init__()
        hidden = in_channels * expansion
        self.residual = stride == 1 and in_channels == out_channels
        self.conv1 = nn.Conv2d(in_channels, hidden, 3, stride, 1, groups=in_channels, bias=False)
        self.norm1 = nn.BatchNorm2d(hidden)
        self.shuffle = nn.ChannelShuffle(in_channels) if groups > 1 else nn.Identity()
        self.conv2 = nn.Conv2d(hidden, out_channels, 1, groups=groups, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, in_channels, H, W) -> (B, out_channels, H / stride, W / stride), rounded up; the tokens unchanged."""
        y = self.norm2(self.conv2(self.shuffle(F.relu6(self.norm1(self.conv1(x))))))
        return (x + y if self.residual else y), tokens


class Stem(nn.Module):
    """3×3 convolution, BatchNorm, ReLU6."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, out_channels, H / stride, W / stride), rounded up."""
        return F.relu6(self.norm(self.conv(x)))


class Head(nn.Module):
    """Classifier on the mean of the widened map and the first token, with one hidden layer."""

    def __init__(
        self, channels: int, token_dim: int, features: int, num_classes: int, groups: int, drop_rate: float
    ) -> None:
        super().__init__()
        hidden = _HEAD_EXPANSION * channels
        self.shuffle = nn.ChannelShuffle(groups) if groups > 1 else nn.Identity()
        self.conv = nn.Conv2d(channels, hidden, 1, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(hidden)
        self.fc = nn.Linear(hidden + token_dim, features)
        self.fc_norm = nn.BatchNorm1d(features)
        self.dropout = nn.Dropout(drop_rate)
        self.classifier = nn.Linear(features, num_classes)

    def forward(self, x: Tensor, token: Tensor) -> Tensor:
        """x (B, channels, H, W), token (B, token_dim) -> logits (B, num_classes)."""
        pooled = F.hardswish(F.relu6(self.norm(self.conv(self.shuffle(x)))).mean((2, 3)))
        hidden = F.hardswish(self.fc_norm(self.fc(torch.cat((pooled, token), 1))))
        return self.classifier(self.dropout(hidden))


class MobileFormer(nn.Module):
    """Mobile-Former for image classification or as a backbone.

    A MobileNet and a transformer on a few tokens run in parallel. Each block has a bridge in each direction.

    Args:
        size: widths and depths of the network, an entry of :data:`SIZES`.
        num_classes: number of classes.
        in_chans: channels of the images.
        drop_rate: dropout probability before the last layer.
        drop_path_rate: drop path probability of the last block; it grows linearly over the blocks. A whole sample
            loses a residual branch (in the authors' code, which has tokens in front, a token does).
        features_only: return the list of each stage's last map, finest first, without a head.
        plain: whether the bridges follow equations 1 and 2 of the paper: no gate in Mobile→Former, and a separate
            projection of the tokens for each head. The authors' checkpoints do not fit this form.
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
        drop_path_rate: float = 0.0,
        features_only: bool = False,
        plain: bool = False,
        stem_stride: int = 2,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check_sizes("MobileFormer", num_classes=num_classes, in_chans=in_chans)
        if stem_stride not in (1, 2):
            raise ValueError(f"MobileFormer: stem_stride is {stem_stride}, want 1 or 2")
        count, token_dim = size.tokens
        self.in_chans, self.features_only = in_chans, features_only
        self.tokens = nn.Parameter(torch.randn(count, token_dim))
        self.stem = Stem(in_chans, size.stem, stem_stride)

        blocks = [_parse(block) for block in size.blocks.split()]
        width, expansion, stride = size.first
        self.blocks = nn.ModuleList([FirstBlock(size.stem, width, expansion, stride, size.groups)])
        reduction = stem_stride
        # A stage ends where the next block halves the resolution; -1 is the stem.
        ends, stages = ([-1], [(size.stem, reduction)]) if stride == 2 else ([], [])
        reduction *= stride
        for i, (out, expand) in enumerate(blocks, 1):
            if expand is None:
                ends.append(i - 1)
                stages.append((width, reduction))
                reduction *= 2
            drop_path = drop_path_rate * (i + 1) / (len(blocks) + 1)
            self.blocks.append(MobileFormerBlock(width, out, expand, token_dim, size.groups, drop_path, plain, backend))
            width = out
        self.stage_ends = (*ends, len(blocks))
        self.stages = (*stages, (width, reduction))
        """For each stage: the channels of its map, and the reduction of H and W (image side / map side)."""

        self.mobile_to_former: MobileToFormer | None = None
        self.head: Head | None = None
        if not features_only:
            self.mobile_to_former = MobileToFormer(
                width,
                token_dim,
                _BRIDGE_HEADS,
                gate=not plain,
                headwise=plain,
                drop_path=drop_path_rate,
                backend=backend,
            )
            self.head = Head(width, token_dim, size.features, num_classes, size.groups, drop_rate)
        self.apply(_initialise)

    def forward_features(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """Images (B, in_chans, H, W) -> the last map of each stage, finest first, and tokens (B, M, token_dim)."""
        check_picture(self, x, self.in_chans)
        tokens = self.tokens.expand(x.shape[0], -1, -1)
        x = self.stem(x)
        maps = [x] if -1 in self.stage_ends else []
        for i, block in enumerate(self.blocks):
            x, tokens = block(x, tokens)
            if i in self.stage_ends:
                maps.append(x)
        return maps, tokens

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Images (B, in_chans, H, W) -> logits (B, num_classes), or with features_only a list of maps."""
        maps, tokens = self.forward_features(x)
        if self.head is None or self.mobile_to_former is None:
            return maps
        tokens = self.mobile_to_former(maps[-1], tokens)
        return self.head(maps[-1], tokens[:, 0])

    @property
    def weight_sources(self) -> dict[str, WeightSource]:
        headless = self.head is None
        return {
            "authors": WeightSource(renaming(_AUTHORS), r"classifier\.|local_global\." if headless else ""),
            "mvmodels": WeightSource(lambda name: name, r"head\.|mobile_to_former\." if headless else ""),
        }


_AUTHORS = [
    (r"^tokens$", "tokens.weight"),
    (r"^stem\.conv\.", "stem.0."),
    (r"^stem\.norm\.", "stem.1."),
    (r"^blocks\.0\.conv1\.", "features.0.conv.0."),
    (r"^blocks\.0\.norm1\.", "features.0.conv.1."),
    (r"^blocks\.0\.conv2\.", "features.0.conv.4."),
    (r"^blocks\.0\.norm2\.", "features.0.conv.5."),
    (r"^blocks\.(\d+)\.", r"features.\1."),
    (r"\bmobile\.conv(\d)\.", r"conv\1.0."),
    (r"\bmobile\.norm(\d)\.", r"conv\1.1."),
    (r"\bmobile\.act(\d)\.fc1\.", r"hyper\1.hyper.0."),
    (r"\bmobile\.act(\d)\.fc2\.", r"hyper\1.hyper.2."),
    (r"\bmobile_to_former\.query\.", "local_global.q."),
    (r"\bmobile_to_former\.gate\.", "local_global.alpha.0."),
    (r"\bmobile_to_former\.proj\.", "local_global.proj."),
    (r"\bmobile_to_former\.norm\.", "local_global.layer_norm."),
    (r"\bformer\.query\.", "global_block.q."),
    (r"\bformer\.proj\.", "global_block.channel_mlp."),
    (r"\bformer\.norm1\.", "global_block.layer_norm."),
    (r"\bformer\.fc1\.", "global_block.ffn.0."),
    (r"\bformer\.fc2\.", "global_block.ffn.2."),
    (r"\bformer\.norm2\.", "global_block.ffn_norm."),
    (r"\bformer_to_mobile\.key\.", "global_local.k."),
    (r"\bformer_to_mobile\.value\.", "global_local.proj."),
    (r"^head\.conv\.", "classifier.conv.1."),
    (r"^head\.norm\.", "classifier.conv.2."),
    (r"^head\.fc\.", "classifier.fc.0."),
    (r"^head\.fc_norm\.", "classifier.fc.1."),
    (r"^head\.classifier\.", "classifier.classifier.1."),
]


def _parse(block: str) -> tuple[int, int | None]:
    """ "24/2" -> (24, None), "12(3)" -> (12, 3)."""
    width, rest = re.split(r"[/(]", block)
    return int(width), int(rest.rstrip(")")) if "(" in block else None


def _initialise(module: nn.Module) -> None:
    """The authors' initialisation: convolutions by the outputs that a weight reaches, Linears nearly zero."""
    if isinstance(module, nn.Conv2d):
        fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
        nn.init.normal_(module.weight, 0.0, math.sqrt(2.0 / fan_out))
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, 0.0, 0.01)
        nn.init.zeros_(module.bias)


def _register(size: str, params: int, macs: float, published: str, top1: float) -> None:
    register(
        ModelInfo(
            name=f"mobile_former_{size}",
            build=functools.partial(MobileFormer, SIZES[size]),
            paper=_PAPER,
            params=params,
            macs=macs,
            published_params=published,
            published_flops=size.upper(),
            published_top1=top1,
        )
    )


_register("26m", 3_232_788, 23.5, "3.2M", 64.0)
_register("52m", 3_469_092, 49.3, "3.5M", 68.7)
_register("96m", 4_585_252, 92.0, "4.6M", 72.8)
_register("151m", 7_595_828, 146.1, "7.6M", 75.2)
_register("214m", 9_425_920, 208.2, "9.4M", 76.7)
_register("294m", 11_422_648, 286.6, "11.4M", 77.9)
_register("508m", 13_976_976, 498.3, "14.0M", 79.3)
