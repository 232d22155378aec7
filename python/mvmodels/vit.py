"""ViT with a convolutional stem, and ViT with a patch stem (Xiao et al., arXiv 2106.14881).

A plain ViT begins with one 16 × 16 convolution of stride 16. The paper replaces it by a few 3 × 3 convolutions of
stride 2 and removes one encoder block, so the number of multiply-adds stays about the same. It trains more easily.
``vit_c_*`` have the convolutional stem, ``vit_p_*`` the patch stem.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mvmodels.encoder import encoder, initialise, resize_tokens
from mvmodels.layers import ConvNorm, check_picture, check_sizes, picture_sides
from mvmodels.registry import ModelInfo, WeightSource, register, renaming

_PAPER = "Early Convolutions Help Transformers See Better, arXiv 2106.14881"
PATCH = 16


@dataclass(frozen=True)
class Size:
    """A network by its numbers; the patchify twin has one block more."""

    dim: int
    depth: int
    """Of the network with the convolution stem."""
    heads: int
    mlp_ratio: int
    stem: tuple[int, ...]
    """Widths of the 3 × 3 convolutions; the stride is 2 where the width changes, else 1."""


SIZES = {
    "1gf": Size(192, 11, 3, 3, (24, 48, 96, 192)),
    "4gf": Size(384, 11, 6, 3, (48, 96, 192, 384)),
    "18gf": Size(768, 11, 12, 4, (64, 128, 128, 256, 256, 512)),
    "36gf": Size(1024, 13, 16, 4, (64, 128, 128, 256, 256, 512)),
}


class ConvStem(nn.Module):
    """3 × 3 convolutions with BatchNorm and ReLU of total stride 16, then a 1 × 1 convolution to ``dim`` channels."""

    def __init__(self, in_channels: int, widths: tuple[int, ...], dim: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width in widths:
            stride = 2 if width != in_channels else 1
            layers.append(ConvNorm(in_channels, width, 3, stride, activation=nn.ReLU))
            in_channels = width
        self.convs = nn.Sequential(*layers)
        self.proj = nn.Conv2d(in_channels, dim, 1)
        nn.init.normal_(self.proj.weight, 0.0, math.sqrt(2.0 / dim))

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, dim, H / 16, W / 16), rounded up."""
        return self.proj(self.convs(x))


