"""What graphs of torch.compile have in them of modules on packed weights: one operator for the call of each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from mvkernels.dispatch import extension
from mvkernels.swap import swap
from tests.swap import (
    test_own_models,
    test_packing_blocks,
    test_packing_mobile,
    test_packing_poolformer,
    test_packing_structures,
    test_packing_windows,
    transformers_windows,
)
from tests.swap.conftest import randomise
from tests.swap.inference import counts, recorded
from tests.swap.test_packing_mobile import call as first_of

pytestmark = pytest.mark.skipif(extension.module is None, reason=extension.reason)


@pytest.fixture(autouse=True)
def _anew():
    """The forwards of swapped modules share their code, for which Dynamo keeps a limited number of graphs."""
    torch._dynamo.reset()


def call(module: nn.Module, given: tuple[Any, ...]) -> torch.Tensor:
    with torch.no_grad():
        out = module(*given)
    if hasattr(out, "sample"):
        return out.sample
    return out.logits if hasattr(out, "logits") else first_of(lambda: out, ())


def near(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert wanted.isfinite().all()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


def swin_of_transformers() -> nn.Module:
    from transformers import SwinForImageClassification

    sizes = {"image_size": 32, "embed_dim": 12, "depths": [1, 1], "num_heads": [2, 3], "num_labels": 5}
    return randomise(SwinForImageClassification(transformers_windows.config("swin", window_size=4, **sizes)))


def mixer() -> nn.Module:
    from timm.models.mlp_mixer import MlpMixer

    return randomise(MlpMixer(num_classes=5, img_size=32, patch_size=8, num_blocks=2, embed_dim=16))


OWN, TIMM = test_own_models.MAKE, test_packing_blocks.MODELS
# A model and the side of its pictures; the operators in its graph, and the convolutions and products that have no op:
# patch embeddings of 4 x 4 and 7 x 7.
MODELS: dict[str, tuple[Callable[[], nn.Module], int, tuple[int, int]]] = {
    "own mobilevit": (OWN["mobilevit"], 64, (8, 0)),
    "own efficientvit": (OWN["efficientvit"], 64, (16, 0)),
    "own efficientformer": (OWN["efficientformer"], 64, (11, 0)),
    "own coatnet": (OWN["coatnet"], 64, (15, 0)),
    "own poolformer": (OWN["poolformer"], 64, (8, 1)),
    "own vit": (OWN["vit, patches"], 64, (4, 1)),
    "timm poolformer": (*TIMM["poolformer"], (4, 1)),
    "timm efficientformer": (*TIMM["efficientformer"], (9, 0)),
    "timm levit": (*TIMM["levit"], (15, 0)),
    "timm swin": (*TIMM["swin"], (14, 1)),
    "timm swin v2": (test_packing_windows.timm_model, 32, (10, 1)),
    "timm mixer": (mixer, 32, (5, 1)),
    "torchvision swin": (lambda: test_packing_windows.model(""), 32, (4, 1)),
    "torchvision swin v2": (lambda: test_packing_windows.model("V2"), 32, (10, 1)),
    "transformers levit": (*TIMM["transformers_levit"], (22, 0)),
    "transformers poolformer": (test_packing_poolformer.model, 64, (9, 1)),
    "transformers swin": (swin_of_transformers, 32, (14, 1)),
    "diffusers dc-ae": (*TIMM["dc_ae"], (19, 0)),
}


@pytest.mark.parametrize("name", MODELS)
def test_models(name):
    make, side, wanted = MODELS[name]
    torch.manual_seed(0)
    model = randomise(make())
    given = (torch.randn(2, 3, side, side),)
    swap(model, inference=True)
    compiled, graphs = recorded(model)
    near(call(compiled, given), call(model, given))
    assert [counts(graph) for graph in graphs] == [wanted]


BLOCKS, MOBILE, WINDOWS = test_packing_blocks.BLOCKS, test_packing_mobile.CASES, test_packing_windows.CASES
STRUCTURES = test_packing_structures.CASES
# Others than one operator and nothing beside it: parts that have no op, and blocks whose result is no such tensor.
OTHERWISE = {
    "Mlp with a norm": (2, 0),
    "Mlp with another activation": (2, 0),
    "MetaFormerBlock, StarReLU": (2, 0),
    "MbConvBlock, strided at first": (4, 2),
    "first": (0, 2),
    "first halves": (0, 2),
    "head": (3, 0),
    "timm v2": (2, 0),
    "timm v2, no bias": (2, 0),
    "block v2": (2, 0),
    "cvnets, another norm": (0, 3),
    "mit, another layer": (2, 0),
    "cpubone": (2, 2),
    "sana": (4, 0),
}


def block(name: str) -> tuple[nn.Module, tuple[Any, ...]]:
    torch.manual_seed(0)
    for cases, file in ((MOBILE, test_packing_mobile), (WINDOWS, test_packing_windows)):
        if name in cases:
            return file.make(name)
    if name in STRUCTURES:
        return test_packing_structures.make(name)
    make, shape, _ = BLOCKS[name]
    return randomise(make()), (torch.randn(*shape),)


@pytest.mark.parametrize("name", [*BLOCKS, *MOBILE, *WINDOWS, *STRUCTURES])
def test_blocks(name):
    """The operator gives what the eager call does, and with the same strides: nothing is copied on the way."""
    module, given = block(name)
    swap(module, inference=True)
    wanted = call(module, given)
    compiled, graphs = recorded(module)
    found = call(compiled, given)
    near(found, wanted)
    assert [counts(graph) for graph in graphs] == [OTHERWISE.get(name, (1, 0))]
    assert found.stride() == wanted.stride() or not counts(graphs[0])[0]


class Calls(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.module(x)


@pytest.mark.parametrize("shape", [(5, 12), (2, 3, 12), (2, 3, 4, 12), (1, 2, 3, 4, 12)])
def test_a_linear_of_any_rows(shape):
    torch.manual_seed(0)
    model, given = Calls(randomise(nn.Linear(12, 20))), (torch.randn(*shape[:-1], 24)[..., ::2],)
    swap(model, inference=True)
    compiled, graphs = recorded(model)
    found = call(compiled, given)
    near(found, call(model, given))
    assert found.is_contiguous() and counts(graphs[0]) == (1, 0)


def test_other_convolutions_only_on_channels_last_maps():
    torch.manual_seed(0)
    model, x = Calls(randomise(nn.Conv2d(6, 10, 3, 1, 1))), torch.randn(2, 6, 5, 7)
    swap(model, inference=True)
    for layout, wanted in ((torch.contiguous_format, (0, 1)), (torch.channels_last, (1, 0))):
        given = (x.contiguous(memory_format=layout),)
        compiled, graphs = recorded(model)
        found = call(compiled, given)
        near(found, call(model, given))
        assert counts(graphs[-1]) == wanted and found.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("name", ["timm poolformer", "timm levit", "torchvision swin", "transformers swin"])
def test_batches_of_any_size_have_one_graph(name):
    make, side, wanted = MODELS[name]
    torch.manual_seed(0)
    model = randomise(make())
    swap(model, inference=True)
    compiled, graphs = recorded(model, dynamic=True)
    for batch in (1, 3, 5):
        given = (torch.randn(batch, 3, side, side),)
        near(call(compiled, given), call(model, given))
    assert {counts(graph) for graph in graphs} == {wanted} and len(graphs) <= 2  # PyTorch knows a batch of one apart


def wider(conv: nn.Conv2d) -> None:
    conv.weight = nn.Parameter(conv.weight.repeat(2, 1, 1, 1))
    conv.bias = nn.Parameter(conv.bias.repeat(2))
    conv.out_channels *= 2


def strided(conv: nn.Conv2d) -> None:
    conv.stride = (2, 2)


@pytest.mark.parametrize("change", [wider, strided])
def test_a_change_of_sizes_makes_another_graph(change):
    torch.manual_seed(0)
    model = randomise(nn.Sequential(Calls(nn.Conv2d(6, 10, 3, 1, 1)), nn.ReLU()))
    given = (torch.randn(2, 6, 5, 7).to(memory_format=torch.channels_last),)
    swap(model, inference=True)
    compiled, graphs = recorded(model)
    before = call(compiled, given)
    change(model[0].module)
    found = call(compiled, given)
    assert found.shape != before.shape and len(graphs) == 2
    near(found, call(model, given))


def test_a_change_of_a_stride_in_a_block():
    module, given = block("MetaBlock2d")
    model = nn.Sequential(module, nn.Sequential(*block("LeViT's ConvNorm")[:1]))
    swap(model, inference=True)
    compiled, graphs = recorded(model)
    near(call(compiled, given), call(model, given))
    model[1][0].linear.stride = (1, 1)
    near(call(compiled, given), call(model, given))
    assert [counts(graph) for graph in graphs] == [(1, 0)] * 2


def test_a_layer_that_makes_other_channels_than_it_says():
    """Its own operation takes the weight as it is; where it gets one later, the operator says so."""
    torch.manual_seed(0)
    model, given = Calls(randomise(nn.Linear(12, 20))), (torch.randn(3, 12),)
    swap(model, inference=True)
    compiled, _ = recorded(model)
    call(compiled, given)
    model.module.weight, model.module.bias = nn.Parameter(torch.randn(8, 12)), None
    with pytest.raises(RuntimeError, match=r"Linear gave \(3, 8\) .* and not \(3, 20\) .* torch.compiler.reset"):
        call(compiled, given)
    torch.compiler.reset()
    compiled, graphs = recorded(model)
    near(call(compiled, given), call(model, given))
    assert counts(graphs[0]) == (0, 1)


@pytest.mark.slow
def test_inductor_takes_the_strides_that_it_is_told():
    make, side, _ = MODELS["timm poolformer"]
    torch.manual_seed(0)
    model = nn.ModuleList([randomise(make()), Calls(randomise(nn.Linear(3, 7)))])
    swap(model, inference=True)
    x = torch.randn(1, 3, side, side)

    def both(x):
        return model[0](x), model[1](x.permute(0, 2, 3, 1)).sigmoid()

    compiled = torch.compile(both, dynamic=True)
    for batch in (1, 3):
        given = x.expand(batch, -1, -1, -1)
        with torch.no_grad():
            for found, wanted in zip(compiled(given), both(given)):
                near(found, wanted)
