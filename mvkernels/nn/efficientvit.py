"""Modules of EfficientViT: multi-scale linear attention, inverted residuals, and the block made of both.

Source: Cai et al., EfficientViT: Multi-Scale Linear Attention for High-Resolution Dense Prediction (arXiv 2205.14756),
section 3. Microsoft's EfficientViT (arXiv 2305.07027) is a different network.

The parameters have the names that they have in the authors' code and in timm, so a state_dict from there can be loaded
without renaming.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mvkernels.dispatch import checks
from mvkernels.dispatch.backend import requested
from mvkernels.ops.multiscale_linear_attention import multiscale_linear_attention

_HARDSWISH = functools.partial(nn.Hardswish, inplace=True)


class ConvNormAct(nn.Module):
    """2-D convolution, then optionally BatchNorm and an activation.

    Args:
        in_channels, out_channels, kernel_size, stride, groups, bias: as in ``nn.Conv2d``. The padding is
            ``kernel_size // 2``, so with an odd ``kernel_size`` only the stride makes the map smaller.
        norm: whether a BatchNorm follows the convolution.
        norm_eps: epsilon of the BatchNorm.
        act: function without arguments that makes the activation module, such as ``nn.ReLU``; None for no activation.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        stride: int = 1,
        groups: int = 1,
        bias: bool = False,
        norm: bool = True,
        norm_eps: float = 1e-5,
        act: Callable[[], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, kernel_size // 2, groups=groups, bias=bias
        )
        self.norm = nn.BatchNorm2d(out_channels, eps=norm_eps) if norm else nn.Identity()
        self.act = act() if act is not None else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """x (B, in_channels, H, W) -> (B, out_channels, ceil(H / stride), ceil(W / stride))."""
        return self.act(self.norm(self.conv(x)))


