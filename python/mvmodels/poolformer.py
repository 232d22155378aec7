"""PoolFormer (Yu et al., MetaFormer Is Actually What You Need for Vision, arXiv 2111.11418): s12 to m48.

The token mixer is a mean over 3×3 pixels; there is no attention. The model is a baseline for the models with attention.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from mvkernels.nn import DropPath
from mvmodels.layers import LayerScale, PoolMixer, check_backend, check_picture, check_sizes
from mvmodels.registry import ModelInfo, WeightSource, register, renaming

_PAPER = "MetaFormer Is Actually What You Need for Vision, arXiv 2111.11418"
_MLP_RATIO = 4
HEAD_ORDERS = ("norm_pool", "pool_norm")


@dataclass(frozen=True)
class Size:
    """Widths, depths and other numbers of a network (table 1 of the paper)."""

    depths: tuple[int, int, int, int]
    widths: tuple[int, int, int, int]
    layer_scale: float
    """What the factors of the residual branches begin with."""


_S, _M = (64, 128, 320, 512), (96, 192, 384, 768)
SIZES = {
    "s12": Size((2, 2, 6, 2), _S, 1e-5),
    "s24": Size((4, 4, 12, 4), _S, 1e-5),
    "s36": Size((6, 6, 18, 6), _S, 1e-6),
    "m36": Size((6, 6, 18, 6), _M, 1e-6),
    "m48": Size((8, 8, 24, 8), _M, 1e-6),
}


def _norm(channels: int, eps: float = 1e-5) -> nn.GroupNorm:
    """GroupNorm with one group: over all channels and pixels of a sample. It is not a LayerNorm over the channels."""
    return nn.GroupNorm(1, channels, eps=eps)


class PoolFormerBlock(nn.Module):
    """x + scale * pool(norm(x)), then x + scale * mlp(norm(x)), on a map (B, C, H, W)."""

    def __init__(self, channels: int, layer_scale: float, dropout: float, drop_path: float) -> None:
        super().__init__()
        self.norm1, self.mixer, self.scale1 = _norm(channels), PoolMixer(), LayerScale(channels, layer_scale)
        self.norm2, self.scale2 = _norm(channels), LayerScale(channels, layer_scale)
        self.fc1 = nn.Conv2d(channels, _MLP_RATIO * channels, 1)
        self.activation = nn.GELU()
        self.fc2 = nn.Conv2d(_MLP_RATIO * channels, channels, 1)
        self.dropout, self.drop_path = nn.Dropout(dropout), DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) -> the same shape."""
        x = x + self.drop_path(self.scale1(self.mixer(self.norm1(x))))
        hidden = self.dropout(self.activation(self.fc1(self.norm2(x))))
        return x + self.drop_path(self.scale2(self.dropout(self.fc2(hidden))))