class PatchStem(nn.Module):
    """A 16 × 16 convolution of stride 16. An image is padded with zeros to whole patches."""

    def __init__(self, in_channels: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, PATCH, PATCH)
        nn.init.normal_(self.proj.weight, 0.0, math.sqrt(1.0 / (in_channels * PATCH * PATCH)))

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, dim, H / 16, W / 16), rounded up."""
        height, width = x.shape[2:]
        if height % PATCH or width % PATCH:
            x = F.pad(x, (0, -width % PATCH, 0, -height % PATCH))
        return self.proj(x)


class VisionTransformer(nn.Module):
    """ViT with a class token and learned positions, after a convolutional stem or a patch stem.

    Args:
        size: widths and depths of the network, an entry of :data:`SIZES`.
        conv_stem: True for the convolutional stem, False for the patch stem and one more block.
        num_classes: number of classes.
        in_chans: channels of the images.
        drop_rate: dropout probability before the last layer.
        drop_path_rate: drop path probability of the last block; it grows linearly over the blocks.
        features_only: return a list of one map, the tokens of the encoder (B, dim, H / 16, W / 16), without a head.
        image_size: side of the images (or height and width) that the learned positions are made for.
        backend: passed to the fused op.

    H and W of an image may differ from ``image_size``: the positions are then resized (bicubic) to the image's grid,
    rounded up. Attention is :func:`mvkernels.patch_attention` with a patch of 1, on the class token and the map.
    """

    def __init__(
        self,
        size: Size,
        conv_stem: bool,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        features_only: bool = False,
        image_size: int | tuple[int, int] = 224,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check_sizes(type(self).__name__, num_classes=num_classes, in_chans=in_chans)
        height, width = picture_sides(type(self).__name__, image_size)
        dim = size.dim
        self.in_chans, self.features_only = in_chans, features_only
        self.stages = ((dim, PATCH),)
        """Channels of the map, and the image side divided by the map side."""
        self.grid = (math.ceil(height / PATCH), math.ceil(width / PATCH))
        self.stem: nn.Module = ConvStem(in_chans, size.stem, dim) if conv_stem else PatchStem(in_chans, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 1 + self.grid[0] * self.grid[1], dim))
        depth = size.depth if conv_stem else size.depth + 1
        self.blocks = encoder(dim, depth, size.heads, size.mlp_ratio, drop_path_rate, backend)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.dropout = nn.Dropout(drop_rate)
        self.head = None if features_only else nn.Linear(dim, num_classes)
        initialise([*self.blocks.modules(), *([] if self.head is None else [self.head])])

    def forward_features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, in_chans, H, W) -> class token (B, dim), map (B, dim, H / 16, W / 16), both normalized."""
        check_picture(self, x, self.in_chans)
        x = self.stem(x)
        grid = (x.shape[2], x.shape[3])
        positions = resize_tokens(self.pos_embed, ((1, 1), self.grid), ((1, 1), grid), "bicubic")
        tokens = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x.flatten(2).transpose(1, 2)), 1) + positions
        tokens = self.norm(self.blocks(tokens))
        return tokens[:, 0], tokens[:, 1:].transpose(1, 2).unflatten(2, grid)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Images (B, in_chans, H, W) -> logits (B, num_classes), or with features_only a list of one map."""
        token, features = self.forward_features(x)
        return [features] if self.head is None else self.head(self.dropout(token))

    @property
    def weight_sources(self) -> dict[str, WeightSource]:
        """The sources of weights that can be loaded. The ViTs of timm and transformers have the patch stem."""
        unused = "" if self.head is not None else r"head\."
        own = WeightSource(lambda name: name, unused)
        if isinstance(self.stem, ConvStem):
            return {"mvmodels": own}
        return {
            "mvmodels": own,
            "timm": WeightSource(renaming([(r"^stem\.", "patch_embed.")]), unused),
            "transformers": WeightSource(_transformers_name, "" if self.head is not None else r"classifier\."),
        }


# As transformers has them since its version 5.
_rename = renaming(
    [
        (r"^cls_token", "vit.embeddings.cls_token"),
        (r"^pos_embed", "vit.embeddings.position_embeddings"),
        (r"^stem\.proj", "vit.embeddings.patch_embeddings.projection"),
        (r"^norm\.", "vit.layernorm."),
        (r"^head\.", "classifier."),
        (r"^blocks\.", "vit.layers."),
        (r"norm1", "layernorm_before"),
        (r"norm2", "layernorm_after"),
        (r"attn\.proj", "attention.o_proj"),
        (r"attn\.qkv", "attention.{}_proj"),
    ]
)


def _transformers_name(name: str) -> str | tuple[str, ...]:
    name = _rename(name)
    return tuple(name.format(part) for part in "qkv") if "{}" in name else name


def _register(size: str, stem: str, params: int, macs: float, published: tuple[str, str]) -> None:
    register(
        ModelInfo(
            name=f"vit_{stem}_{size}",
            build=functools.partial(VisionTransformer, SIZES[size], stem == "c"),
            paper=_PAPER,
            params=params,
            macs=macs,
            published_params=published[0],
            published_flops=published[1],
            published_top1=None,
            note="the paper's parameters and multiply-adds as remembered of its tables; the counts are of this code",
        )
    )


_register("1gf", "c", 4_567_936, 1075.9, ("4.6M", "1.1G"))
_register("4gf", "c", 17_754_136, 3958.9, ("17.8M", "4.0G"))
_register("18gf", "c", 81_573_160, 17711.5, ("81.6M", "17.7G"))
_register("36gf", "c", 167_796_008, 35002.0, ("167.8M", "35.0G"))
_register("1gf", "p", 4_830_376, 1079.4, ("4.8M", "1.1G"))
_register("4gf", "p", 18_507_112, 3901.7, ("18.5M", "3.9G"))
_register("18gf", "p", 86_567_656, 17563.8, ("86.7M", "17.5G"))
_register("36gf", "p", 178_364_392, 35971.6, ("178.4M", "35.9G"))
