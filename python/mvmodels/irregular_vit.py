"""ViT with irregular patches and adaptive patch fusion, after arXiv 2108.13015.

The paper ("Exploring and Improving Mobile Level Vision Transformers") describes two parts. Three parallel branches of
inverted residuals with squeeze and excitation, with different strides, give 7 × 7, 4 × 4 and 1 × 1 patches, which are
concatenated (66 tokens). In place of a class token the output is a weighted sum of the tokens; a weight is the product
of one that all images share and one that an MLP computes from the image. The paper leaves the rest open (widths,
depths, expansion, activation, order, kind of MLP). Here each of these is a setting, so the networks may differ from
those of the authors. The encoders are those of DeiT-Tiny and DeiT-Small.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mvmodels.encoder import Grids, encoder, initialise, resize_tokens
from mvmodels.layers import ConvNorm, check_picture, check_sizes, picture_sides
from mvmodels.registry import ModelInfo, WeightSource, register

_PAPER = "Exploring and Improving Mobile Level Vision Transformers, arXiv 2108.13015"
# Reduction of the image side by the trunk, and of the trunk's map by the branches.
_TRUNK, _FINE, _COARSE = 16, 2, 4


@dataclass(frozen=True)
class Size:
    """An encoder by its numbers."""

    dim: int
    depth: int
    heads: int


SIZES = {"tiny": Size(192, 12, 3), "small": Size(384, 12, 6)}
_MLP_RATIO = 4


_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "silu": nn.SiLU,
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "gelu": nn.GELU,
    "hardswish": nn.Hardswish,
}


class SqueezeExcite(nn.Module):
    """Squeeze and excitation: scales the channels by factors made of their means (1 × 1, ReLU, 1 × 1, sigmoid)."""

    def __init__(self, channels: int, ratio: float) -> None:
        super().__init__()
        reduced = max(1, round(channels * ratio))
        self.fc1 = nn.Conv2d(channels, reduced, 1)
        self.fc2 = nn.Conv2d(reduced, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return x * self.fc2(self.fc1(x.mean((2, 3), keepdim=True)).relu()).sigmoid()


class InvertedResidual(nn.Module):
    """1 × 1 that widens, depthwise 3 × 3, squeeze and excitation, 1 × 1. The input is added if the shapes match."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        expansion: int,
        se_ratio: float,
        activation: type[nn.Module],
    ) -> None:
        super().__init__()
        hidden = in_channels * expansion
        self.residual = stride == 1 and in_channels == out_channels
        self.layers = nn.Sequential(
            ConvNorm(in_channels, hidden, activation=activation),
            ConvNorm(hidden, hidden, 3, stride, groups=hidden, activation=activation),
            SqueezeExcite(hidden, se_ratio) if se_ratio > 0 else nn.Identity(),
            ConvNorm(hidden, out_channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, out_channels, H / stride, W / stride), rounded up."""
        return x + self.layers(x) if self.residual else self.layers(x)


class IrregularPatchEmbedding(nn.Module):
    """A convolutional trunk, then three parallel branches: 7 × 7, 4 × 4 and 1 × 1 tokens of a 224 × 224 image.

    Args:
        in_channels: channels of the images.
        dim: width of a token.
        trunk: channels of the four layers of the trunk, which each halve the map: a 3 × 3 convolution, then inverted
            residuals.
        coarse: layers of the 4 × 4 branch: "two" inverted residuals of stride 2, or "one" of stride 4.
        expansion: hidden channels of the inverted residuals divided by their input channels.
        se_ratio: reduced channels of squeeze and excitation divided by its channels; 0 leaves it out.
        activation: name of the activation in the inverted residuals.

    Raises ValueError if a setting is out of range, TypeError if it has the wrong type.
    """

    def __init__(
        self,
        in_channels: int,
        dim: int,
        trunk: tuple[int, int, int, int] = (32, 48, 64, 96),
        coarse: str = "two",
        expansion: int = 4,
        se_ratio: float = 0.25,
        activation: str = "silu",
    ) -> None:
        super().__init__()
        if not isinstance(trunk, (tuple, list)) or len(trunk) != 4:
            raise ValueError(f"IrregularViT: trunk is {trunk!r}, want 4 widths")
        check_sizes("IrregularViT", expansion=expansion, **{f"trunk[{i}]": width for i, width in enumerate(trunk)})
        if not isinstance(se_ratio, (int, float)) or not 0 <= float(se_ratio) < math.inf:
            raise ValueError(f"IrregularViT: se_ratio is {se_ratio!r}, want a number of at least 0")
        if coarse not in ("two", "one"):
            raise ValueError(f"IrregularViT: coarse is {coarse!r}, want 'two' or 'one'")
        if activation not in _ACTIVATIONS:
            raise ValueError(f"IrregularViT: activation is {activation!r}, want one of {', '.join(_ACTIVATIONS)}")
        kind = _ACTIVATIONS[activation]
        block = functools.partial(InvertedResidual, expansion=expansion, se_ratio=se_ratio, activation=kind)
        stem = ConvNorm(in_channels, trunk[0], 3, 2, activation=kind)
        self.trunk = nn.Sequential(stem, *(block(a, b, 2) for a, b in itertools.pairwise(trunk)))
        self.fine = block(trunk[-1], dim, 2)
        strides = (2, 2) if coarse == "two" else (4,)
        self.coarse = nn.Sequential(*(block(dim if i else trunk[-1], dim, s) for i, s in enumerate(strides)))
        self.whole = block(trunk[-1], dim, 1)

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, in_channels, H, W) -> maps of dim channels: at a 32nd and a 64th of H and W, rounded up, and 1 × 1."""
        x = self.trunk(x)
        return [self.fine(x), self.coarse(x), self.whole(x).mean((2, 3), keepdim=True)]


class AdaptivePatchFusion(nn.Module):
    """A weighted sum of the tokens, in place of a class token.

    With tokens X (B, N, d): ``w = s * m``, ``y = sum over n of w[n] X[n]``. ``s`` is a parameter that all images share,
    and starts at 1 / N. ``m`` is the output of an MLP with a sigmoid at its end.

    Args:
        dim: width d of a token.
        tokens: number N of tokens, or the sizes (H, W) of their grids. With grids, ``forward`` also takes tokens of
            other grids.
        source: input of the MLP: "token" computes m of each token from this token (d -> d / reduction -> 1), "mean"
            computes all m from the mean token (d -> d / reduction -> N).
        per_channel: whether s has d numbers for a token instead of one.
        softmax: whether a softmax over the tokens is applied to ``s * m``, so that the weights sum to 1.
        reduction: see ``source``.
    """

    def __init__(
        self,
        dim: int,
        tokens: int | Grids,
        source: str = "token",
        per_channel: bool = False,
        softmax: bool = False,
        reduction: int = 4,
    ) -> None:
        super().__init__()
        self.grids: Grids = ((1, tokens),) if isinstance(tokens, int) else tokens
        count = sum(h * w for h, w in self.grids)
        check_sizes("AdaptivePatchFusion", dim=dim, tokens=count, reduction=reduction)
        if source not in ("token", "mean"):
            raise ValueError(f"AdaptivePatchFusion: source is {source!r}, want 'token' or 'mean'")
        self.source, self.softmax = source, softmax
        self.weight = nn.Parameter(torch.full((count, dim if per_channel else 1), 1.0 / count))
        hidden = max(1, dim // reduction)
        self.mlp = nn.Sequential(
            nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, 1 if source == "token" else count), nn.Sigmoid()
        )

    def weights(self, tokens: Tensor, grids: Grids | None = None) -> Tensor:
        """w (B, N, 1 or d). For other grids s and m are resized, s such that the sum over a grid stays the same."""
        grids = self.grids if grids is None else grids
        shared = resize_tokens(self.weight[None], self.grids, grids, "bilinear", keep_sum=True)
        if self.source == "token":
            made = self.mlp(tokens)
        else:
            made = resize_tokens(self.mlp(tokens.mean(1))[..., None], self.grids, grids, "bilinear")
        product = shared * made
        return product.softmax(1) if self.softmax else product

    def forward(self, tokens: Tensor, grids: Grids | None = None) -> Tensor:
        """tokens (B, N, d) -> (B, d). ``grids``: grids of the tokens, if they differ from those of the module."""
        return (self.weights(tokens, grids) * tokens).sum(1)


class IrregularViT(nn.Module):
    """ViT with irregular patches: patch embedding, transformer encoder, adaptive fusion of the tokens, classifier.

    Args:
        size: width, depth and heads of the encoder, an entry of :data:`SIZES`.
        num_classes: number of classes.
        in_chans: channels of the images.
        drop_rate: dropout probability before the last layer.
        drop_path_rate: drop path probability of the last block; it grows linearly over the blocks.
        features_only: return the tokens of the two finer grids as a list of maps, without fusion and head.
        image_size: side of the images (or height and width) that the learned positions are made for.
        position: whether learned positions are added to the tokens.
        trunk, coarse, expansion, se_ratio, activation: see :class:`IrregularPatchEmbedding`.
        fusion, per_channel, softmax, reduction: see :class:`AdaptivePatchFusion` (``fusion`` is its ``source``).
        backend: passed to the fused op.

    The tokens are in the order of their grids (49, 16 and 1 tokens), row by row in each grid. H and W of an image may
    differ from ``image_size``: positions and fusion weights are then resized with the grids. Attention is
    :func:`mvkernels.patch_attention` with a patch of 1.
    """

    def __init__(
        self,
        size: Size,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        features_only: bool = False,
        image_size: int | tuple[int, int] = 224,
        position: bool = True,
        trunk: tuple[int, int, int, int] = (32, 48, 64, 96),
        coarse: str = "two",
        expansion: int = 4,
        se_ratio: float = 0.25,
        activation: str = "silu",
        fusion: str = "token",
        per_channel: bool = False,
        softmax: bool = False,
        reduction: int = 4,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check_sizes("IrregularViT", num_classes=num_classes, in_chans=in_chans)
        height, width = picture_sides("IrregularViT", image_size)
        dim = size.dim
        self.in_chans, self.features_only = in_chans, features_only
        self.stages = ((dim, _TRUNK * _FINE), (dim, _TRUNK * _COARSE))
        """For each map of ``features_only``: its channels, and the image side divided by the map side."""
        self.grids: Grids = (
            *((math.ceil(height / reduction), math.ceil(width / reduction)) for _, reduction in self.stages),
            (1, 1),
        )
        count = sum(h * w for h, w in self.grids)
        self.embedding = IrregularPatchEmbedding(in_chans, dim, trunk, coarse, expansion, se_ratio, activation)
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, count, dim)) if position else None
        self.blocks = encoder(dim, size.depth, size.heads, _MLP_RATIO, drop_path_rate, backend)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.fusion: AdaptivePatchFusion | None = None
        self.head: nn.Linear | None = None
        if not features_only:
            self.fusion = AdaptivePatchFusion(dim, self.grids, fusion, per_channel, softmax, reduction)
            self.head = nn.Linear(dim, num_classes)
        self.dropout = nn.Dropout(drop_rate)
        initialise([*self.blocks.modules(), *([] if self.head is None else [self.head])])

    def forward_features(self, x: Tensor) -> tuple[Tensor, Grids]:
        """Images (B, in_chans, H, W) -> normalized tokens (B, N, dim) and the grids they are of."""
        check_picture(self, x, self.in_chans)
        maps = self.embedding(x)
        grids = tuple((m.shape[2], m.shape[3]) for m in maps)
        tokens = torch.cat([m.flatten(2) for m in maps], 2).transpose(1, 2)
        if self.pos_embed is not None:
            tokens = tokens + resize_tokens(self.pos_embed, self.grids, grids, "bicubic")
        return self.norm(self.blocks(tokens)), grids

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Images (B, in_chans, H, W) -> logits (B, num_classes), or with features_only a list of two maps."""
        tokens, grids = self.forward_features(x)
        if self.fusion is not None and self.head is not None:
            return self.head(self.dropout(self.fusion(tokens, grids)))
        parts = tokens.transpose(1, 2).split([h * w for h, w in grids], 2)
        return [part.unflatten(2, grid) for part, grid in zip(parts[:2], grids)]

    @property
    def weight_sources(self) -> dict[str, WeightSource]:
        return {"mvmodels": WeightSource(lambda name: name, "" if self.head is not None else r"fusion\.|head\.")}


def _register(size: str, params: int, macs: float) -> None:
    register(
        ModelInfo(
            name=f"irregular_vit_{size}",
            build=functools.partial(IrregularViT, SIZES[size]),
            paper=_PAPER,
            params=params,
            macs=macs,
            published_params="",
            published_flops="",
            published_top1=None,
            note="after the paper's description; its networks' numbers are not known here, the choices are settings",
        )
    )


_register("tiny", 6_867_131, 569.0)
_register("small", 25_058_267, 1693.6)
