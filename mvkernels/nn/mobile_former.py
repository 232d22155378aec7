"""The sub-blocks of Mobile-Former, which exchange information between a feature map and a few tokens.

Source: Chen et al., Mobile-Former (arXiv 2108.05895), section 3. A Mobile-Former block runs :class:`MobileToFormer`,
:class:`Former`, :class:`Mobile` or :class:`DownsampleMobile`, and :class:`FormerToMobile`, in this order.

Maps are (B, C, H, W), channels-first or channels-last, and are passed to the kernels as views. Tokens are
(B, M, token_dim), batch first; the authors' code has (M, B, token_dim). So the (B, heads, M, head_dim) of the kernels
is a view of them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mvkernels.dispatch import checks
from mvkernels.dispatch.backend import requested
from mvkernels.nn.layers import DropPath, DynamicReLU, HeadwiseLinear
from mvkernels.ops.former_to_mobile import former_to_mobile
from mvkernels.ops.mobile_to_former import mobile_to_former


class _Bridge(nn.Module):
    """What the two directions share: sizes, checks and projections of the tokens."""

    def __init__(self, channels: int, token_dim: int, heads: int, headwise: bool, backend: str | None) -> None:
        super().__init__()
        name = type(self).__name__
        for what, value in (("channels", channels), ("token_dim", token_dim), ("heads", heads)):
            if value < 1:
                raise ValueError(f"{name}: {what} is {value}, want at least 1")
        if channels % heads:
            raise ValueError(f"{name}: channels is {channels}, want a multiple of heads = {heads}")
        if headwise and token_dim % heads:
            raise ValueError(f"{name}: token_dim is {token_dim}, want a multiple of heads = {heads}")
        if backend is not None:
            requested(backend)
        self.channels, self.token_dim, self.heads, self.headwise = channels, token_dim, heads, headwise
        self.backend = backend

    def _projection(self) -> nn.Module:
        if self.headwise:
            return HeadwiseLinear(self.token_dim, self.channels, self.heads)
        return nn.Linear(self.token_dim, self.channels)

    def _check(self, x: Tensor, tokens: Tensor) -> None:
        name = type(self).__name__
        if x.dim() != 4 or x.shape[1] != self.channels:
            raise ValueError(f"{name}: x is {checks.shape(x)}, want (B, {self.channels}, H, W)")
        if tokens.dim() != 3 or tokens.shape[0] != x.shape[0] or tokens.shape[2] != self.token_dim:
            raise ValueError(f"{name}: tokens is {checks.shape(tokens)}, want ({x.shape[0]}, M, {self.token_dim})")

    def _heads(self, tokens: Tensor) -> Tensor:
        """(B, M, C) -> (B, heads, M, C / heads), a view."""
        return tokens.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def extra_repr(self) -> str:
        return f"channels={self.channels}, token_dim={self.token_dim}, heads={self.heads}"


class MobileToFormer(_Bridge):
    """Mobile→Former bridge: cross-attention from the tokens to the map (arXiv 2108.05895, section 3.1, equation 1).

    The map is both key and value, without projections. Its channels are split into ``heads`` heads. With
    hsig(u) = clamp(u + 3, 0, 6) / 6::

        out = mobile_to_former(query(tokens), x)
        out = out * 2 * hsig(gate(tokens))                if gate
        tokens = norm(tokens + drop_path(proj(out)))

    Args:
        channels: channels of the map, a multiple of ``heads``.
        token_dim: width of a token.
        heads: number of attention heads.
        gate: whether the result of the attention is multiplied, before ``proj``, by a gate that is computed from the
            input tokens. The authors' networks have this gate; the paper does not.
        headwise: whether each head has its own projection of its slice of a token, as in the equations of the paper,
            instead of one projection of the whole token. Needs a ``token_dim`` that is a multiple of ``heads``.
        drop_path: probability of dropping the residual branch of a sample in training.
        norm_eps: epsilon of the LayerNorm.
        backend: passed to :func:`mvkernels.mobile_to_former`.
        device, dtype: device and dtype of the parameters.

    Raises:
        ValueError: a setting is out of range, or the inputs of a call are not (B, channels, H, W) and
            (B, M, token_dim).
    """

    def __init__(
        self,
        channels: int,
        token_dim: int,
        heads: int = 2,
        gate: bool = False,
        headwise: bool = False,
        drop_path: float = 0.0,
        norm_eps: float = 1e-5,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(channels, token_dim, heads, headwise, backend)
        self.query = self._projection()
        self.gate = nn.Linear(token_dim, channels) if gate else None
        self.proj = nn.Linear(channels, token_dim)
        self.drop_path = DropPath(drop_path)
        self.norm = nn.LayerNorm(token_dim, eps=norm_eps)
        self.to(device=device, dtype=dtype)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        """x (B, channels, H, W), tokens (B, M, token_dim) -> (B, M, token_dim)."""
        self._check(x, tokens)
        query = self._heads(self.query(tokens))
        out = mobile_to_former(query, x.unflatten(1, (self.heads, -1)), backend=self.backend)
        out = out.transpose(1, 2).flatten(2)
        if self.gate is not None:
            out = out * (2.0 * F.hardsigmoid(self.gate(tokens)))
        return self.norm(tokens + self.drop_path(self.proj(out)))


class FormerToMobile(_Bridge):
    """Former→Mobile bridge: cross-attention from the pixels to the tokens (arXiv 2108.05895, section 3.1, equation 2).

    The result is added to the map. The pixels are the queries, without a projection, and the result is not projected
    either. The channels of the map are split into ``heads`` heads. With hsig(u) = clamp(u + 3, 0, 6) / 6::

        v = value(tokens) * 2 * hsig(gate(tokens))        if gate, else value(tokens)
        x = x + drop_path(former_to_mobile(x, key(tokens), v))

    One kernel computes the attention and the sum, unless the drop path is active or autocast is on: under autocast the
    sum has the precision of the map, and the attention a lower one.

    Args:
        channels, token_dim, heads, headwise, drop_path, device, dtype: as in :class:`MobileToFormer`.
        gate: whether the values are multiplied by a gate that is computed from the tokens. The authors' code has this
            option; their networks do not use it.
        backend: passed to :func:`mvkernels.former_to_mobile`.

    Raises:
        ValueError: a setting is out of range, or the inputs of a call are not (B, channels, H, W) and
            (B, M, token_dim).
    """

    def __init__(
        self,
        channels: int,
        token_dim: int,
        heads: int = 2,
        gate: bool = False,
        headwise: bool = False,
        drop_path: float = 0.0,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(channels, token_dim, heads, headwise, backend)
        self.key = self._projection()
        self.value = self._projection()
        self.gate = nn.Linear(token_dim, channels) if gate else None
        self.drop_path = DropPath(drop_path)
        self.to(device=device, dtype=dtype)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        """x (B, channels, H, W), tokens (B, M, token_dim) -> (B, channels, H, W), in the memory layout of x."""
        self._check(x, tokens)
        key, value = self.key(tokens), self.value(tokens)
        if self.gate is not None:
            value = value * (2.0 * F.hardsigmoid(self.gate(tokens)))
        return add_attention(
            x,
            self._heads(key),
            self._heads(value),
            drop_path=self.drop_path if self.drop_path.active else None,
            backend=self.backend,
        )


def add_attention(
    x: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None = None,
    drop_path: nn.Module | None = None,
    backend: str | None = None,
) -> Tensor:
    """x + drop_path(attention of the pixels of x over the tokens), in one kernel where that gives the same result.

    x (B, C, H, W), key and value (B, heads, M, C / heads) -> (B, C, H, W), in the memory layout of x.
    """
    heads = key.shape[1]
    # Under autocast the op runs in the lower precision, to which x itself must not be rounded.
    fused = drop_path is None and not checks.autocast_on(x.device.type)
    out = former_to_mobile(
        x.unflatten(1, (heads, -1)), key, value, scale=scale, residual=fused, backend=backend
    ).flatten(1, 2)
    if fused:
        return out
    return x + (out if drop_path is None else drop_path(out))


class Former(nn.Module):
    """Former: self-attention of the tokens and a feed-forward network (arXiv 2108.05895, section 3.1).

    A LayerNorm follows each of the two. The tokens are key and value without projections. With h heads of
    token_dim / h channels, and hsig(u) = clamp(u + 3, 0, 6) / 6::

        out = softmax(query(tokens) tokensᵀ / sqrt(token_dim / h)) tokens
        out = out * 2 * hsig(gate(tokens))                if gate
        tokens = norm1(tokens + drop_path(proj(out)))
        tokens = norm2(tokens + fc2(gelu(fc1(tokens))))   if ffn_ratio

    Args:
        token_dim: width of a token, a multiple of ``heads``.
        heads: number of attention heads. The authors' networks have 4 here and 2 in the bridges.
        ffn_ratio: hidden width of the feed-forward network divided by ``token_dim``; 0 for no feed-forward network.
        gate: whether the result of the attention is multiplied by a gate that is computed from the tokens. The authors'
            code has this option; their networks do not use it.
        drop_path: probability of dropping the attention branch of a sample in training.
        norm_eps: epsilon of the LayerNorms.
        device, dtype: device and dtype of the parameters.

    Raises:
        ValueError: a setting is out of range.
    """

    def __init__(
        self,
        token_dim: int,
        heads: int = 4,
        ffn_ratio: int = 2,
        gate: bool = False,
        drop_path: float = 0.0,
        norm_eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if heads < 1 or token_dim < 1 or token_dim % heads:
            raise ValueError(f"Former: token_dim is {token_dim}, want a positive multiple of heads = {heads}")
        if ffn_ratio < 0:
            raise ValueError(f"Former: ffn_ratio is {ffn_ratio}, want at least 0")
        self.heads = heads
        self.query = nn.Linear(token_dim, token_dim)
        self.gate = nn.Linear(token_dim, token_dim) if gate else None
        self.proj = nn.Linear(token_dim, token_dim)
        self.drop_path = DropPath(drop_path)
        self.norm1 = nn.LayerNorm(token_dim, eps=norm_eps)
        self.has_ffn = ffn_ratio > 0
        if self.has_ffn:
            self.fc1 = nn.Linear(token_dim, ffn_ratio * token_dim)
            self.fc2 = nn.Linear(ffn_ratio * token_dim, token_dim)
            self.norm2 = nn.LayerNorm(token_dim, eps=norm_eps)
        self.to(device=device, dtype=dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, M, token_dim) -> (B, M, token_dim)."""
        query, memory = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (self.query(tokens), tokens))
        # autocast would leave one of them as it is and cast the other
        out = F.scaled_dot_product_attention(query, memory.to(query.dtype), memory.to(query.dtype))
        out = out.transpose(1, 2).flatten(2)
        if self.gate is not None:
            out = out * (2.0 * F.hardsigmoid(self.gate(tokens)))
        tokens = self.norm1(tokens + self.drop_path(self.proj(out)))
        if self.has_ffn:
            tokens = self.norm2(tokens + self.fc2(F.gelu(self.fc1(tokens))))
        return tokens


