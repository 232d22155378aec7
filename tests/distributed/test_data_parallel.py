"""DDP and FSDP2 on two processes: the gradients of one process with the whole batch, through the fused ops."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import mvmodels
from mvkernels.dispatch import extension
from mvkernels.swap import swap
from tests.distributed.processes import LINUX, run
from tests.swap.conftest import randomise, transformers_block

pytestmark = LINUX
BACKEND = "cpp" if extension.module is not None else "reference"


def mobile_former() -> nn.Module:
    torch.manual_seed(0)
    return randomise(mvmodels.create_model("mobile_former_26m", num_classes=5, backend=BACKEND)).double()


def mobilevit() -> nn.Module:
    block = transformers_block().double()
    assert swap(block, backend=BACKEND).count == 1
    return nn.Sequential(nn.Conv2d(3, 12, 1), block).double()


MODELS = {"mobile_former": (mobile_former, 32), "mobilevit": (mobilevit, 16)}


def gradients(model: nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor]:
    model(images).square().mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def ddp(rank: int, model: nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor]:
    parallel = nn.parallel.DistributedDataParallel(model)
    return {name.removeprefix("module."): grad for name, grad in gradients(parallel, images.chunk(2)[rank]).items()}


def fsdp(rank: int, model: nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    found = gradients(model, images.chunk(2)[rank])
    assert all(grad.to_local().numel() < grad.numel() or grad.shape[0] == 1 for grad in found.values())
    return {name: grad.full_tensor() for name, grad in found.items()}


@pytest.mark.parametrize("parallel", [ddp, fsdp], ids=["ddp", "fsdp2"])
@pytest.mark.parametrize("which", MODELS)
def test_the_gradients_are_those_of_one_process(which, parallel, tmp_path):
    build, size = MODELS[which]
    model = build()
    images = torch.randn(4, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = gradients(copy.deepcopy(model), images)
    # Of all gradients: that of a key's bias is 0 but for rounding.
    largest = max(float(grad.abs().max()) for grad in expected.values())
    for found in run(2, tmp_path, parallel, model, images):
        assert found.keys() == expected.keys()
        for name, grad in found.items():
            assert float((grad - expected[name]).abs().max()) <= 1e-10 * largest, name
