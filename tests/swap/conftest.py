from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from mvkernels.swap import eligibility


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights, norm weights and norm statistics, and position biases and logit scales that count: default
    initialisation hides errors. In eval mode."""
    generator = torch.Generator().manual_seed(seed)
    batch_norms = (nn.BatchNorm1d, nn.BatchNorm2d)
    for module in model.modules():
        norm = isinstance(module, (nn.LayerNorm, *batch_norms))
        for name, parameter in module.named_parameters(recurse=False):
            value = 0.2 * torch.randn(parameter.shape, generator=generator)
            if "table" in name or "attention_biases" in name:
                value *= 5.0
            parameter.data.copy_(value + {"weight": 1.0 if norm else 0.0, "logit_scale": 2.0}.get(name, 0.0))
        if isinstance(module, batch_norms):
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
    model.eval()  # which returns nothing where LeViT's kind overrides train()
    return model


def transformers_config(**changes: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    settings: dict[str, Any] = {
        "hidden_sizes": [16, 24, 32],
        "neck_hidden_sizes": [8, 8, 8, 16, 16, 24, 32],
        "expand_ratio": 2.0,
        "num_labels": 7,
        **changes,
    }
    return transformers.MobileViTConfig(**settings)


def transformers_block(stride: int = 2, **changes: Any) -> nn.Module:
    config = transformers_config(**changes)
    from transformers.models.mobilevit.modeling_mobilevit import MobileViTLayer

    return randomise(
        MobileViTLayer(config, in_channels=12, out_channels=12, stride=stride, hidden_size=24, num_stages=2)
    )


def transformers_model(**changes: Any) -> nn.Module:
    config = transformers_config(**changes)
    from transformers import MobileViTForImageClassification

    return randomise(MobileViTForImageClassification(config))


def timm_block(**changes: Any) -> nn.Module:
    pytest.importorskip("timm")
    from timm.models.mobilevit import MobileVitBlock

    settings: dict[str, Any] = {"in_chs": 12, "transformer_dim": 24, "transformer_depth": 2, "patch_size": 2, **changes}
    return randomise(MobileVitBlock(**settings))


def timm_model(**changes: Any) -> nn.Module:
    timm = pytest.importorskip("timm")
    return randomise(timm.create_model("mobilevit_xxs", num_classes=7, **changes))


@dataclass(frozen=True)
class Family:
    block: Callable[..., nn.Module]
    model: Callable[..., nn.Module]
    """Both take the settings of the package's class, and come with random weights, in eval mode."""
    class_name: str
    blocks: tuple[str, ...]
    """The names of the model's blocks."""
    scale: int
    """A block's input side over the side of its attention's map."""
    linear: str
    """A Linear, an activation, and a container inside a block, by name."""
    activation: str
    container: str
    attention: str
    attention_dropout: dict[str, float]
    hidden_dropout: dict[str, float]


FAMILIES = {
    "transformers": Family(
        transformers_block,
        transformers_model,
        "MobileViTLayer",
        tuple(f"mobilevit.encoder.layer.{i}" for i in (2, 3, 4)),
        2,
        "transformer.layer.0.attention.attention.query",
        "transformer.layer.0.intermediate.intermediate_act_fn",
        "transformer.layer.1",
        "transformer.layer.0.attention.attention",
        {"attention_probs_dropout_prob": 0.1},
        {"hidden_dropout_prob": 0.1},
    ),
    "timm": Family(
        timm_block,
        timm_model,
        "MobileVitBlock",
        tuple(f"stages.{i}.1" for i in (2, 3, 4)),
        1,
        "transformer.0.attn.proj",
        "transformer.0.mlp.act",
        "transformer.1",
        "transformer.0.attn",
        {"attn_drop": 0.1},
        {"drop": 0.1},
    ),
}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


@pytest.fixture
def one_process() -> Iterator[Callable[[nn.Module], Any]]:
    """``fully_shard`` with this process as the only one."""
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield lambda module: fully_shard(module, mesh=init_device_mesh("cpu", (1,)))
    distributed.destroy_process_group()


@pytest.fixture(autouse=True)
def quiet_log():
    """Each test sees its own warnings: they are given once a process."""
    eligibility._logged.clear()
    torch.manual_seed(0)


@pytest.fixture
def falls_back(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What swapped modules said when they ran their original forward."""
    caplog.set_level(logging.WARNING, logger="mvkernels")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "mvkernels"]


def output(result: Any) -> torch.Tensor:
    return getattr(result, "logits", result)


def compiles_for_all_sizes(module: nn.Module, inputs: list[torch.Tensor]) -> None:
    """fullgraph, with the values and gradients of the module itself, as one static graph and one dynamic one."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    parameters = list(module.parameters())
    for x in inputs:
        results = []
        for run in (module, compiled):
            leaf = x.detach().clone().requires_grad_()
            out = output(run(leaf))
            cotangent = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(0))
            results.append([out, *torch.autograd.grad(out, [leaf, *parameters], cotangent)])
        torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-9)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] <= 2 and not counters["graph_break"], counters
    torch._dynamo.reset()


@pytest.fixture(params=("mobilevit_xxs", "efficientvit_b0", "efficientformer_l1", "transformers"))
def model(request: pytest.FixtureRequest) -> nn.Module:
    """Whole models for the tests of inference on packed weights."""
    from tests.swap.inference import make

    return make(request.param)


@pytest.fixture
def small() -> nn.Module:
    """One of them."""
    from tests.swap.inference import make

    return make("mobilevit_xxs")
