"""What the tests of inference on packed weights share: whole models, pictures, and how many weights a call packs."""

from __future__ import annotations

import copy
from unittest import mock

import pytest
import torch
from torch import nn

from mvkernels.swap.packing import plans
from tests.swap.conftest import randomise

timm = pytest.importorskip("timm")


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "transformers":
        from transformers import MobileViTConfig, MobileViTForImageClassification

        config = MobileViTConfig(hidden_sizes=[32, 48, 64], neck_hidden_sizes=[16, 24, 32, 48, 48, 64, 160])
        return randomise(MobileViTForImageClassification(config)).eval()
    model = randomise(timm.create_model(name, num_classes=10))
    model.eval()
    return model


def picture(model: nn.Module, side: int = 64, batch: int = 1) -> torch.Tensor:
    """Of a size that the model takes: EfficientFormer's position biases are for one."""
    side = 224 if "EfficientFormer" in type(model).__name__ else side
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(1))


def logits(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        out = model(x)
    if isinstance(out, (torch.Tensor, tuple)):
        return out if isinstance(out, torch.Tensor) else out[0]
    return out.sample if hasattr(out, "sample") else out.logits


def packings(model: nn.Module, x: torch.Tensor) -> int:
    """How many weights a call packs."""
    with mock.patch.object(plans, "note", side_effect=plans.note) as note:
        logits(model, x)
    return note.call_count


def average(model):
    with torch.no_grad():
        for p in model.parameters():
            p.lerp_(torch.ones_like(p), 0.01)


def statistics(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean += 0.1
            module.running_var.mul_(1.3)


def assert_every_parameter_is_followed(model: nn.Module, x: torch.Tensor) -> None:
    """Of a model that was swapped for inference."""
    logits(model, x)
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.mul_(1.5)
        exact = logits(copy.deepcopy(model).double(), x.double())  # nothing runs on packed weights in float64
        torch.testing.assert_close(logits(model, x).double(), exact, rtol=1e-4, atol=1e-5)
