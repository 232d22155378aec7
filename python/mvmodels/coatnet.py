"""CoAtNet (Dai et al., arXiv 2106.04803): coatnet_0 to coatnet_4, like timm's models of these names.

Two stages of convolutions (MBConv), then two stages of attention over the whole map with a learned bias for each offset
(dy, dx) between two pixels: ``patch_attention(patch_size=1, bias=…)``. The authors have published no code, and other
implementations differ. This one follows timm: average pooling at the beginning of a stage, and the stride of an MBConv
in its depthwise convolution. ``pool="max"`` and ``stride_in="expand"`` follow the paper.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mvkernels.nn import DropPath
from mvmodels.layers import Mlp, attention_over_map, check_backend, check_picture, check_sizes, picture_sides
from mvmodels.registry import ModelInfo, WeightSource, register, renaming

_PAPER = "CoAtNet: Marrying Convolution and Attention for All Data Sizes, arXiv 2106.04803"
_HEAD_DIM = 32
_EXPANSION = 4
_NORM_EPS = 1e-6


@dataclass(frozen=True)
class Size:
    """Widths, depths and other numbers of a network (table 3 of the paper)."""

    stem: int
    depths: tuple[int, int, int, int]
    widths: tuple[int, int, int, int]


SIZES = {
    "0": Size(64, (2, 3, 5, 2), (96, 192, 384, 768)),
    "1": Size(64, (2, 6, 14, 2), (96, 192, 384, 768)),
    "2": Size(128, (2, 6, 14, 2), (128, 256, 512, 1024)),
    "3": Size(192, (2, 6, 14, 2), (192, 384, 768, 1536)),
    "4": Size(192, (2, 12, 28, 2), (192, 384, 768, 1536)),
}


def _halve(x: Tensor, pool: str) -> Tensor:
    """2×2 pooling of (B, C, H, W). Odd sides are rounded up, as in a convolution of stride 2."""
    if pool == "max":
        return F.max_pool2d(x, 2, ceil_mode=True)
    return F.avg_pool2d(x, 2, ceil_mode=True)


class Shortcut(nn.Module):
    """The shortcut of a block that halves the map: pooling, and a 1×1 convolution if the numbers of channels differ."""

    def __init__(self, in_channels: int, out_channels: int, pool: str) -> None:
        super().__init__()
        self.pool = pool
        self.expand = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, out_channels, H / 2, W / 2), rounded up."""
        return self.expand(_halve(x, self.pool))


class SqueezeExcite(nn.Module):
    """Squeeze and excitation: scales each channel by a factor that is computed from the means of all channels."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, hidden, 1)
        self.fc2 = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) -> the same shape."""
        return x * self.fc2(F.silu(self.fc1(x.mean((2, 3), keepdim=True)))).sigmoid()


class MBConv(nn.Module):
    """x + convolutions(BatchNorm(x)): 1×1 that widens, depthwise 3×3, squeeze and excitation, 1×1."""

    def __init__(
        self, in_channels: int, out_channels: int, stride: int, drop_path: float, pool: str, stride_in: str
    ) -> None:
        super().__init__()
        hidden = _EXPANSION * out_channels
        strides = (stride, 1) if stride_in == "expand" else (1, stride)
        self.shortcut = Shortcut(in_channels, out_channels, pool) if stride == 2 else nn.Identity()
        self.pre_norm = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, hidden, 1, strides[0], bias=False)
        self.norm1 = nn.BatchNorm2d(hidden)
        self.conv2 = nn.Conv2d(hidden, hidden, 3, strides[1], 1, groups=hidden, bias=False)
        self.norm2 = nn.BatchNorm2d(hidden)
        self.se = SqueezeExcite(hidden, out_channels // 4)
        self.conv3 = nn.Conv2d(hidden, out_channels, 1)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, out_channels, H / stride, W / stride), rounded up."""
        y = F.gelu(self.norm1(self.conv1(self.pre_norm(x))))
        y = self.se(F.gelu(self.norm2(self.conv2(y))))
        return self.drop_path(self.conv3(y)) + self.shortcut(x)


class RelativeAttention(nn.Module):
    """Attention over the whole map (B, H, W, C), contiguous, with a bias for each head and offset (dy, dx).

    The table of biases ((2h - 1) * (2w - 1), heads) is made for a map of ``window`` = (h, w). For another map it is
    resized (bicubic) in every call.
    """

    def __init__(self, in_channels: int, channels: int, window: tuple[int, int], backend: str | None) -> None:
        super().__init__()
        self.heads, self.window, self.backend = channels // _HEAD_DIM, window, backend
        self.qkv = nn.Linear(in_channels, 3 * channels)
        self.bias_table = nn.Parameter(torch.empty((2 * window[0] - 1) * (2 * window[1] - 1), self.heads))
        self.proj = nn.Linear(channels, channels)
        nn.init.trunc_normal_(self.bias_table, std=0.02)

    def bias(self, height: int, width: int) -> Tensor:
        """(heads, height * width, height * width), gathered from the table in every call."""
        table = self.bias_table.t()
        if (height, width) != self.window:
            rows, columns = 2 * self.window[0] - 1, 2 * self.window[1] - 1
            table = table.reshape(1, self.heads, rows, columns)
            table = F.interpolate(table, size=(2 * height - 1, 2 * width - 1), mode="bicubic").flatten(2)[0]
        return table[:, offsets(height, width, table.device)]

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, in_channels) -> (B, H, W, channels)."""
        bias = self.bias(x.shape[1], x.shape[2])
        sizes = (_HEAD_DIM, _HEAD_DIM, _HEAD_DIM)
        return self.proj(attention_over_map(self.qkv(x), sizes, self.heads, bias, _HEAD_DIM**-0.5, self.backend))

    def products(self, x: Tensor) -> int:
        """Multiply-adds of the two matrix products, for :func:`mvmodels.count_macs`."""
        pixels = x.shape[1] * x.shape[2]
        return 2 * x.shape[0] * pixels * pixels * self.heads * _HEAD_DIM


