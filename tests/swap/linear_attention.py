"""The modules whose linear attention can be swapped, made small and with random weights, for the tests beside."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from mvkernels import third_party
from tests import efficientvit_layout as layout


def randomised(module: nn.Module) -> nn.Module:
    third_party.randomise(module)
    return module.eval()


def timm_attention(scales: tuple[int, ...] = (5,), **settings: Any) -> nn.Module:
    pytest.importorskip("timm")
    from timm.models.efficientvit_mit import LiteMLA

    return randomised(LiteMLA(16, 16, dim=8, scales=scales, norm_layer=(None, nn.BatchNorm2d), **settings))


def timm_model(**settings: Any) -> nn.Module:
    timm = pytest.importorskip("timm")
    return randomised(timm.create_model("efficientvit_b0", num_classes=7, **settings))


def mit_attention(scales: tuple[int, ...] = (5,), **settings: Any) -> nn.Module:
    return randomised(layout.LiteMLA(16, 16, dim=8, scales=scales, **settings))


def mit_model(scales: tuple[int, ...] = (5,)) -> nn.Module:
    return randomised(layout.Net(scales=scales))


def dc_ae_attention(scales: tuple[int, ...] = (5,), **settings: Any) -> nn.Module:
    pytest.importorskip("diffusers")
    from diffusers.models.attention_processor import SanaMultiscaleLinearAttention

    chosen = {"norm_type": "rms_norm", "residual_connection": True, "attention_head_dim": 8, **settings}
    return randomised(SanaMultiscaleLinearAttention(16, 16, kernel_sizes=scales, **chosen))


def dc_ae_model(**settings: Any) -> nn.Module:
    """A DC-AE of two levels with attention: one without scales, one with; compresses a side by 8."""
    diffusers = pytest.importorskip("diffusers")
    blocks = ("ResBlock", "ResBlock", "EfficientViTBlock", "EfficientViTBlock")
    sides = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in {
            "block_types": blocks,
            "block_out_channels": (8, 8, 16, 32),
            "layers_per_block": (1, 1, 1, 1),
            "qkv_multiscales": ((), (), (), (5,)),
        }.items()
    }
    return randomised(diffusers.AutoencoderDC(latent_channels=8, attention_head_dim=8, **sides, **settings))


def sana_attention(**settings: Any) -> nn.Module:
    pytest.importorskip("diffusers")
    from diffusers.models.attention_processor import Attention, SanaLinearAttnProcessor2_0

    chosen = {"processor": SanaLinearAttnProcessor2_0(), "bias": True, **settings}
    return randomised(Attention(16, heads=2, dim_head=8, **chosen))


def sana_model() -> nn.Module:
    pytest.importorskip("diffusers")
    from diffusers import SanaTransformer2DModel

    model = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=8,
        sample_size=8,
    )
    return randomised(model)


def image(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(2, 3, 64, 48, dtype=dtype)


def latents(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return {
        "hidden_states": torch.randn(2, 4, 8, 6, dtype=dtype),
        "encoder_hidden_states": torch.randn(2, 5, 8, dtype=dtype),
        "timestep": torch.tensor([3, 700]),
    }


@dataclass(frozen=True)
class Family:
    attention: Callable[..., nn.Module]
    """Takes ``scales`` (but Sana's) and settings of its class. A map of 16 channels goes in, two heads of 8."""
    model: Callable[[], nn.Module]
    inputs: Callable[..., Any]
    """For the model."""
    class_name: str
    names: tuple[str, ...]
    """Those in the model that can be swapped."""
    linear: str
    """A Linear or a 1×1 convolution of an attention module."""
    fused: tuple[str, str]
    """File and name of what a swapped module calls."""
    tokens: bool = False
    """Whether the attention takes (B, pixels, C)."""

    def example(self, *size: int, batch: int = 2, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        x = torch.randn(batch, 16, *size, dtype=dtype)
        return x.flatten(2).mT.contiguous() if self.tokens else x


_DC_AE = (("encoder.down", 2, 0), ("encoder.down", 3, 0), ("decoder.up", 2, 1), ("decoder.up", 3, 0))
FAMILIES = {
    "timm": Family(
        timm_attention,
        timm_model,
        image,
        "LiteMLA",
        tuple(f"stages.{i}.blocks.{j}.context_module.main" for i in (2, 3) for j in (1, 2)),
        "qkv.conv",
        ("lite_mla", "aggregate_and_attend"),
    ),
    "mit": Family(
        mit_attention,
        mit_model,
        image,
        "LiteMLA",
        ("first.main", "second.main"),
        "proj.conv",
        ("lite_mla", "aggregate_and_attend"),
    ),
    "dc-ae": Family(
        dc_ae_attention,
        dc_ae_model,
        image,
        "SanaMultiscaleLinearAttention",
        tuple(f"{side}_blocks.{i}.{j}.attn" for side, i, j in _DC_AE),
        "to_v",
        ("families.diffusers_dc_ae", "aggregate_and_attend"),
    ),
    "sana": Family(
        sana_attention,
        sana_model,
        latents,
        "Attention",
        tuple(f"transformer_blocks.{i}.attn1" for i in (0, 1)),
        "to_q",
        ("families.diffusers_sana", "relu_linear_attention"),
        tokens=True,
    ),
}


def run(module: nn.Module, inputs: Any) -> torch.Tensor:
    """What a module makes of an input (or of several by name), as one tensor."""
    out = module(**inputs) if isinstance(inputs, dict) else module(inputs)
    return getattr(out, "sample", out)


def spy(family: Family, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one whenever the fused attention is called."""
    adapter = importlib.import_module(f"mvkernels.swap.{family.fused[0]}")
    original, seen = getattr(adapter, family.fused[1]), []

    def count(*args: Any, **kwargs: Any) -> Any:
        seen.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(adapter, family.fused[1], count)
    return seen
