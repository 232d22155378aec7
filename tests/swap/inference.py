"""What the tests of inference on packed weights share: whole models, pictures, and how many weights a call packs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any
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


def recorded(module: Callable[..., Any], **settings: Any) -> tuple[Any, list[list[str]]]:
    """The compiled module, and the functions in each graph that is made of it."""
    graphs: list[list[str]] = []

    def note(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward

    return torch.compile(module, backend=note, fullgraph=True, **settings), graphs


def counts(graph: list[str]) -> tuple[int, int]:
    """How many operators for packed modules, and how many convolutions and products beside them."""
    packed = [target for target in graph if "mvkernels_swap.packed" in target]
    others = [target for target in graph if "mvkernels" not in target]
    return len(packed), len([target for target in others if "conv" in target or "linear" in target])
