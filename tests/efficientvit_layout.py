"""LiteMLA laid out as MIT's code is: its module names, settings and branches; for tests of swap by structure.

Written from the formulas: the linear form with a row of ones below the values, the quadratic form on maps of no more
pixels than a head has channels. Absent norms and activations are None, as there.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ConvLayer(nn.Module):
    def __init__(self, inp, out, use_bias=False, norm=None, act=None):
        super().__init__()
        self.dropout = None
        self.conv = nn.Conv2d(inp, out, 1, bias=use_bias)
        self.norm, self.act = norm, act

    def forward(self, x):
        x = self.conv(x)
        if self.norm is not None:
            x = self.norm(x)
        return x if self.act is None else self.act(x)


class LiteMLA(nn.Module):
    def __init__(self, inp, out, dim=8, heads_ratio=1.0, scales=(5,), eps=1e-15, use_bias=False, kernel_func=nn.ReLU):
        super().__init__()
        self.eps, self.dim = eps, dim
        heads = int(inp // dim * heads_ratio)
        inner = 3 * heads * dim
        self.qkv = ConvLayer(inp, inner, use_bias)
        self.aggreg = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(inner, inner, s, padding=s // 2, groups=inner, bias=use_bias),
                nn.Conv2d(inner, inner, 1, groups=3 * heads, bias=use_bias),
            )
            for s in scales
        )
        self.kernel_func = kernel_func()
        self.proj = ConvLayer(inner // 3 * (1 + len(scales)), out, norm=nn.BatchNorm2d(out))

    def split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = qkv.flatten(2).unflatten(1, (-1, 3, self.dim)).unbind(2)
        return self.kernel_func(q), self.kernel_func(k), v

    def relu_linear_att(self, qkv: Tensor) -> Tensor:
        half = qkv.dtype == torch.float16
        q, k, v = self.split(qkv.float() if half else qkv)
        out = F.pad(v, (0, 0, 0, 1), value=1.0) @ k.mT @ q
        if out.dtype == torch.bfloat16:
            out = out.float()
        return (out[:, :, :-1] / (out[:, :, -1:] + self.eps)).to(qkv.dtype)

    def relu_quadratic_att(self, qkv: Tensor) -> Tensor:
        q, k, v = self.split(qkv)
        scores = k.mT @ q
        dtype = scores.dtype
        scores = scores.float() if dtype in (torch.float16, torch.bfloat16) else scores
        return v @ (scores / (scores.sum(2, keepdim=True) + self.eps)).to(dtype)

    def forward(self, x):
        qkv = self.qkv(x)
        qkv = torch.cat([qkv, *(scale(qkv) for scale in self.aggreg)], 1)
        height, width = qkv.shape[-2:]
        attend = self.relu_linear_att if height * width > self.dim else self.relu_quadratic_att
        return self.proj(attend(qkv).flatten(1, 2).unflatten(2, (height, width)))


class Residual(nn.Module):
    def __init__(self, main):
        super().__init__()
        self.main = main

    def forward(self, x):
        return x + self.main(x)


class Net(nn.Module):
    """Two attentions, a convolution between, and a mean: a model to swap."""

    def __init__(self, channels=16, dim=8, scales=(5,)):
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, 2, 1)
        self.first = Residual(LiteMLA(channels, channels, dim, scales=scales))
        self.mix = nn.Conv2d(channels, channels, 3, 2, 1)
        self.second = Residual(LiteMLA(channels, channels, dim, scales=scales))

    def forward(self, x):
        return self.second(self.mix(self.first(self.stem(x)))).mean((2, 3))