class LiteMLA(nn.Module):
    """Lightweight multi-scale linear attention (EfficientViT, arXiv 2205.14756, section 3.1).

    With h = ``heads`` heads of D = ``head_dim`` channels::

        qkv = conv1x1(x)                                    # (B, 3hD, H, W), per head [q | k | v]
        scale_s = grouped 1x1(depthwise s x s(qkv))         # for each s in scales: h more heads; groups of D channels
        out = multiscale_linear_attention(qkv, …)           # (B, (1 + len(scales)) hD, H, W)
        out = BN(conv1x1(out))

    There is no scaling of the scores, no softmax, no position encoding and no norm of q and k. The residual connection
    is not part of this module: see :class:`EfficientViTBlock`. The depthwise convolutions of ``scales`` are one of the
    two places where EfficientViT has depthwise convolutions. DC-AE leaves them out (``scales=()``).

    Args:
        in_channels: channels of the input map.
        out_channels: channels of the output map; None for ``in_channels``.
        head_dim: channels of a head, typically 8 to 64.
        heads: number of heads at each scale; None for ``in_channels // head_dim * heads_ratio``.
        heads_ratio: factor of the number of heads, if ``heads`` is None.
        scales: kernel sizes of the depthwise convolutions, odd. Each one adds ``heads`` heads.
        bias: whether the projection to q, k and v and the two convolutions of each scale have biases.
        norm: whether a BatchNorm follows the last projection.
        norm_eps: epsilon of the BatchNorm.
        eps: added to the divisor of the attention: 1e-15 in the authors' code, 1e-5 in timm's. It is added in float32
            or higher, where 1e-15 is not rounded to 0.
        backend: passed to :func:`mvkernels.multiscale_linear_attention`.
        device, dtype: device and dtype of the parameters.

    Raises:
        ValueError: a setting is out of range, or the input of a call is not (B, in_channels, H, W).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        head_dim: int = 32,
        heads: int | None = None,
        heads_ratio: float = 1.0,
        scales: Sequence[int] = (5,),
        bias: bool = False,
        norm: bool = True,
        norm_eps: float = 1e-5,
        eps: float = 1e-15,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        out_channels = in_channels if out_channels is None else out_channels
        for name, value in (("in_channels", in_channels), ("out_channels", out_channels), ("head_dim", head_dim)):
            if value < 1:
                raise ValueError(f"LiteMLA: {name} is {value}, want at least 1")
        if heads is None:
            heads = int(in_channels // head_dim * heads_ratio)
            if heads < 1:
                raise ValueError(
                    f"LiteMLA: in_channels // head_dim * heads_ratio is {in_channels} // {head_dim} * {heads_ratio}, "
                    "which gives no heads; want at least 1"
                )
        if heads < 1:
            raise ValueError(f"LiteMLA: heads is {heads}, want at least 1")
        for scale in scales:
            if scale < 1 or scale % 2 == 0:
                raise ValueError(f"LiteMLA: scales is {tuple(scales)}, want odd numbers")
        if not eps >= 0.0:
            raise ValueError(f"LiteMLA: eps is {eps}, want at least 0")
        if backend is not None:
            requested(backend)
        self.in_channels, self.heads, self.head_dim, self.scales = in_channels, heads, head_dim, tuple(scales)
        self.eps, self.backend = eps, backend
        inner = heads * head_dim
        self.qkv = ConvNormAct(in_channels, 3 * inner, bias=bias, norm=False)
        self.aggreg = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(3 * inner, 3 * inner, scale, padding=scale // 2, groups=3 * inner, bias=bias),
                nn.Conv2d(3 * inner, 3 * inner, 1, groups=3 * heads, bias=bias),
            )
            for scale in scales
        )
        self.proj = ConvNormAct(inner * (1 + len(scales)), out_channels, norm=norm, norm_eps=norm_eps)
        self.to(device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, in_channels, H, W) -> (B, out_channels, H, W)."""
        checks.map_of("LiteMLA", x, self.in_channels)
        return self.proj(aggregate_and_attend(self.qkv(x), self.aggreg, self.head_dim, self.eps, self.backend))

    def products(self, x: Tensor) -> int:
        """Number of multiply-adds of one call, without the two projections.

        It is the convolutions of the scales and the matrix products of the attention. The divisors count as one more
        channel of the values, as the authors' code computes them.
        """
        channels = self.heads * self.head_dim
        scales = sum(3 * channels * (scale * scale + self.head_dim) for scale in self.scales)
        attention = 2 * (1 + len(self.scales)) * channels * (self.head_dim + 1)
        return x.shape[0] * x.shape[2] * x.shape[3] * (scales + attention)

    def extra_repr(self) -> str:
        return f"heads={self.heads}, head_dim={self.head_dim}, scales={self.scales}, eps={self.eps}"


def aggregate_and_attend(
    qkv: Tensor, aggregations: Iterable[Any], head_dim: int, eps: float, backend: str | None
) -> Tensor:
    """:func:`mvkernels.multiscale_linear_attention` with the weights of pairs (depthwise, pointwise) of convolutions.

    qkv (B, 3C, H, W) -> (B, (1 + len(aggregations)) C, H, W).
    """
    depthwise, pointwise = [a[0] for a in aggregations], [a[1] for a in aggregations]
    return multiscale_linear_attention(
        qkv,
        [conv.weight for conv in depthwise],
        [conv.weight for conv in pointwise],
        head_dim=head_dim,
        depthwise_bias=[conv.bias for conv in depthwise],
        pointwise_bias=[conv.bias for conv in pointwise],
        eps=eps,
        backend=backend,
    )


