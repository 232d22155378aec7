"""What surrounds attention at inference on a CPU, in one pass each: norm with activation, EfficientFormer's pooling.

Operators of the C++ extension; :func:`not_fit` and ``not_now`` of the plans say when they may not stand in for modules,
who then run as they are.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from mvkernels.dispatch import library
from mvkernels.ops.common.activations import CODES
from mvkernels.swap.eligibility import not_plain, replaced

_ACTIVATIONS = {
    ("torch.nn.modules.linear", "Identity"): None,
    ("torch.nn.modules.dropout", "Dropout"): None,  # at rest
    ("torch.nn.modules.activation", "ReLU"): "relu",
    ("torch.nn.modules.activation", "ReLU6"): "relu6",
    ("torch.nn.modules.activation", "SiLU"): "silu",
    ("torch.nn.modules.activation", "Hardswish"): "hardswish",
    ("torch.nn.modules.activation", "GELU"): "gelu",
    ("timm.layers.activations", "GELU"): "gelu",
    ("timm.layers.activations", "GELUTanh"): "gelu_tanh",
    ("transformers.activations", "SiLUActivation"): "silu",
    ("transformers.activations", "GELUActivation"): "gelu",
}
"""Names of ``mvkernels.ops.common.activations``."""


def _like(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


# f(norm(x + conv_bias)) for a batch norm at rest, over the channels of a dense float32 map (B, C, H, W).
_SETTINGS = "Tensor mean, Tensor var, Tensor? weight, Tensor? bias, Tensor? conv_bias, float eps, int activation)"
norm_activation = library.define("cpp", "norm_activation", f"(Tensor x, {_SETTINGS} -> Tensor", _like)
norm_activation_ = library.define("cpp", "norm_activation_", f"(Tensor(a!) x, {_SETTINGS} -> ()", lambda *_: None)
# The mean of the 3 x 3 neighbours that lie in the map, minus the pixel; x as above. With factors (B, C) or (1, C) of
# the channels: x plus that difference times them. With what picture_norm gives, its factors, and less rounding.
pooled_difference = library.define("cpp", "pooled_difference", "(Tensor x, Tensor? factor=None) -> Tensor", _like)
# What a GroupNorm with one group does to each picture: (B, 3, C) of the factors of the channels, the mean, which is
# subtracted before they multiply, and what is added then; x as above.
picture_norm = library.define(
    "cpp",
    "picture_norm",
    "(Tensor x, Tensor? weight, Tensor? bias, float eps) -> Tensor",
    lambda x, *_: x.new_empty(x.shape[0], 3, x.shape[1]),
)

_listeners = (torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack)


def normalised(x: Tensor, *settings: Any, in_place: bool = False) -> Tensor | None:
    """:func:`norm_activation`, in the place of ``x`` if nobody else can have it; None if the operator refuses the
    settings (strided or mixed ones), about which the norm itself has its own say."""
    if any(isinstance(setting, Tensor) and not setting.is_cpu for setting in settings):
        return None  # one on the meta device would have the operator's fake called, which computes nothing
    try:
        if not in_place or any(listening() for listening in _listeners):  # a mode may keep what the convolution wrote
            return norm_activation(x, *settings)  # type: ignore[no-any-return]
        norm_activation_(x, *settings)
        return x
    except RuntimeError:
        return None


def not_fit(x: Tensor) -> str:
    """Why the operators cannot take the map ``x``; empty if they can."""
    if x.dtype != torch.float32 or not x.is_cpu or torch.is_autocast_enabled("cpu"):
        return "it is for float32 on a CPU"
    dense = x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)
    return "" if dense and x.numel() else "it is for dense maps"


def activation_of(modules: Iterable[Any]) -> int | None:
    """The number of the one activation that these modules, called in turn, are; None if they are something else."""
    found: str | None = None
    for module in modules:
        kind = type(module)
        name = (kind.__module__, kind.__qualname__)
        if name not in _ACTIVATIONS or not_plain(module, kind, "it"):
            return None
        known = _ACTIVATIONS[name]
        if known and found:
            return None
        if isinstance(module, nn.Dropout) and module.training:
            return None
        known = _gelu_of(module) if known == "gelu" else known
        if known == "":
            return None
        found = found or known
    return CODES[found]


def _gelu_of(module: Any) -> str:
    """By erf or by tanh, as torch's can be told; empty if it is another, as transformers' can be told."""
    by = {"none": "gelu", "tanh": "gelu_tanh"}.get(getattr(module, "approximate", "none"), "")
    return by if getattr(module, "act", _gelu) is _gelu else ""


_gelu = nn.functional.gelu


def not_neighbours(pool: Any) -> str:
    """The average of 3 × 3 neighbours that :func:`pooled_difference` takes."""
    reason = not_plain(pool, nn.AvgPool2d, "the pooling") or replaced(nn.AvgPool2d, "forward")
    if reason:
        return reason
    sizes = [s if isinstance(s, tuple) else (s, s) for s in (pool.kernel_size, pool.stride, pool.padding)]
    if sizes != [(3, 3), (1, 1), (1, 1)] or pool.ceil_mode or pool.count_include_pad or pool.divisor_override:
        return "the pooling is not over 3 x 3 neighbours"
    return ""
