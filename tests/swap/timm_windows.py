"""Attention modules of timm with windows, grids and maps of two sizes, with random weights, and what they take."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from tests.swap.conftest import randomise

pytest.importorskip("timm")


def swin(**settings: Any) -> nn.Module:
    from timm.models.swin_transformer import SwinTransformerBlock

    sizes = {"dim": 12, "input_resolution": (8, 12), "num_heads": 3, "window_size": 4, "shift_size": 2}
    return randomise(SwinTransformerBlock(**{**sizes, **settings}))


def swin_v2(**settings: Any) -> nn.Module:
    from timm.models.swin_transformer_v2 import SwinTransformerV2Block

    sizes = {"dim": 12, "input_resolution": (8, 12), "num_heads": 3, "window_size": 4, "shift_size": 2}
    return randomise(SwinTransformerV2Block(**{**sizes, **settings}))


def maxvit(kind: str = "PartitionAttentionCl", partition: str = "block", dim: int = 16, **settings: Any) -> nn.Module:
    from timm.models import maxxvit

    names = {field.name for field in dataclasses.fields(maxxvit.MaxxVitTransformerCfg)}
    config = {"dim_head": 4, "window_size": (4, 3), "grid_size": (4, 3), "rel_pos_dim": 8}
    config |= {name: settings.pop(name) for name in list(settings) if name in names}
    cfg = maxxvit.MaxxVitTransformerCfg(**config)
    first = {} if kind == "ParallelPartitionAttention" else {"partition_type": partition}
    return randomise(getattr(maxxvit, kind)(dim, **first, cfg=cfg, **settings))


def tiny_vit(**settings: Any) -> nn.Module:
    from timm.models.tiny_vit import TinyVitBlock

    return randomise(TinyVitBlock(**{"dim": 12, "num_heads": 3, "window_size": 4, **settings}))


def levit(kind: str = "Attention", **settings: Any) -> nn.Module:
    from timm.models import levit

    sizes: dict[str, Any] = {"key_dim": 4, "num_heads": 3, "attn_ratio": 2.0, "resolution": (3, 5)}
    sizes |= {"dim": 12} if kind == "Attention" else {"in_dim": 12, "out_dim": 16}
    return randomise(getattr(levit, kind)(**{**sizes, **settings}))


def efficientformer_v2(**settings: Any) -> nn.Module:
    from timm.models.efficientformer_v2 import Attention2dDownsample

    sizes = {"dim": 12, "key_dim": 4, "num_heads": 3, "attn_ratio": 2, "resolution": (5, 6)}
    return randomise(Attention2dDownsample(**{**sizes, **settings}))


def multi_query(**settings: Any) -> nn.Module:
    from timm.layers.attention2d import MultiQueryAttention2d

    return randomise(MultiQueryAttention2d(**{"dim": 12, "num_heads": 3, "key_dim": 5, "kv_stride": 2, **settings}))


def attention2d(**settings: Any) -> nn.Module:
    from timm.layers.attention2d import Attention2d

    return randomise(Attention2d(**{"dim": 12, "num_heads": 3, **settings}))


def conv_attention(package: str = "cpubone", **settings: Any) -> nn.Module:
    from timm.models import cpubone, lowformer

    kind = {"cpubone": cpubone, "lowformer": lowformer}[package].ConvAttention
    return randomise(kind(**{"input_dim": 60, "att_stride": 2, "att_kernel": 3, **settings}))


def drawn(*shape: int) -> Any:
    return lambda batch=2, dtype=torch.float32: torch.randn(batch, *shape, dtype=dtype)


# name: (maker, inputs, adapter, settings with which training draws what the fused form has no place for)
EVERY = {
    "timm_swin": (swin, drawn(8, 12, 12), "timm_swin", {"attn_drop": 0.5}),
    "timm_swin_v2": (swin_v2, drawn(8, 12, 12), "timm_swin_v2", {"attn_drop": 0.5}),
    "timm_maxvit": (maxvit, drawn(8, 6, 16), "timm_maxvit", {"attn_drop": 0.5}),
    "timm_maxvit, first": (
        partial(maxvit, "PartitionAttention2d", "grid"), drawn(16, 8, 6), "timm_maxvit", {"attn_drop": 0.5}
    ),
    "timm_maxvit, parallel": (
        partial(maxvit, "ParallelPartitionAttention"), drawn(8, 6, 16), "timm_maxvit", {"attn_drop": 0.5}
    ),
    "timm_tiny_vit": (tiny_vit, drawn(8, 4, 12), "timm_tiny_vit", {}),
    "timm_levit": (levit, drawn(15, 12), "timm_levit", {}),
    "timm_levit, down": (partial(levit, "AttentionDownsample"), drawn(15, 12), "timm_levit", {}),
    "timm_efficientformer_v2": (efficientformer_v2, drawn(12, 5, 6), "timm_efficientformer_v2", {}),
    "timm_attention2d, multi-query": (multi_query, drawn(12, 6, 4), "timm_attention2d", {"attn_drop": 0.5}),
    "timm_cpubone": (conv_attention, drawn(60, 4, 6), "timm_conv_attention", {}),
    "timm_lowformer": (partial(conv_attention, "lowformer"), drawn(60, 4, 6), "timm_conv_attention", {}),
    "timm_attention2d": (attention2d, drawn(12, 3, 4), "timm_attention2d", {"attn_drop": 0.5}),
}  # fmt: skip
