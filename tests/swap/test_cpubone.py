"""CPUBone's attention, recognised by what it holds and computes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from mvkernels.swap import swap, verify_swap
from tests.cpubone_layout import ConvAttention
from tests.swap.conftest import randomise


def attention(**settings) -> nn.Module:
    return randomise(ConvAttention(**settings))


@pytest.mark.parametrize("stride", [2, 4])
def test_values_and_gradients(stride):
    module = attention(att_stride=stride).double()
    twin = copy.deepcopy(module)
    assert swap(module).count == 1
    results = []
    for each in (module, twin):
        x = torch.randn(2, 16, 9, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        out = each(x)
        cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
        results.append((out, *torch.autograd.grad(out, [x, *each.parameters()], cotangent)))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


def test_verify_swap():
    result = verify_swap(nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), attention()), torch.randn(2, 3, 16, 24))
    assert result.ok and result.swapped == 1, str(result)


def test_what_computes_something_else_stays():
    assert "something other than the known formula" in swap(attention(factor=1.1)).entries[0].reason
    module = attention()
    module.dropout = nn.Dropout(0.1)
    assert "has a child dropout" in swap(module).entries[0].reason
    module = attention()
    module.sda.softmax = nn.Softmax(-1)
    assert "sda has a child softmax" in swap(module).entries[0].reason


def test_a_hook_on_the_scores_is_called():
    module, seen = attention(), []
    swap(module)
    module(torch.randn(1, 16, 4, 4))
    module.sda.register_forward_hook(lambda *_: seen.append(1))
    module(torch.randn(1, 16, 4, 4))
    assert seen == [1]