class Mobile(nn.Module):
    """Mobile: an inverted residual with dynamic ReLU, at stride 1 (arXiv 2108.05895, section 3.1).

    The layers are: 1×1 convolution, BatchNorm, DY-ReLU; depthwise 3×3 convolution, BatchNorm, DY-ReLU; 1×1 convolution,
    BatchNorm. The input is added if ``in_channels`` equals ``out_channels``. The slopes of each
    :class:`DynamicReLU` are computed from a token.

    Args:
        in_channels, out_channels: channels of the input and output maps.
        expansion: hidden channels divided by ``in_channels``.
        token_dim: width of the token.
        groups: groups of the 1×1 convolutions. With more than one, the channels are shuffled after each of them.
        drop_path: probability of dropping the residual branch of a sample in training.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        expansion: int,
        token_dim: int,
        groups: int = 1,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        hidden = in_channels * expansion
        self.residual = in_channels == out_channels
        self.conv1 = nn.Conv2d(in_channels, hidden, 1, groups=groups, bias=False)
        self.norm1 = nn.BatchNorm2d(hidden)
        self.act1 = DynamicReLU(hidden, token_dim)
        self.conv2 = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, bias=False)
        self.norm2 = nn.BatchNorm2d(hidden)
        self.act2 = DynamicReLU(hidden, token_dim)
        self.conv3 = nn.Conv2d(hidden, out_channels, 1, groups=groups, bias=False)
        self.norm3 = nn.BatchNorm2d(out_channels)
        self.shuffle = nn.ChannelShuffle(groups) if groups > 1 else nn.Identity()
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, token: Tensor) -> Tensor:
        """x (B, in_channels, H, W), token (B, token_dim) -> (B, out_channels, H, W)."""
        y = self.act1(self.shuffle(self.norm1(self.conv1(x))), token)
        y = self.act2(self.norm2(self.conv2(y)), token)
        y = self.shuffle(self.norm3(self.conv3(y)))
        return x + self.drop_path(y) if self.residual else y


class DownsampleMobile(nn.Module):
    """The downsampling variant of Mobile, which halves the resolution (arXiv 2108.05895, section 3).

    The first half is a depthwise 3×3 convolution of stride 2 that widens the map, BatchNorm, DY-ReLU, 1×1 convolution,
    BatchNorm. The second half is a residual branch on the result: a depthwise 3×3 convolution that widens the map,
    BatchNorm, DY-ReLU, 1×1 convolution, BatchNorm. H and W become ceil(H / 2) and ceil(W / 2).

    Args:
        in_channels, out_channels: channels of the input and output maps.
        expansion: two numbers: hidden channels of the first half divided by ``in_channels``, and hidden channels of
            the second half divided by ``out_channels``.
        token_dim, drop_path: as in :class:`Mobile`.
        groups: groups of the 1×1 convolutions. With more than one, the channels of the widened maps are shuffled.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        expansion: tuple[int, int],
        token_dim: int,
        groups: int = 1,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        first, second = in_channels * expansion[0], out_channels * expansion[1]
        self.conv1 = nn.Conv2d(in_channels, first, 3, stride=2, padding=1, groups=in_channels, bias=False)
        self.norm1 = nn.BatchNorm2d(first)
        self.shuffle1 = nn.ChannelShuffle(in_channels) if groups > 1 else nn.Identity()
        self.act1 = DynamicReLU(first, token_dim)
        self.conv2 = nn.Conv2d(first, out_channels, 1, groups=groups, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.conv3 = nn.Conv2d(out_channels, second, 3, padding=1, groups=out_channels, bias=False)
        self.norm3 = nn.BatchNorm2d(second)
        self.shuffle3 = nn.ChannelShuffle(out_channels) if groups > 1 else nn.Identity()
        self.act3 = DynamicReLU(second, token_dim)
        self.conv4 = nn.Conv2d(second, out_channels, 1, groups=groups, bias=False)
        self.norm4 = nn.BatchNorm2d(out_channels)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, token: Tensor) -> Tensor:
        """x (B, in_channels, H, W), token (B, token_dim) -> (B, out_channels, ceil(H / 2), ceil(W / 2))."""
        y = self.act1(self.shuffle1(self.norm1(self.conv1(x))), token)
        short = self.norm2(self.conv2(y))
        y = self.act3(self.shuffle3(self.norm3(self.conv3(short))), token)
        return short + self.drop_path(self.norm4(self.conv4(y)))
