"""Layers of transformers with windows, and its LeViT's attention, with random weights, and what they take."""

from __future__ import annotations

import copy
import functools
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from mvkernels.swap import swap
from tests.swap.conftest import randomise

pytest.importorskip("transformers")

SWIN = {
    "swin": ("swin", "modeling_swin", "Swin"),
    "swin_v2": ("swinv2", "modeling_swinv2", "Swinv2"),
    "donut": ("donut", "modeling_donut_swin", "DonutSwin"),
    "maskformer": ("maskformer", "modeling_maskformer_swin", "MaskFormerSwin"),
}
"""The folder, the module and the beginning of the class names of each of Swin's kind."""


def named(family: str, name: str) -> Any:
    folder, module, prefix = SWIN[family]
    return getattr(importlib.import_module(f"transformers.models.{folder}.{module}"), prefix + name)


def config(family: str, **settings: Any) -> Any:
    folder, _, prefix = SWIN[family]
    home = importlib.import_module(f"transformers.models.{folder}")
    settings = {"attn_implementation": "sdpa", **settings} if family == "swin" else settings
    return getattr(home, f"{prefix}Config")(**settings)


def layer(
    family: str,
    size: tuple[int, int] = (8, 12),
    shift: int = 2,
    drop_path: float = 0.0,
    heads: int = 3,
    **settings: Any,
) -> nn.Module:
    """A layer with windows of 4 for maps of ``size``, which it is given beside the tokens in each call."""
    made = named(family, "Layer")(
        config(family, **{"window_size": 4, "mlp_ratio": 2.0, **settings}),
        dim=12,
        input_resolution=size,
        num_heads=heads,
        drop_path_rate=drop_path,
        shift_size=shift,
    )
    return randomise(made)


def layer_of_tokens(family: str, **settings: Any) -> nn.Module:
    """A layer that a test can call with the tokens alone: a hook adds the size of their map."""
    module = layer(family, **settings)
    module.register_forward_pre_hook(_with_size)
    return module


def _with_size(module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
    return (*given, (8, 12))


def levit(kind: str = "LevitAttention", **settings: Any) -> nn.Module:
    from transformers.models.levit import modeling_levit

    sizes: dict[str, Any] = {"key_dim": 4, "num_attention_heads": 3, "attention_ratio": 2}
    if kind == "LevitAttention":
        sizes |= {"hidden_sizes": 12, "resolution": 5}
    else:
        sizes |= {"input_dim": 12, "output_dim": 16, "stride": 2, "resolution_in": 5, "resolution_out": 3}
    return randomise(getattr(modeling_levit, kind)(**{**sizes, **settings}))


def tokens(count: int) -> Any:
    return lambda batch=2, dtype=torch.float32: torch.randn(batch, count, 12, dtype=dtype)


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def agree(module: nn.Module, twin: nn.Module, x: torch.Tensor, *more: Any, **settings: Any) -> None:
    """The swapped module against its twin in float64: what it returns, and all gradients."""
    results = []
    for each in (module, twin):
        leaf = x.clone().requires_grad_()
        returned = each(leaf, *more, **settings)
        first, *rest = returned if isinstance(returned, tuple) else (returned,)
        cotangent = torch.randn(first.shape, generator=torch.Generator().manual_seed(0), dtype=first.dtype)
        gradients = torch.autograd.grad(first, [leaf, *each.parameters()], cotangent, allow_unused=True)
        results.append((type(returned), rest, [first, *gradients]))
    assert results[0][0] is results[1][0]
    torch.testing.assert_close(results[0][1], results[1][1])
    for found, expected in zip(results[0][2], results[1][2]):
        assert (found is None) == (expected is None)
        if expected is not None:
            size = 1e-3 + float(expected.detach().abs().max())
            assert float((found - expected).detach().abs().max()) <= 1e-10 * size


def pair(make: Callable[..., nn.Module], *args: Any, **settings: Any) -> tuple[nn.Module, nn.Module]:
    """A module that is swapped, and its original."""
    module = make(*args, **settings).double()
    twin = copy.deepcopy(module)
    keys = list(module.state_dict())
    assert swap(module).count == 1 and list(module.state_dict()) == keys
    return module, twin


_DROPPED = {"attention_probs_dropout_prob": 0.5}
# name: (maker, inputs, adapter, settings with which training draws what the fused form has no place for)
EVERY = {
    **{
        f"transformers_{adapter}": (
            functools.partial(layer_of_tokens, family), tokens(96), f"transformers_{adapter}", _DROPPED
        )
        for family, adapter in (
            ("swin", "swin"), ("swin_v2", "swin_v2"), ("donut", "donut_swin"), ("maskformer", "maskformer_swin")
        )
    },
    "transformers_levit": (levit, tokens(25), "transformers_levit", {}),
    "transformers_levit, down": (
        functools.partial(levit, "LevitAttentionSubsample"), tokens(25), "transformers_levit", {}
    ),
}  # fmt: skip
