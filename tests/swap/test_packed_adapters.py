"""swap(model, inference=True): a module in the place of any part of a model, as adapters put one there."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mvkernels.dispatch import extension
from mvkernels.swap import swap
from tests.swap.conftest import randomise

pytestmark = pytest.mark.skipif(extension.module is None, reason=extension.reason)
timm = pytest.importorskip("timm")


class Adapter(nn.Module):
    """Has none of the attributes of what it holds, and another result."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = self.base(*args, **kwargs)
        return out * 1.25 if isinstance(out, Tensor) else out


def places(model: nn.Module) -> list[tuple[str, str]]:
    """One place of each kind: the parent's name and the child's, leaves alone."""
    found: dict[Any, tuple[str, str]] = {}
    for name, leaf in model.named_modules():
        parent, _, child = name.rpartition(".")
        # Of position biases a method is called, which no adapter has.
        if name and not [*leaf.children()] and not hasattr(leaf, "get_bias"):
            above = [type(model.get_submodule(p)) for p in (parent.rpartition(".")[0], parent)]
            found.setdefault((*above, child, type(leaf), getattr(leaf, "stride", None)), (parent, child))
    return [*found.values()]


NAMES = ["mobilevit_xxs", "efficientvit_b0", "coatnet_pico_rw_224", "poolformer_s12", "transformers' PoolFormer"]


class Logits(nn.Module):
    """Of a model of transformers."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).logits  # type: ignore[no-any-return]


def example(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    if name.startswith("transformers"):
        from tests.swap import test_packing_poolformer

        model: nn.Module = Logits(test_packing_poolformer.model())
    else:
        settings = {"img_size": 64} if "coatnet" in name else {}
        model = randomise(timm.create_model(name, num_classes=5, **settings))
    return model, torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def put(model: nn.Module, parent: str, child: str) -> nn.Module:
    """Puts an adapter there; returns what was there."""
    above = model.get_submodule(parent)
    base = above.get_submodule(child)
    setattr(above, child, Adapter(base))
    return base


@pytest.mark.parametrize("name", NAMES)
def test_it_is_called_wherever_it_stands(name):
    model, x = example(name)
    swapped = copy.deepcopy(model)
    swap(swapped, inference=True)
    with torch.inference_mode():
        swapped(x)
        for parent, child in places(model):
            outs = []
            for each in (model, swapped):
                base = put(each, parent, child)
                outs.append(each(x))
                setattr(each.get_submodule(parent), child, base)
            assert (outs[0] - outs[1]).abs().max() <= 3e-5 * outs[0].abs().max(), f"{parent}.{child}"


@pytest.mark.parametrize("name", NAMES)
def test_a_model_that_has_it_can_be_swapped(name):
    model, x = example(name)
    for parent, child in places(model):
        base = put(model, parent, child)
        with torch.inference_mode():
            plain = model(x)
            report = swap(model, inference=True)
            assert (model(x) - plain).abs().max() <= 3e-5 * plain.abs().max(), f"{parent}.{child}"
        report.restore()
        setattr(model.get_submodule(parent), child, base)
