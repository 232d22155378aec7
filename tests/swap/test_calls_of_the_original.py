"""Calls that a swapped block leaves to the forward of the original."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mvkernels.swap import swap
from tests.swap.test_eligibility import calls_of_attention


def test_jit_trace_takes_the_original(family, monkeypatch):
    block = family.block()
    swap(block)
    seen = calls_of_attention(monkeypatch)
    x = torch.randn(1, 12, 8, 8)
    traced = torch.jit.trace(block, x, check_trace=False)
    assert not seen
    torch.testing.assert_close(traced(x), block(x), rtol=1e-4, atol=1e-4)


@pytest.mark.core
def test_function_transforms_take_the_original(family):
    block = family.block().double()
    x = torch.randn(1, 12, 4, 4, dtype=torch.float64)
    forward_mode = family.class_name == "MobileViTLayer"  # timm's own attention has none on the CPU

    def results():
        yield torch.func.grad(lambda x: block(x).sum())(x)
        if forward_mode:
            yield from torch.func.jvp(block, (x,), (x,))

    expected = list(results())
    swap(block)
    for a, b in zip(results(), expected):
        torch.testing.assert_close(a, b)


def test_gradient_checkpointing():
    """transformers recomputes the block in the backward pass, fused: same gradients, same dropout mask."""
    from .conftest import transformers_model

    model = transformers_model().train()
    swap(model)
    x = torch.randn(2, 3, 64, 64)
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        for m in model.modules():  # the same statistics for both runs
            if isinstance(m, nn.BatchNorm2d):
                m.eval()
        torch.manual_seed(1)
        loss = model(x).logits.square().sum()
        grads.append(torch.autograd.grad(loss, list(model.parameters())))
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * float(a.abs().max()))


def test_global_hooks_take_the_original(family):
    """A profiler's or a FLOP counter's hook on every module sees the inner modules, as it did before the swap."""
    block = family.block()
    seen: list[str] = []
    swap(block)
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(type(m).__name__))
    try:
        block(torch.randn(1, 12, 8, 8))
    finally:
        handle.remove()
    assert type(block.get_submodule(family.attention)).__name__ in seen
