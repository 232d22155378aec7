"""Every family that swap knows: a module of it with random weights, in eval mode, and what it takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mvkernels.swap import engine
from tests import mobile_former_layout
from tests.swap import (
    linear_attention,
    test_cpubone,
    test_cvnets,
    test_mobile_former,
    test_timm_attention,
    timm_windows,
    torchvision_windows,
    transformers_windows,
)
from tests.swap.conftest import timm_block, transformers_block


@dataclass(frozen=True)
class Example:
    make: Callable[..., nn.Module]
    """Takes settings of its class."""
    inputs: Callable[..., Any]
    """``inputs(batch, dtype)``: what the module takes."""
    adapter: str
    """The file of mvkernels.swap that knows it."""
    random: dict[str, Any]
    """Settings with which training mode draws random numbers that the fused form has no place for; may be none."""


def _map(channels: int, height: int, width: int) -> Callable[..., torch.Tensor]:
    return lambda batch=2, dtype=torch.float32: torch.randn(batch, channels, height, width, dtype=dtype)


def _tokens(count: int, channels: int) -> Callable[..., torch.Tensor]:
    return lambda batch=2, dtype=torch.float32: torch.randn(batch, count, channels, dtype=dtype)


def _bridge(kind: type[nn.Module]) -> Example:
    return Example(
        lambda **settings: test_mobile_former.bridge(kind, **settings),
        lambda batch=2, dtype=torch.float32: test_mobile_former.inputs(batch, dtype=dtype),
        "authors_mobile_former",
        {"drop_path": 0.5},
    )


EVERY = {
    "transformers_mobilevit": Example(
        transformers_block, _map(12, 8, 12), "transformers_mobilevit", {"attention_probs_dropout_prob": 0.5}
    ),
    "timm_mobilevit": Example(timm_block, _map(12, 8, 12), "timm_mobilevit", {"drop_path_rate": 0.5}),
    "timm_mobilevit, dropout": Example(timm_block, _map(12, 8, 12), "timm_mobilevit", {"attn_drop": 0.5}),
    "timm_efficientvit": Example(linear_attention.timm_attention, _map(16, 5, 6), "timm_efficientvit", {}),
    "timm_efficientformer": Example(
        test_timm_attention.efficientformer_attention, _tokens(12, 24), "timm_efficientformer", {}
    ),
    "timm_coatnet": Example(test_timm_attention.coatnet_attention, _map(24, 3, 4), "timm_coatnet", {"attn_drop": 0.5}),
    "diffusers_dc_ae": Example(linear_attention.dc_ae_attention, _map(16, 5, 6), "diffusers_dc_ae", {}),
    "diffusers_sana": Example(linear_attention.sana_attention, _tokens(30, 16), "diffusers_sana", {}),
    "authors_mobile_former, in": _bridge(mobile_former_layout.Local2Global),
    "authors_mobile_former, out": _bridge(mobile_former_layout.Global2Local),
    "authors_efficientvit": Example(linear_attention.mit_attention, _map(16, 5, 6), "authors_efficientvit", {}),
    "cvnets_mobilevit": Example(test_cvnets.block, _map(12, 8, 8), "cvnets_mobilevit", {"stochastic": 0.5}),
    "authors_cpubone": Example(test_cpubone.attention, _map(16, 4, 6), "authors_cpubone", {}),
    **{
        name: Example(*parts)
        for each in (timm_windows, transformers_windows, torchvision_windows)
        for name, parts in each.EVERY.items()
    },
}

assert {e.adapter for e in EVERY.values()} == {f.adapter for f in (*engine.FAMILIES, *engine.STRUCTURES)}


def tensor(result: Any) -> torch.Tensor:
    """The first tensor of what a module returns."""
    return result[0] if isinstance(result, tuple) else result


def cast(inputs: Any, change: Callable[[torch.Tensor], Any]) -> Any:
    """``change`` of each tensor of a module's input."""
    return change(inputs) if isinstance(inputs, torch.Tensor) else tuple(map(change, inputs))
