"""The transformer encoder of the models that work on tokens: ViT, and ViT with irregular patches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mvkernels
from mvkernels.nn import DropPath
from mvmodels.layers import Mlp

Grids = tuple[tuple[int, int], ...]
"""Heights and widths of the grids whose pixels, row by row and grid after grid, are the tokens."""


class TokenAttention(nn.Module):
    """Self-attention over tokens by :func:`mvkernels.patch_attention`.

    With a patch of 1 this op is attention over all pixels of a map, whatever the shape of the map. The tokens are
    passed as a map of one row, because a class token or tokens of several grids do not fill a rectangular map. The
    packed qkv is read in place.
    """

    def __init__(self, dim: int, heads: int, backend: str | None = None) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"TokenAttention: dim is {dim}, want a multiple of {heads} heads")
        self.heads, self.backend = heads, backend
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, dim) -> (B, N, dim)."""
        batch, count, dim = tokens.shape
        qkv = self.qkv(tokens).view(batch, 1, count, 3, self.heads, dim // self.heads)
        query, key, value = qkv.permute(3, 0, 4, 5, 1, 2)  # (B, heads, head_dim, 1, N) each
        out = mvkernels.patch_attention(query, key, value, patch_size=1, backend=self.backend)
        return self.proj(out.permute(0, 3, 4, 1, 2).reshape(batch, count, dim))

    def products(self, tokens: Tensor) -> int:
        """Multiply-adds of the two matrix products, for :func:`mvmodels.count_macs`."""
        batch, count, dim = tokens.shape
        return 2 * batch * count * count * dim


class EncoderBlock(nn.Module):
    """``x + attention(norm(x))``, then ``x + mlp(norm(x))``."""

    def __init__(
        self, dim: int, heads: int, mlp_ratio: int, drop_path: float = 0.0, backend: str | None = None
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = TokenAttention(dim, heads, backend)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, mlp_ratio)
        self.drop_path = DropPath(drop_path)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, dim) -> (B, N, dim)."""
        tokens = tokens + self.drop_path(self.attn(self.norm1(tokens)))
        return tokens + self.drop_path(self.mlp(self.norm2(tokens)))


def encoder(
    dim: int, depth: int, heads: int, mlp_ratio: int, drop_path_rate: float, backend: str | None
) -> nn.Sequential:
    """``depth`` encoder blocks, whose drop path probability grows linearly from 0 to ``drop_path_rate``."""
    rates = [drop_path_rate * i / max(1, depth - 1) for i in range(depth)]
    return nn.Sequential(*(EncoderBlock(dim, heads, mlp_ratio, rate, backend) for rate in rates))


def resize_tokens(values: Tensor, trained: Grids, wanted: Grids, mode: str, keep_sum: bool = False) -> Tensor:
    """Resize values that belong to the tokens of some grids to grids of other sizes.

    Args:
        values: (1, N, C), where N is the number of pixels of all ``trained`` grids.
        trained, wanted: sizes (H, W) of the same number of grids. Each grid is resized separately.
        mode: "bilinear" or "bicubic".
        keep_sum: whether the values of a grid are scaled so that their sum stays the same.
    """
    if trained == wanted:
        return values
    parts = []
    counts = [h * w for h, w in trained]
    for part, (h, w), (height, width) in zip(values.split(counts, 1), trained, wanted):
        if (h, w) == (height, width):
            parts.append(part)
            continue
        grid = part.transpose(1, 2).unflatten(2, (h, w))
        resized = F.interpolate(grid.float(), size=(height, width), mode=mode, align_corners=False).to(values.dtype)
        scale = h * w / (height * width) if keep_sum else 1.0
        parts.append(resized.flatten(2).transpose(1, 2) * scale)
    return torch.cat(parts, 1)


def initialise(modules: Sequence[nn.Module]) -> None:
    """Initialise Linears from a truncated normal distribution with deviation 0.02, and their biases with zero."""
    for module in modules:
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
