"""Inference on packed weights follows every change of the weights."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from mvkernels.dispatch import extension
from mvkernels.swap import swap
from mvkernels.swap.engine import unswap
from tests.swap.inference import average, logits, packings, picture, statistics

pytestmark = pytest.mark.skipif(extension.module is None, reason=extension.reason)


def step(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    model(picture(model)).mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def fused_step(model):
    """Which changes no version counter."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    model(picture(model)).mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def merge(model):
    """As peft merges an adapter, and as averages of weights are often copied."""
    for p in model.parameters():
        p.data += 0.01 * torch.randn_like(p)


def assign_twice(model):
    """The second time what was freed the first time may be at hand again."""
    for _ in range(2):
        for p in model.parameters():
            p.data = p.data * 1.05


def transpose(model):
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.weight.shape[0] == module.weight.shape[1]:
            module.weight.data = module.weight.data.t()


def load(model):
    model.load_state_dict({k: v * 1.5 if v.is_floating_point() else v for k, v in model.state_dict().items()})


def exchange(model):
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.weight = nn.Parameter(module.weight.detach() * 0.9)


def assign(model):
    for p in model.parameters():
        p.data = p.data * 1.1


def train(model):
    model.train()
    model(picture(model, batch=2))
    model.eval()


def epsilon(model):
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.LayerNorm)):
            module.eps = 0.1


def there_and_back(model):
    model.double().float()


def rows(model):
    """A norm of tokens, and the weight of one product of a layer."""
    layer = model.stages[2][1].transformer[0]
    with torch.no_grad():
        layer.norm1.bias.add_(0.3)
        layer.attn.qkv.weight.mul_(1.2)


@pytest.mark.parametrize(
    "change",
    [
        step,
        fused_step,
        merge,
        assign_twice,
        transpose,
        load,
        average,
        exchange,
        assign,
        statistics,
        train,
        epsilon,
        there_and_back,
        rows,
    ],
)
def test_every_change_is_followed(small, change):
    x = picture(small)
    swap(small, inference=True)
    before = logits(small, x)
    change(small)
    plain = copy.deepcopy(small)
    unswap(plain)
    found, wanted = logits(small, x), logits(plain, x)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))
    if change is not there_and_back:
        assert not torch.allclose(found, before, rtol=1e-3)
    assert not packings(small, x)


def test_what_leaves_no_trace_needs_refresh(small):
    report = swap(small, inference=True)
    x = picture(small)
    before = logits(small, x)
    small.final_conv.conv.weight.data.view(-1)[5:90] += 1.0  # by the way of .data, few values: no mark, no sample
    assert torch.equal(logits(small, x), before)
    report.refresh()
    plain = copy.deepcopy(small)
    unswap(plain)
    wanted = logits(plain, x)
    torch.testing.assert_close(logits(small, x), wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


def test_a_parameter_without_memory():
    """As fully sharded training leaves them between calls."""
    model = nn.Linear(64, 64)
    swap(model, inference=True)
    x, storage = torch.randn(3, 64), model.weight.untyped_storage()
    with torch.no_grad():
        wanted, weight = model(x), model.weight.clone()
        storage.resize_(0)
        with pytest.raises(RuntimeError):
            model(x)
        storage.resize_(weight.numel() * 4)
        model.weight.copy_(weight)
        assert torch.equal(model(x), wanted)