class MBConv(nn.Module):
    """The branch of an inverted residual (MBConv), without the residual sum.

    A 1×1 convolution widens the map, a depthwise convolution follows, and a 1×1 convolution narrows the map again. Each
    has a BatchNorm (see ``fewer_norm``); the first two have activations.

    Args:
        in_channels, out_channels: channels of the input and output maps.
        stride: stride of the depthwise convolution.
        expand_ratio: hidden channels divided by ``in_channels``.
        kernel_size: kernel size of the depthwise convolution; None leaves out this convolution and its activation.
        fewer_norm: whether the first two convolutions have biases in place of BatchNorms. EfficientViT's blocks use
            this form after the attention.
        act: function without arguments that makes the activation after each of the first two convolutions.
        norm_eps: epsilon of the BatchNorms.

    Raises:
        ValueError: ``kernel_size`` is None and the stride is not 1.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        expand_ratio: float = 4.0,
        kernel_size: int | None = 3,
        fewer_norm: bool = False,
        act: Callable[[], nn.Module] = _HARDSWISH,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        if kernel_size is None and stride != 1:
            raise ValueError(f"MBConv: stride is {stride} without a depthwise convolution, want 1")
        hidden = round(in_channels * expand_ratio)
        self.inverted_conv = ConvNormAct(
            in_channels, hidden, bias=fewer_norm, norm=not fewer_norm, norm_eps=norm_eps, act=act
        )
        self.depth_conv: nn.Module | None = None
        if kernel_size is not None:
            self.depth_conv = ConvNormAct(
                hidden, hidden, kernel_size, stride, hidden, fewer_norm, not fewer_norm, norm_eps, act
            )
        self.point_conv = ConvNormAct(hidden, out_channels, norm_eps=norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, in_channels, H, W) -> (B, out_channels, ceil(H / stride), ceil(W / stride))."""
        x = self.inverted_conv(x)
        if self.depth_conv is not None:
            x = self.depth_conv(x)
        return self.point_conv(x)


class Residual(nn.Module):
    """Residual connection: returns ``main(x) + x``, for a module ``main`` that keeps the shape of x."""

    def __init__(self, main: nn.Module) -> None:
        super().__init__()
        self.main = main

    def forward(self, x: Tensor) -> Tensor:
        return self.main(x) + x


class EfficientViTBlock(nn.Module):
    """EfficientViT block (arXiv 2205.14756, section 3): ``x = x + LiteMLA(x)``, then ``x = x + MBConv(x)``.

    The attention mixes all pixels; the MBConv is the feed-forward network and mixes channels and neighbouring pixels.
    Depthwise convolutions can be in two places. ``scales`` are those on q, k and v in the attention (as in the later
    versions of the paper and the published networks). ``dw_in_ffn`` is the 3×3 convolution between the two 1×1
    convolutions of the feed-forward network. No norm precedes the two parts: each ends in a BatchNorm.

    Args:
        in_channels: channels of the input map and of the output map.
        head_dim, heads_ratio, scales, eps, backend: as in :class:`LiteMLA`.
        expand_ratio: hidden channels of the feed-forward network divided by ``in_channels``: 4 in the B models, 6 in
            the L models.
        dw_in_ffn: whether the feed-forward network has the depthwise convolution.
        act: function without arguments that makes the activations of the feed-forward network.
        norm_eps: epsilon of the BatchNorms.
        device, dtype: device and dtype of the parameters.

    In the state_dict the attention is "context_module.main" and the feed-forward network is "local_module.main", as in
    the authors' code and in timm.

    Raises:
        ValueError: a setting is out of range, or the input of a call is not (B, in_channels, H, W).
    """

    def __init__(
        self,
        in_channels: int,
        head_dim: int = 32,
        heads_ratio: float = 1.0,
        expand_ratio: float = 4.0,
        scales: Sequence[int] = (5,),
        dw_in_ffn: bool = True,
        act: Callable[[], nn.Module] = _HARDSWISH,
        norm_eps: float = 1e-5,
        eps: float = 1e-15,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.context_module = Residual(
            LiteMLA(
                in_channels,
                head_dim=head_dim,
                heads_ratio=heads_ratio,
                scales=scales,
                norm_eps=norm_eps,
                eps=eps,
                backend=backend,
            )
        )
        self.local_module = Residual(
            MBConv(
                in_channels,
                in_channels,
                expand_ratio=expand_ratio,
                kernel_size=3 if dw_in_ffn else None,
                fewer_norm=True,
                act=act,
                norm_eps=norm_eps,
            )
        )
        self.to(device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, in_channels, H, W) -> the same shape."""
        return self.local_module(self.context_module(x))
