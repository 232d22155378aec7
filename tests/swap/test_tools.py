"""Tools that look for layers by the name of their class, or put a class of theirs over it, and swapped models."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn

from mvkernels.swap import swap
from mvkernels.swap.report import original_of
from tests.swap.conftest import output, timm_model, transformers_block, transformers_model


@pytest.fixture
def one_rank(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def block_names(model: nn.Module) -> list[str]:
    return [e.name for e in swap(copy.deepcopy(model)).entries if e.swapped]


@pytest.mark.parametrize("share", [0.2, 0.4, 0.6, 0.8])
def test_a_device_map_keeps_blocks_whole(share):
    accelerate = pytest.importorskip("accelerate")
    model = transformers_model()
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    memory = {0: int(share * total), "cpu": 2 * total}
    names = block_names(model)

    def devices():
        return accelerate.infer_auto_device_map(model, memory, no_split_module_classes=model._no_split_modules)

    before = devices()
    swap(model)
    after = devices()
    assert after == before
    assert not any(key.startswith(f"{name}.") for key in after for name in names)


def test_fsdp_policies_find_the_layer():
    pytest.importorskip("accelerate")
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy

    model = transformers_model()
    names = block_names(model)
    swap(model)
    settings = {"auto_wrap_policy": "transformer_based_wrap", "transformer_cls_names_to_wrap": ["MobileViTLayer"]}
    first = FullyShardedDataParallelPlugin(fsdp_version=1, **settings)
    first.set_auto_wrap_policy(model)
    second = FullyShardedDataParallelPlugin(fsdp_version=2, **settings)
    second.set_auto_wrap_policy(model)
    policies = [
        lambda m: first.auto_wrap_policy(m, recurse=False, nonwrapped_numel=0),
        fsdp2_prepare_auto_wrap_policy(second, model),
    ]
    for policy in policies:
        assert [name for name, module in model.named_modules() if policy(module)] == names


@pytest.mark.parametrize("make", [transformers_model, timm_model])
def test_restore_leaves_sharded_blocks_sharded(make, one_rank):
    from torch.distributed.fsdp import FSDPModule, fully_shard

    model, x = make(), torch.randn(1, 3, 64, 64)
    expected = output(model(x)).detach()
    names = block_names(model)
    report = swap(model)
    for name in names:
        fully_shard(model.get_submodule(name))
    with torch.no_grad():
        torch.testing.assert_close(output(model(x)), expected, rtol=1e-3, atol=1e-3)
    report.restore()
    for name in names:
        block = model.get_submodule(name)
        assert isinstance(block, FSDPModule) and original_of(block) is None
        block.unshard()
        block.reshard()
    out = output(model(x))
    assert torch.equal(out, expected)
    out.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_low_rank_adapters_find_what_they_look_for():
    peft = pytest.importorskip("peft")
    model = transformers_model()
    swap(model)
    config = peft.LoraConfig(r=2, target_modules=["query", "value"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    x = torch.randn(1, 3, 64, 64)
    fused = output(adapted(x))
    adapted.base_model.model.eval()
    for module in adapted.modules():
        original = original_of(module)
        if original is not None:
            module.__class__ = original
    torch.testing.assert_close(fused, output(adapted(x)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("projection", ["query", "key", "value"])
@pytest.mark.parametrize("edit", ["no bias", "no parameter", "another bias", "another size"])
def test_edits_of_a_projection_after_a_call(edit, projection, called):
    block, x = transformers_block().double(), torch.randn(1, 12, 8, 8, dtype=torch.float64)
    twin = copy.deepcopy(block)
    swap(block)
    if called:
        block(x)
    outputs = []
    for each in (block, twin):
        linear = each.get_submodule(f"transformer.layer.0.attention.attention.{projection}")
        torch.manual_seed(1)
        if edit == "no bias":
            linear.bias = None
        elif edit == "no parameter":
            linear.register_parameter("bias", None)
        elif edit == "another bias":
            linear.bias = nn.Parameter(torch.randn_like(linear.bias))
        else:
            linear.weight.data = torch.randn(7, 24, dtype=torch.float64)
        try:
            outputs.append(each(x))
        except RuntimeError as error:
            outputs.append(str(error))
    if edit == "another size":
        assert outputs[0] == outputs[1]
    else:
        torch.testing.assert_close(*outputs, rtol=1e-9, atol=1e-9)
