"""The LiteMLA modules of timm and diffusers, without the projections before and after what the op does."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from torch import Tensor, nn

from mvkernels.dispatch.registry import NotOffered
from mvkernels.ops.common.peers import Part, in_float32, package, weigh


@cache
def _timm(channels: int, head_dim: int, kernels: tuple[int, ...], eps: float) -> Any:
    kind = package("timm", "models.efficientvit_mit").LiteMLA
    module = kind(channels, channels, heads=channels // head_dim, dim=head_dim, scales=kernels, eps=eps)
    module.qkv, module.proj = nn.Identity(), nn.Identity()
    return module


@cache
def _diffusers(channels: int, head_dim: int, kernels: tuple[int, ...], eps: float) -> Any:
    kind = package("diffusers", "models.attention_processor").SanaMultiscaleLinearAttention
    heads = channels // head_dim
    module = kind(channels, channels, heads, attention_head_dim=head_dim, kernel_sizes=kernels, eps=eps)
    module.to_q, module.to_k, module.to_v = Part(0), Part(1), Part(2)
    module.to_out, module.norm_out = nn.Identity(), nn.Identity()
    return module


def _ready(
    make: Any, who: str, qkv: Tensor, depthwise: Sequence[Tensor], head_dim: int, eps: float, *biases: Any
) -> nn.Module:
    in_float32(who, qkv)
    if any(bias is not None for each in biases for bias in each or ()):
        raise NotOffered(f"the models of {who} have no biases here")
    return make(qkv.shape[1] // 3, head_dim, tuple(w.shape[-1] for w in depthwise), eps)


def timm(
    qkv: Tensor,
    depthwise: Sequence[Tensor],
    pointwise: Sequence[Tensor],
    head_dim: int,
    depthwise_bias: Sequence[Tensor | None] | None = None,
    pointwise_bias: Sequence[Tensor | None] | None = None,
    eps: float = 1e-15,
) -> Tensor:
    """timm's ``LiteMLA`` with nothing for its two projections."""
    module: Any = _ready(_timm, "timm", qkv, depthwise, head_dim, eps, depthwise_bias, pointwise_bias)
    for scale, wide, mixing in zip(module.aggreg, depthwise, pointwise):
        weigh(scale[0], wide)
        weigh(scale[1], mixing)
    return module(qkv)


def diffusers(
    qkv: Tensor,
    depthwise: Sequence[Tensor],
    pointwise: Sequence[Tensor],
    head_dim: int,
    depthwise_bias: Sequence[Tensor | None] | None = None,
    pointwise_bias: Sequence[Tensor | None] | None = None,
    eps: float = 1e-15,
) -> Tensor:
    """diffusers' ``SanaMultiscaleLinearAttention`` (DC-AE); three slices stand for its first projections."""
    module: Any = _ready(_diffusers, "diffusers", qkv, depthwise, head_dim, eps, depthwise_bias, pointwise_bias)
    for scale, wide, mixing in zip(module.to_qkv_multiscale, depthwise, pointwise):
        weigh(scale.proj_in, wide)
        weigh(scale.proj_out, mixing)
    return module(qkv)


THIRD_PARTY = {"timm": timm, "diffusers": diffusers}
