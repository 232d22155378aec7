"""A MobileViT block laid out as in Apple's ml-cvnets: its module names, its LayerNorm, its order of patches.

Written from the formulas, for the tests of swap, which recognises the block by what it holds. Nothing here
is fast.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LinearLayer(nn.Module):
    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(out_features))
        self.channel_first = False

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.t() + self.bias


class LayerNorm(nn.LayerNorm):
    """Looks for the features on axis 1 first; eps is added to the deviation there, and to the variance elsewhere."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() > 2 and x.shape[1] == self.normalized_shape[0]:
            deviation, mean = torch.std_mean(x, dim=1, keepdim=True, unbiased=False)
            shape = (1, -1) + (1,) * (x.dim() - 2)
            return (x - mean) / (deviation + self.eps) * self.weight.view(shape) + self.bias.view(shape)
        return super().forward(x)


class ConvLayer2d(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, kernel: int, norm: bool = True, act: bool = True) -> None:
        super().__init__()
        self.block = nn.Sequential()
        self.block.add_module("conv", nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, bias=False))
        if norm:
            self.block.add_module("norm", nn.BatchNorm2d(out_channels))
        if act:
            self.block.add_module("act", nn.SiLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


class StochasticDepth(nn.Module):
    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.p:
            return x
        return x * (torch.rand(x.shape[0], 1, 1) >= self.p) / (1 - self.p)


class MultiHeadAttention(nn.Module):
    def __init__(self, embed_dim: int, num_heads: int, attn_dropout: float = 0.0) -> None:
        super().__init__()
        self.qkv_proj = LinearLayer(embed_dim, 3 * embed_dim)
        self.attn_dropout = nn.Dropout(attn_dropout)
        self.out_proj = LinearLayer(embed_dim, embed_dim)
        self.num_heads, self.head_dim = num_heads, embed_dim // num_heads
        self.scaling = self.head_dim**-0.5
        self.coreml_compatible = False

    def forward(self, x_q: Tensor, x_kv: Tensor | None = None) -> Tensor:
        assert x_kv is None
        query, key, value = (part.unflatten(-1, (self.num_heads, -1)) for part in self.qkv_proj(x_q).chunk(3, dim=-1))
        scores = torch.einsum("bihd,bjhd->bhij", query * self.scaling, key)
        seen = torch.einsum("bhij,bjhd->bihd", self.attn_dropout(scores.softmax(-1)), value)
        return self.out_proj(seen.flatten(2))


class TransformerEncoder(nn.Module):
    def __init__(self, dim, ffn_dim, heads, dropout=0.0, attn_dropout=0.0, stochastic=0.0) -> None:
        super().__init__()
        self.pre_norm_mha = nn.Sequential(
            LayerNorm(dim), MultiHeadAttention(dim, heads, attn_dropout), nn.Dropout(dropout)
        )
        self.pre_norm_ffn = nn.Sequential(
            LayerNorm(dim),
            LinearLayer(dim, ffn_dim),
            nn.SiLU(),
            nn.Dropout(dropout),
            LinearLayer(ffn_dim, dim),
            nn.Dropout(dropout),
        )
        self.drop_path = StochasticDepth(stochastic) if stochastic else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        norm, attention, drop = self.pre_norm_mha
        x = x + self.drop_path(drop(attention(norm(x))))
        return x + self.drop_path(self.pre_norm_ffn(x))


class MobileViTBlock(nn.Module):
    def __init__(
        self, channels=12, dim=24, ffn_dim=48, layers=2, heads=4, patch=(2, 2), no_fusion=False, **settings
    ) -> None:
        super().__init__()
        self.local_rep = nn.Sequential()
        self.local_rep.add_module("conv_3x3", ConvLayer2d(channels, channels, 3))
        self.local_rep.add_module("conv_1x1", ConvLayer2d(channels, dim, 1, norm=False, act=False))
        encoders = [TransformerEncoder(dim, ffn_dim, heads, **settings) for _ in range(layers)]
        self.global_rep = nn.Sequential(*encoders, LayerNorm(dim))
        self.conv_proj = ConvLayer2d(dim, channels, 1)
        self.fusion = None if no_fusion else ConvLayer2d(2 * channels, channels, 3)
        self.patch_h, self.patch_w = patch
        self.patch_area, self.n_heads = patch[0] * patch[1], heads

    def unfolding(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        size = tuple(-(-n // p) * p for n, p in zip(x.shape[2:], (self.patch_h, self.patch_w)))
        if size != tuple(x.shape[2:]):
            x = F.interpolate(x, size=size, mode="bilinear", align_corners=False)
        places = [(i, j) for i in range(self.patch_h) for j in range(self.patch_w)]
        parts = torch.stack([x[:, :, i :: self.patch_h, j :: self.patch_w] for i, j in places], 1)
        return parts.flatten(3).transpose(2, 3).flatten(0, 1), size  # (B * patch_area, patches, C)

    def folding(self, patches: Tensor, size: tuple[int, int]) -> Tensor:
        out = patches.new_empty(patches.shape[0] // self.patch_area, patches.shape[2], *size)
        parts = patches.transpose(1, 2).unflatten(0, (-1, self.patch_area))
        for k in range(self.patch_area):
            i, j = divmod(k, self.patch_w)
            part = out[:, :, i :: self.patch_h, j :: self.patch_w]
            out[:, :, i :: self.patch_h, j :: self.patch_w] = parts[:, k].view(part.shape)
        return out

    def forward_spatial(self, x: Tensor) -> Tensor:
        y = self.local_rep(x)
        patches, size = self.unfolding(y)
        y = self.folding(self.global_rep(patches), size)
        if y.shape[2:] != x.shape[2:]:
            y = F.interpolate(y, size=x.shape[2:], mode="bilinear", align_corners=False)
        y = self.conv_proj(y)
        return y if self.fusion is None else self.fusion(torch.cat((x, y), 1))

    def forward(self, x, *args, **kwargs):
        if isinstance(x, tuple):
            return self.forward_spatial(x[0]), x[1]
        return self.forward_spatial(x)


class Network(nn.Module):
    """Two blocks, as a model has them."""

    def __init__(self, **settings) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, 2, 1)
        self.layer_3 = nn.Sequential(nn.Conv2d(12, 12, 1), MobileViTBlock(**settings))
        self.layer_4 = nn.Sequential(nn.Conv2d(12, 12, 3, 2, 1), MobileViTBlock(**settings))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer_4(self.layer_3(self.stem(x))).mean((2, 3))