def offsets(height: int, width: int, device: torch.device) -> Tensor:
    """For pixels i and j, row by row, (dy + height - 1) * (2 * width - 1) + dx + width - 1 with dy = y_i - y_j."""
    y = torch.arange(height, device=device).repeat_interleave(width)
    x = torch.arange(width, device=device).repeat(height)
    return (y[:, None] - y + height - 1) * (2 * width - 1) + (x[:, None] - x + width - 1)


class TransformerBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), on (B, H, W, C); the first of a stage halves the map."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int,
        window: tuple[int, int],
        dropout: float,
        drop_path: float,
        pool: str,
        backend: str | None,
    ) -> None:
        super().__init__()
        self.pool = pool
        self.shortcut: Shortcut | None = Shortcut(in_channels, channels, pool) if stride == 2 else None
        self.norm1 = nn.LayerNorm(in_channels, eps=_NORM_EPS)
        self.attention = RelativeAttention(in_channels, channels, window, backend)
        self.norm2 = nn.LayerNorm(channels, eps=_NORM_EPS)
        self.mlp = Mlp(channels, _EXPANSION, dropout)
        self.dropout, self.drop_path = nn.Dropout(dropout), DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, in_channels) -> (B, H / stride, W / stride, channels), rounded up."""
        y = self.norm1(x)
        if self.shortcut is not None:
            y = _halve(y.permute(0, 3, 1, 2), self.pool).permute(0, 2, 3, 1)
            x = self.shortcut(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        x = x + self.drop_path(self.dropout(self.attention(y.contiguous())))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class CoAtNet(nn.Module):
    """CoAtNet for image classification or as a backbone.

    Args:
        size: widths and depths of the network, an entry of :data:`SIZES`.
        num_classes: number of classes.
        in_chans: channels of the images.
        drop_rate: dropout probability before the last layer.
        features_only: return the list of the stem's map and each stage's last map, finest first, without a head.
        image_size: side of the images (or height and width) that the bias tables are made for. Images may have another
            size: the tables are then resized.
        drop_path_rate: drop path probability of the last block; it grows linearly over the blocks.
        dropout: dropout probability in the transformers, after the projection and in the MLP.
        pool: "avg" as in timm, or "max" as in the paper.
        stride_in: convolution of an MBConv that halves the map: "depthwise" as in timm, or "expand" as in the paper.
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
        image_size: int | tuple[int, int] = 224,
        drop_path_rate: float = 0.0,
        dropout: float = 0.0,
        pool: str = "avg",
        stride_in: str = "depthwise",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check_sizes("CoAtNet", num_classes=num_classes, in_chans=in_chans)
        height, width = picture_sides("CoAtNet", image_size)
        check_backend(backend)
        for name, value, known in (("pool", pool, ("avg", "max")), ("stride_in", stride_in, ("depthwise", "expand"))):
            if value not in known:
                raise ValueError(f"CoAtNet: {name} is {value!r}, want {' or '.join(known)}")
        self.in_chans, self.features_only = in_chans, features_only
        self.stem_conv1 = nn.Conv2d(in_chans, size.stem, 3, 2, 1, bias=False)
        self.stem_norm = nn.BatchNorm2d(size.stem)
        self.stem_conv2 = nn.Conv2d(size.stem, size.stem, 3, 1, 1, bias=False)
        total = sum(size.depths)
        rates = iter([drop_path_rate * i / max(1, total - 1) for i in range(total)])
        self.blocks = nn.ModuleList()
        channels = size.stem
        for i, (depth, out) in enumerate(zip(size.depths, size.widths)):
            window = (-(-height // 2 ** (i + 2)), -(-width // 2 ** (i + 2)))
            blocks: list[nn.Module] = []
            for j in range(depth):
                stride, rate = 2 if j == 0 else 1, next(rates)
                if i < 2:
                    blocks.append(MBConv(channels, out, stride, rate, pool, stride_in))
                else:
                    blocks.append(TransformerBlock(channels, out, stride, window, dropout, rate, pool, backend))
                channels = out
            self.blocks.append(nn.Sequential(*blocks))
        self.stages = ((size.stem, 2), *((out, 4 * 2**i) for i, out in enumerate(size.widths)))
        """For each map: its channels, and the image side divided by the map side."""
        self.dropout = nn.Dropout(drop_rate)
        self.norm: nn.LayerNorm | None = None
        if not features_only:
            self.norm = nn.LayerNorm(channels, eps=_NORM_EPS)
            self.hidden = nn.Linear(channels, channels)
            self.classifier = nn.Linear(channels, num_classes)
        self.apply(_initialise)

    def forward_features(self, x: Tensor) -> list[Tensor]:
        """Images (B, in_chans, H, W) -> the stem's map and the last of each stage, finest first."""
        check_picture(self, x, self.in_chans)
        x = self.stem_conv2(F.gelu(self.stem_norm(self.stem_conv1(x))))
        maps = [x]
        for i, blocks in enumerate(self.blocks):
            if i == 2:
                x = x.permute(0, 2, 3, 1).contiguous()
            x = blocks(x)
            maps.append(x if i < 2 else x.permute(0, 3, 1, 2))
        return maps

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Images (B, in_chans, H, W) -> logits (B, num_classes), or with features_only a list of maps."""
        maps = self.forward_features(x)
        if self.norm is None:
            return maps
        hidden = torch.tanh(self.hidden(self.norm(maps[-1].mean((2, 3)))))
        return self.classifier(self.dropout(hidden))

    @property
    def weight_sources(self) -> dict[str, WeightSource]:
        headless = self.norm is None
        return {
            "timm": WeightSource(_timm_name, r"head\." if headless else ""),
            "mvmodels": WeightSource(lambda name: name, r"norm\.|hidden\.|classifier\." if headless else ""),
        }


def _initialise(module: nn.Module) -> None:
    """Convolutions by the outputs that a weight reaches, Linears by inputs and outputs."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


_timm_name = renaming(
    [
        (r"^stem_conv(\d)\.", r"stem.conv\1."),
        (r"^stem_norm\.", "stem.norm1."),
        (r"^blocks\.(\d)\.", r"stages.\1.blocks."),
        (r"^(stages.*)\.conv([13])\.", r"\1.conv\2_1x1."),
        (r"^(stages.*)\.conv2\.", r"\1.conv2_kxk."),
        (r"^(stages\.[23]\.blocks\.0\.norm1)\.", r"\1.norm."),
        (r"\.attention\.bias_table$", ".attn.rel_pos.relative_position_bias_table"),
        (r"\.attention\.", ".attn."),
        (r"^norm\.", "head.norm."),
        (r"^hidden\.", "head.pre_logits.fc."),
        (r"^classifier\.", "head.fc."),
    ]
)


def _register(size: str, params: int, macs: float, published: str, flops: str, top1: float | None) -> None:
    build: Any = functools.partial(CoAtNet, SIZES[size])
    note = "published for the paper's model; the parameters are timm's"
    register(ModelInfo(f"coatnet_{size}", build, _PAPER, params, macs, published, flops, top1, note=note))


_register("0", 25_036_820, 4546.5, "25M", "4.2G", 81.6)
_register("1", 42_225_776, 8643.5, "42M", "8.4G", 83.3)
_register("2", 74_684_744, 16427.1, "75M", "15.7G", 84.1)
_register("3", 166_966_264, 36453.2, "168M", "34.7G", 84.5)
_register("4", 275_425_288, 62316.8, "275M", "", None)
