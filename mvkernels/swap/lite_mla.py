"""What the LiteMLA modules of timm and of the authors of EfficientViT share: eligibility and the fused forward."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mvkernels.nn.efficientvit import aggregate_and_attend
from mvkernels.swap.eligibility import (
    asked,
    class_name,
    log_once,
    not_dense,
    not_number,
    not_plain,
    not_pointwise_conv,
    unusual_call,
)


def why_not(module: Any) -> str:
    """Why the fused op cannot replace what is between the two projections of this LiteMLA; empty if it can."""
    qkv, proj = module.qkv, module.proj
    reason = (
        not_number(module.eps, "eps")
        or not_plain(module.kernel_func, nn.ReLU, "kernel_func")
        or not_plain(qkv, type(qkv), "qkv")
        or not_pointwise_conv(qkv.conv, "qkv.conv")
        or not_plain(proj, type(proj), "proj")
        or not_pointwise_conv(proj.conv, "proj.conv")
    )
    if reason:
        return reason
    if qkv.conv.bias is not None:
        return "qkv.conv has a bias"
    for name in ("norm", "act"):
        part = getattr(qkv, name)
        if part is not None and type(part) is not nn.Identity:
            return f"qkv.{name} is a {class_name(type(part))}, want none"
    channels = qkv.conv.out_channels
    if channels % (3 * module.dim):
        return f"qkv has {channels} channels, want a multiple of 3 * dim = {3 * module.dim}"
    for scale in module.aggreg:
        reason = not_plain(scale, nn.Sequential, "aggreg")
        if not reason and len(scale) != 2:
            reason = f"a scale of aggreg has {len(scale)} modules, want 2 (a depthwise and a 1x1 convolution)"
        reason = reason or not_scale(scale[0], scale[1], channels, module.dim, "aggreg")
        if reason:
            return reason
    return ""


def not_scale(depthwise: Any, pointwise: Any, channels: int, head_dim: int, what: str) -> str:
    """The two must be a depthwise convolution that keeps the size and a grouped 1×1 convolution, without biases."""
    for conv in (depthwise, pointwise):
        reason = not_plain(conv, nn.Conv2d, what) or not_dense(conv.weight, what)
        if reason:
            return reason
        if conv.bias is not None:
            return f"{what} has a bias"
        if conv.in_channels != channels or conv.out_channels != channels or conv.stride != (1, 1):
            return f"{what} changes the number of channels or pixels, want as many as in qkv"
    kernel, groups = depthwise.kernel_size, (depthwise.groups, pointwise.groups)
    if (
        groups != (channels, channels // head_dim)
        or kernel[0] != kernel[1]
        or kernel[0] % 2 == 0
        or depthwise.padding != (kernel[0] // 2, kernel[0] // 2)
        or depthwise.dilation != (1, 1)
        or depthwise.padding_mode != "zeros"
        or pointwise.kernel_size != (1, 1)
        or pointwise.padding != (0, 0)
    ):
        return f"{what} is not a depthwise convolution and a 1x1 convolution in groups of {head_dim} channels"
    return ""


def forward(module: Any, x: Any, more: bool, reason: str) -> Tensor | None:
    """The result of the fused forward. None if the original forward has to run; the reason is then logged once.

    ``more``: whether the call has other arguments than the map. ``reason``: a reason that the caller has found.
    """
    reason = reason or ("the call has other arguments than the map" if more else unusual_call(x))
    reason = reason or asked(why_not, module)
    if reason:
        log_once(module, reason)
        return None
    return fused(module, x)


def fused(module: Any, x: Tensor) -> Tensor:
    """x (B, C, H, W) -> (B, C_out, H, W)."""
    out = aggregate_and_attend(module.qkv(x), module.aggreg, module.dim, module.eps, module.mvk_backend)
    projected: Tensor = module.proj(out)
    return projected
