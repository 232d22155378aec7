"""EfficientViT (Cai et al., arXiv 2205.14756): the B models for mobile devices, and the larger L models.

This is the EfficientViT from MIT. Microsoft's EfficientViT (arXiv 2305.07027, ``efficientvit_m*`` in timm) is another
network.

The models follow the authors' published code. :func:`mvmodels.load_weights` loads their checkpoints and those of timm.
The authors and timm use different constants, which are not in the checkpoints, so loading sets them too: see
:func:`follow`.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from mvkernels.nn import ConvNormAct, EfficientViTBlock, LiteMLA, MBConv, Residual
from mvmodels.layers import check_picture, check_sizes
from mvmodels.registry import ModelInfo, WeightSource, register, renaming

_PAPER = "EfficientViT: Multi-Scale Linear Attention for High-Resolution Dense Prediction, arXiv 2205.14756"
_ATTENTION_EPS = {"mit": 1e-15, "timm": 1e-5}
_HARDSWISH = functools.partial(nn.Hardswish, inplace=True)
_GELU = functools.partial(nn.GELU, approximate="tanh")

Act = Callable[[], nn.Module]


@dataclass(frozen=True)
class Size:
    """Widths, depths and other numbers of a network."""

    widths: tuple[int, int, int, int, int]
    """Channels of the stem and of the four stages."""
    depths: tuple[int, int, int, int, int]
    """Number of blocks after the first convolution of the stem, and in each of the four stages. The block that halves
    the resolution is included in the stages without attention of the B models, and else not."""
    head: tuple[int, int]
    """Widths of the two hidden layers of the classifier."""
    head_dim: int = 32
    large: bool = False
    """Whether it is an L model: full convolutions in the early stages, attention in the last stage only, GELU."""


SIZES = {
    "b0": Size((8, 16, 32, 64, 128), (1, 2, 2, 2, 2), (1024, 1280), head_dim=16),
    "b1": Size((16, 32, 64, 128, 256), (1, 2, 3, 3, 4), (1536, 1600), head_dim=16),
    "b2": Size((24, 48, 96, 192, 384), (1, 3, 4, 4, 6), (2304, 2560)),
    "b3": Size((32, 64, 128, 256, 512), (1, 4, 6, 6, 9), (2304, 2560)),
    # The authors have the L0 without a classifier, as a backbone of SAM. Its widths are the L1's, and so is the head.
    "l0": Size((32, 64, 128, 256, 512), (1, 1, 1, 4, 4), (3072, 3200), large=True),
    "l1": Size((32, 64, 128, 256, 512), (1, 1, 1, 6, 6), (3072, 3200), large=True),
    "l2": Size((32, 64, 128, 256, 512), (1, 2, 2, 8, 8), (3072, 3200), large=True),
    "l3": Size((64, 128, 256, 512, 1024), (1, 2, 2, 8, 8), (6144, 6400), large=True),
}


class Head(nn.Module):
    """Classifier: 1×1 convolution, BatchNorm, activation; mean; Linear, LayerNorm, activation; dropout, Linear."""

    def __init__(
        self, channels: int, widths: tuple[int, int], num_classes: int, drop_rate: float, act: Act, norm_eps: float
    ) -> None:
        super().__init__()
        self.conv = ConvNormAct(channels, widths[0], norm_eps=norm_eps, act=act)
        self.fc = nn.Linear(widths[0], widths[1], bias=False)
        self.norm = nn.LayerNorm(widths[1], eps=norm_eps)
        self.act = act()
        self.dropout = nn.Dropout(drop_rate)
        self.classifier = nn.Linear(widths[1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, channels, H, W) -> logits (B, num_classes)."""
        hidden = F.adaptive_avg_pool2d(self.conv(x), 1).flatten(1)
        return self.classifier(self.dropout(self.act(self.norm(self.fc(hidden)))))


