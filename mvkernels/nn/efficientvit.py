"""EfficientViT's modules: multi-scale linear attention, and the depthwise convolutions in and beside it.

Cai et al., EfficientViT: Multi-Scale Linear Attention for High-Resolution Dense Prediction (arXiv 2205.14756), section
3. Not Microsoft's EfficientViT (arXiv 2305.07027), which has nothing of this.

Names of parameters are those that the authors' code and timm give them, so that the weights of a module of theirs
load into one of these as they are.
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
    """Convolution, BatchNorm, activation; the latter two where they are asked for.

    Args:
        in_channels, out_channels, kernel_size, stride, groups, bias: of the convolution, padded so that only the
            stride makes the map smaller; an odd ``kernel_size``.
        norm: whether a BatchNorm follows.
        norm_eps: its epsilon.
        act: makes the activation, or None.
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
        """x (B, in_channels, H, W) -> (B, out_channels, H / stride, W / stride), rounded up."""
        return self.act(self.norm(self.conv(x)))


class LiteMLA(nn.Module):
    """Lightweight multi-scale linear attention: a projection, more scales of it, ReLU linear attention, a projection.

    With h = ``heads`` heads of D = ``head_dim`` channels::

        qkv = conv1x1(x)                                    # (B, 3hD, H, W), per head [q | k | v]
        scale_s = grouped 1x1(depthwise s x s(qkv))         # for each of scales: h heads more; D x D per group
        out = multiscale_linear_attention(qkv, …)           # (B, (1 + len(scales)) hD, H, W)
        out = BN(conv1x1(out))

    Neither scale nor softmax, position or norm of q and k; the residual is the block's. This is the first of the two
    places in which EfficientViT has its depthwise convolution; ``scales=()`` leaves it out, as DC-AE does.

    Args:
        in_channels: of the map.
        out_channels: of the map that comes out; None for ``in_channels``.
        head_dim: channels of a head, 8 to 64.
        heads: of each scale; None for ``in_channels // head_dim * heads_ratio``.
        heads_ratio: see ``heads``.
        scales: sizes of the depthwise convolutions, odd; each adds as many heads as there are without it.
        bias: whether the projection to q, k and v and the two convolutions of each scale have biases.
        norm: whether a BatchNorm follows the last projection.
        norm_eps: its epsilon.
        eps: added to the normalizer of the attention: 1e-15 in the authors' code, 1e-5 in timm's. It is added in
            float32 at least, where 1e-15 is not 0.
        backend: handed to :func:`mvkernels.multiscale_linear_attention`.
        device, dtype: of the parameters.

    Raises ValueError for settings that do not fit, and for an input that is not (B, in_channels, H, W).
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
                    "which leaves no head"
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
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"LiteMLA: x is {checks.shape(x)}, want (B, {self.in_channels}, H, W)")
        return self.proj(aggregate_and_attend(self.qkv(x), self.aggreg, self.head_dim, self.eps, self.backend))

    def products(self, x: Tensor) -> int:
        """Multiply-adds of one call beside the projections': the scales' convolutions and the attention's products.

        The normalizers are counted, as a further channel of the values; so the authors' code forms them.
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
    """:func:`mvkernels.multiscale_linear_attention` with the weights of (depthwise, pointwise) convolutions.

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
    """Inverted residual without the residual: 1×1 that widens, depthwise, 1×1 that narrows, BatchNorm at the end.

    Args:
        in_channels, out_channels: of the map.
        stride: of the depthwise convolution.
        expand_ratio: hidden width over ``in_channels``.
        kernel_size: of the depthwise convolution; None leaves it out, and its activation.
        fewer_norm: biases in place of all norms but the last: the form beside the attention.
        act: makes the activations after the first two convolutions.
        norm_eps: of the BatchNorms.
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
        """x (B, in_channels, H, W) -> (B, out_channels, H / stride, W / stride), rounded up."""
        x = self.inverted_conv(x)
        if self.depth_conv is not None:
            x = self.depth_conv(x)
        return self.point_conv(x)


class Residual(nn.Module):
    """``main(x) + x``."""

    def __init__(self, main: nn.Module) -> None:
        super().__init__()
        self.main = main

    def forward(self, x: Tensor) -> Tensor:
        return self.main(x) + x


class EfficientViTBlock(nn.Module):
    """``x + LiteMLA(x)``, then ``x + MBConv(x)``: what mixes pixels everywhere, and what mixes neighbours and channels.

    The depthwise convolution has two places, each by its argument: ``scales`` are those of q, k and v inside the
    attention (the paper's later versions and the published networks), ``dw_in_ffn`` is the 3×3 between the two
    1×1 convolutions of the feed-forward network. There is no norm before either part: each ends in a BatchNorm.

    Args:
        in_channels: of the map, in and out.
        head_dim, heads_ratio, scales, eps, backend: of :class:`LiteMLA`.
        expand_ratio: hidden width of the feed-forward network over ``in_channels``: 4 in the B models, 6 in L.
        dw_in_ffn: whether the feed-forward network has its depthwise convolution.
        act: makes its activations.
        norm_eps: of the BatchNorms.
        device, dtype: of the parameters.

    The state_dict has "context_module.main" for the attention and "local_module.main" for the feed-forward network, as
    the authors' code and timm have it.
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