class PoolFormer(nn.Module):
    """PoolFormer for image classification or as a backbone.

    Args:
        size: widths and depths of the network, an entry of :data:`SIZES`.
        num_classes: number of classes.
        in_chans: channels of the images.
        drop_rate: dropout probability before the last layer.
        features_only: return the list of each stage's last map, finest first, without a head.
        drop_path_rate: drop path probability of the last block; it grows linearly over the blocks.
        dropout: dropout probability in the MLPs of the blocks.
        head_order: "norm_pool" normalizes the map over its channels and pixels and then takes the mean, as in the
            authors' code and transformers. "pool_norm" takes the mean and normalizes it over the channels, as in timm.
            Both have the same parameters, but give different logits. None means "norm_pool", or "pool_norm" after
            :func:`mvmodels.load_weights` has loaded timm's weights.
        backend: not used; accepted so that all models take the same arguments. This model has no fused op.

    H and W of the images can be any size of at least 3. Raises ValueError if a setting is out of range or an input is
    not (B, in_chans, H, W).
    """

    def __init__(
        self,
        size: Size,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        features_only: bool = False,
        drop_path_rate: float = 0.0,
        dropout: float = 0.0,
        head_order: str | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check_sizes("PoolFormer", num_classes=num_classes, in_chans=in_chans)
        check_backend(backend)
        if head_order not in (None, *HEAD_ORDERS):
            raise ValueError(f"PoolFormer: head_order is {head_order!r}, want norm_pool, pool_norm or None")
        self.in_chans, self.features_only = in_chans, features_only
        self.head_order = head_order or "norm_pool"
        self._follows_weights = head_order is None
        # 7×7 with a padding of 2, as the authors have it: a picture of 224 becomes 56.
        self.stem = nn.Conv2d(in_chans, size.widths[0], 7, 4, 2)
        self.downsample = nn.ModuleList(nn.Conv2d(a, b, 3, 2, 1) for a, b in itertools.pairwise(size.widths))
        rates = iter([drop_path_rate * i / max(1, sum(size.depths) - 1) for i in range(sum(size.depths))])
        self.blocks = nn.ModuleList(
            nn.Sequential(*(PoolFormerBlock(width, size.layer_scale, dropout, next(rates)) for _ in range(depth)))
            for depth, width in zip(size.depths, size.widths)
        )
        self.stages = tuple((width, 4 * 2**i) for i, width in enumerate(size.widths))
        """For each stage: the channels of its map, and the reduction of H and W (image side / map side)."""
        self.dropout = nn.Dropout(drop_rate)
        self.norm: nn.GroupNorm | None = None
        self.classifier: nn.Linear | None = None
        if not features_only:
            self.norm = _norm(size.widths[-1])
            self.classifier = nn.Linear(size.widths[-1], num_classes)
        self.apply(_initialise)

    def forward_features(self, x: Tensor) -> list[Tensor]:
        """Images (B, in_chans, H, W) -> the last map of each stage, finest first."""
        check_picture(self, x, self.in_chans, least=3)
        x = self.stem(x)
        maps = []
        for i, blocks in enumerate(self.blocks):
            x = blocks(x if i == 0 else self.downsample[i - 1](x))
            maps.append(x)
        return maps

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Images (B, in_chans, H, W) -> logits (B, num_classes), or with features_only a list of maps."""
        maps = self.forward_features(x)
        if self.norm is None or self.classifier is None:
            return maps
        x = maps[-1]
        if self.head_order == "norm_pool":
            pooled = self.norm(x).mean((2, 3))
        else:
            mean = x.mean((2, 3))
            pooled = nn.functional.layer_norm(mean, mean.shape[1:], self.norm.weight, self.norm.bias, 1e-6)
        return self.classifier(self.dropout(pooled))

    @property
    def weight_sources(self) -> dict[str, WeightSource]:
        headless = self.norm is None
        return {
            "authors": WeightSource(_authors_name, r"norm\.|head\.|network\.\d+\.fork" if headless else ""),
            "timm": WeightSource(_timm_name, r"head\." if headless else "", _as_timm),
            "transformers": WeightSource(_transformers_name, r"norm\.|classifier\." if headless else ""),
            "mvmodels": WeightSource(lambda name: name, r"norm\.|classifier\." if headless else ""),
        }


def _as_timm(model: PoolFormer) -> None:
    if model._follows_weights:
        model.head_order = "pool_norm"


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1)):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


_timm_name = renaming(
    [
        (r"^stem\.", "stem.conv."),
        (r"^downsample\.0\.", "stages.1.downsample.conv."),
        (r"^downsample\.1\.", "stages.2.downsample.conv."),
        (r"^downsample\.2\.", "stages.3.downsample.conv."),
        (r"^blocks\.(\d)\.(\d+)\.", r"stages.\1.blocks.\2."),
        (r"\bscale(\d)\.gamma$", r"layer_scale\1.scale"),
        (r"\.(fc\d)\.", r".mlp.\1."),
        (r"^norm\.", "head.norm."),
        (r"^classifier\.", "head.fc."),
    ]
)
# In the authors' list a stage of blocks and the convolution after it take turns.
_authors_name = renaming(
    [
        (r"^stem\.", "patch_embed.proj."),
        (r"^downsample\.0\.", "network.1.proj."),
        (r"^downsample\.1\.", "network.3.proj."),
        (r"^downsample\.2\.", "network.5.proj."),
        (r"^blocks\.0\.", "network.0."),
        (r"^blocks\.1\.", "network.2."),
        (r"^blocks\.2\.", "network.4."),
        (r"^blocks\.3\.", "network.6."),
        (r"\bscale(\d)\.gamma$", r"layer_scale_\1"),
        (r"\.(fc\d)\.", r".mlp.\1."),
        (r"^classifier\.", "head."),
    ]
)
_transformers_name = renaming(
    [
        (r"^stem\.", "poolformer.encoder.patch_embeddings.0.projection."),
        (r"^downsample\.0\.", "poolformer.encoder.patch_embeddings.1.projection."),
        (r"^downsample\.1\.", "poolformer.encoder.patch_embeddings.2.projection."),
        (r"^downsample\.2\.", "poolformer.encoder.patch_embeddings.3.projection."),
        (r"^blocks\.(\d)\.(\d+)\.", r"poolformer.encoder.block.\1.\2."),
        (r"\.norm1\.", ".before_norm."),
        (r"\.norm2\.", ".after_norm."),
        (r"\bscale(\d)\.gamma$", r"layer_scale_\1"),
        (r"\.fc(\d)\.", r".output.conv\1."),
    ]
)


def _register(size: str, params: int, macs: float, published: str, flops: str, top1: float) -> None:
    build: Any = functools.partial(PoolFormer, SIZES[size])
    register(ModelInfo(f"poolformer_{size}", build, _PAPER, params, macs, published, flops, top1))


_register("s12", 11_915_176, 1812.3, "12M", "1.8G", 77.2)
_register("s24", 21_388_968, 3392.2, "21M", "3.4G", 80.3)
_register("s36", 30_862_760, 4972.2, "31M", "5.0G", 81.4)
_register("m36", 56_172_520, 8758.8, "56M", "8.8G", 82.1)
_register("m48", 73_473_448, 11533.3, "73M", "11.6G", 82.5)