class EfficientViT(nn.Module):
    """EfficientViT for image classification or as a backbone.

    A stem of stride 2 and four stages, which each halve the map once more. The last stages have attention: the third
    and the fourth in a B model, the fourth in an L model.

    Args:
        size: widths and depths of the network, an entry of :data:`SIZES`.
        num_classes: number of classes.
        in_chans: channels of the images.
        drop_rate: dropout probability before the last layer.
        features_only: return the list of each stage's last map, finest first, without a head.
        scales: kernel sizes of the scales of the attention, see :class:`mvkernels.nn.LiteMLA`; (5,) in checkpoints.
        dw_in_ffn: whether the feed-forward network after the attention has a depthwise 3×3 convolution. The models of
            the published checkpoints have it.
        conventions: constants of the authors' code ("mit") or of timm ("timm"): see :func:`follow`.
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
        scales: Sequence[int] = (5,),
        dw_in_ffn: bool = True,
        conventions: str = "mit",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check_sizes("EfficientViT", num_classes=num_classes, in_chans=in_chans)
        self.size, self.in_chans, self.features_only = size, in_chans, features_only
        act, norm_eps = (_GELU, 1e-7) if size.large else (_HARDSWISH, 1e-5)
        block = functools.partial(
            EfficientViTBlock,
            head_dim=size.head_dim,
            expand_ratio=6.0 if size.large else 4.0,
            scales=scales,
            dw_in_ffn=dw_in_ffn,
            act=act,
            norm_eps=norm_eps,
            backend=backend,
        )
        build = _large_stage if size.large else _stage
        width = size.widths[0]
        self.stem = nn.Sequential(
            ConvNormAct(in_chans, width, 3, stride=2, norm_eps=norm_eps, act=act),
            *(Residual(_convolutions(width, width, size.large, act, norm_eps)) for _ in range(size.depths[0])),
        )
        self.body = nn.ModuleList()
        for stage, (out, depth) in enumerate(zip(size.widths[1:], size.depths[1:]), 1):
            self.body.append(build(stage, width, out, depth, block, act, norm_eps))
            width = out
        self.stages = tuple(zip(size.widths[1:], (4, 8, 16, 32)))
        """For each stage: the channels of its map, and the reduction of H and W (image side / map side)."""
        self.head = None if features_only else Head(width, size.head, num_classes, drop_rate, act, norm_eps)
        follow(self, conventions)

    def forward_features(self, x: Tensor) -> list[Tensor]:
        """Images (B, in_chans, H, W) -> the last map of each stage, finest first."""
        check_picture(self, x, self.in_chans)
        x = self.stem(x)
        maps = []
        for stage in self.body:
            x = stage(x)
            maps.append(x)
        return maps

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Images (B, in_chans, H, W) -> logits (B, num_classes), or with features_only a list of maps."""
        maps = self.forward_features(x)
        return maps if self.head is None else self.head(maps[-1])

    @property
    def weight_sources(self) -> dict[str, WeightSource]:
        """The sources of weights that can be loaded: see :class:`mvmodels.WeightSource`."""
        unused = "" if self.head is not None else r"head\."
        names = renaming([*(_MIT_LARGE if self.size.large else _MIT_B), *_MIT])
        mit = WeightSource(names, unused, functools.partial(follow, conventions="mit"))
        return {
            "authors": mit,
            "mit": mit,
            "timm": WeightSource(renaming(_TIMM), unused, functools.partial(follow, conventions="timm")),
            "mvmodels": WeightSource(lambda name: name, unused),
        }


def follow(model: EfficientViT, conventions: str) -> None:
    """Set the constants that are not in checkpoints to those of the authors' code ("mit") or of timm ("timm").

    The epsilon in the divisor of the attention is 1e-15 in the authors' code and 1e-5 in timm. The norms of the L
    models have epsilon 1e-7. In timm the norm in the first layer of the head has 1e-5 instead.

    Raises ValueError for other ``conventions``.
    """
    if conventions not in _ATTENTION_EPS:
        raise ValueError(f"EfficientViT: conventions is {conventions!r}, want {' or '.join(_ATTENTION_EPS)}")
    for module in model.modules():
        if isinstance(module, LiteMLA):
            module.eps = _ATTENTION_EPS[conventions]
    if model.head is not None and model.size.large:
        norm = model.head.conv.norm
        norm.eps = 1e-7 if conventions == "mit" else 1e-5  # type: ignore[assignment]


def _convolutions(
    in_channels: int,
    out_channels: int,
    full: bool,
    act: Act,
    norm_eps: float,
    stride: int = 1,
    expand_ratio: int = 1,
) -> nn.Module:
    """Two convolutions: depthwise and 1×1, or ``full``: two of 3×3, or a widening 3×3 and a 1×1."""
    make = functools.partial(ConvNormAct, norm_eps=norm_eps)
    if not full:
        parts = {
            "depth_conv": make(in_channels, in_channels, 3, stride, groups=in_channels, act=act),
            "point_conv": make(in_channels, out_channels),
        }
    elif expand_ratio == 1:
        parts = {
            "conv1": make(in_channels, in_channels, 3, stride, act=act),
            "conv2": make(in_channels, out_channels, 3),
        }
    else:
        hidden = in_channels * expand_ratio
        parts = {
            "spatial_conv": make(in_channels, hidden, 3, stride, act=act),
            "point_conv": make(hidden, out_channels),
        }
    return nn.Sequential(OrderedDict(parts))


