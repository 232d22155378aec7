"""Modules with the attributes of CPUBone's published attention, for what recognises it by them."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn


class Convolution(nn.Module):
    def __init__(self, channels: int, size: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, size, stride, size // 2, groups=channels, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class DotProducts(nn.Module):
    def scaled_dot_product(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.scaled_dot_product(q, k, v)


class ConvAttention(nn.Module):
    def __init__(self, input_dim: int = 16, num_heads: int = 2, att_stride: int = 2, factor: float = 1.0) -> None:
        super().__init__()
        self.input_dim, self.num_heads, self.att_stride = input_dim, num_heads, att_stride
        self.head_dim_mul, self.num_keys = 1.0, 3
        self.head_dim = input_dim // num_heads
        self.o_proj_inpdim = self.head_dim * num_heads
        self.factor = factor
        self.conv_proj = Convolution(input_dim, 3, att_stride)
        self.pwise = nn.Sequential(nn.Conv2d(input_dim, 3 * self.o_proj_inpdim, 1, bias=False))
        self.sda = DotProducts()
        self.o_proj = nn.Conv2d(self.o_proj_inpdim, input_dim, 1)
        self.upsampling: Any = nn.ConvTranspose2d(
            input_dim, input_dim, 2 * att_stride, att_stride, att_stride // 2, groups=input_dim
        )

    def forward(self, x: Tensor) -> Tensor:
        n, c, height, width = x.shape
        packed = self.pwise(self.conv_proj(x))
        h, w = packed.shape[2:]
        q, k, v = packed.reshape(n, self.num_heads, -1, h * w).mT.chunk(3, dim=3)
        out = self.sda(self.factor * q, k, v).mT.reshape(n, self.o_proj_inpdim, h, w)
        return self.upsampling(self.o_proj(out))[:n, :c, :height, :width]