def _stage(
    stage: int, width: int, out: int, depth: int, block: Callable[[int], nn.Module], act: Act, norm_eps: float
) -> nn.Sequential:
    """A stage of a B model: inverted residuals, and attention in the third and the fourth."""
    local = functools.partial(MBConv, act=act, norm_eps=norm_eps, expand_ratio=4.0)
    first = _main(local(width, out, 2, fewer_norm=stage >= 3))
    if stage >= 3:
        return nn.Sequential(first, *(block(out) for _ in range(depth)))
    return nn.Sequential(first, *(Residual(local(out, out)) for _ in range(depth - 1)))


def _large_stage(
    stage: int, width: int, out: int, depth: int, block: Callable[[int], nn.Module], act: Act, norm_eps: float
) -> nn.Sequential:
    """A stage of an L model: full convolutions in the first two, inverted residuals, attention in the fourth."""

    def local(in_channels: int, stride: int, expand_ratio: int) -> nn.Module:
        if stage <= 2:
            return _convolutions(in_channels, out, True, act, norm_eps, stride, expand_ratio)
        return MBConv(in_channels, out, stride, expand_ratio, fewer_norm=True, act=act, norm_eps=norm_eps)

    first = _main(local(width, 2, 24 if stage == 4 else 16))
    return nn.Sequential(first, *(block(out) if stage == 4 else Residual(local(out, 1, 4)) for _ in range(depth)))


def _main(module: nn.Module) -> nn.Module:
    """The module, with the name that it has inside a residual."""
    parts: OrderedDict[str, nn.Module] = OrderedDict(main=module)
    return nn.Sequential(parts)


_TIMM = [
    (r"^stem\.0\.", "stem.in_conv."),
    (r"^stem\.1\.", "stem.res0."),
    (r"^body\.(\d)\.", r"stages.\1.blocks."),
    (r"^head\.conv\.", "head.in_conv."),
    (r"^head\.fc\.", "head.classifier.0."),
    (r"^head\.norm\.", "head.classifier.1."),
    (r"^head\.classifier\.(?=weight|bias)", "head.classifier.4."),
]
_MIT = [
    (r"^head\.conv\.", "head.op_list.0."),
    (r"^head\.fc\.", "head.op_list.2.linear."),
    (r"^head\.norm\.", "head.op_list.2.norm."),
    (r"^head\.classifier\.", "head.op_list.3.linear."),
]
_MIT_B = [(r"^stem\.", "backbone.input_stem.op_list."), (r"^body\.(\d)\.", r"backbone.stages.\1.op_list.")]
_MIT_LARGE = [
    (r"^stem\.", "backbone.stages.0.op_list."),  # here the stem is one of the stages
    *((rf"^body\.{i}\.", f"backbone.stages.{i + 1}.op_list.") for i in range(4)),
]


def _register(
    size: str, params: int, macs: float, printed: tuple[str, str], top1: float | None, note: str = ""
) -> None:
    register(
        ModelInfo(
            name=f"efficientvit_{size}",
            build=functools.partial(EfficientViT, SIZES[size]),
            paper=_PAPER,
            params=params,
            macs=macs,
            published_params=printed[0],
            published_flops=printed[1],
            published_top1=top1,
            note=note,
        )
    )


_register("b0", 3_410_008, 100.2, ("", ""), None)
_register("b1", 9_102_024, 519.2, ("9.1M", "0.52G"), 79.39)
_register("b2", 24_330_712, 1_584.9, ("24M", "1.6G"), 82.10)
_register("b3", 48_646_056, 3_953.8, ("49M", "4.0G"), 83.47)
_register(
    "l0",
    42_422_280,
    4_594.7,
    ("", ""),
    None,
    "published as a backbone of SAM without a classifier; the head here is the L1's",
)
_register("l1", 52_654_088, 5_258.5, ("53M", "5.3G"), 84.48)
_register("l2", 63_707_016, 6_949.9, ("64M", "6.9G"), 85.05)
_register("l3", 246_037_288, 27_586.5, ("246M", "28G"), 85.81)
