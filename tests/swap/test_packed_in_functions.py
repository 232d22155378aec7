"""Functions that are compiled around a module on packed weights: changes of weights, transforms, gradients."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, jacfwd, jvp, stack_module_state, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import mvkernels
from mvkernels.dispatch import extension
from mvkernels.swap import swap
from tests.swap.inference import counts, recorded

pytestmark = pytest.mark.skipif(extension.module is None, reason=extension.reason)
GIVEN = torch.randn(4, 32, generator=torch.Generator().manual_seed(1))
OTHER = torch.randn(64, 32, generator=torch.Generator().manual_seed(2))


@pytest.fixture(autouse=True)
def _anew():
    torch._dynamo.reset()


def model(swapped: bool, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    made = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 16)).eval()
    if swapped:
        swap(made, inference=True)
    return made


def has_operator(graphs: list[list[str]]) -> bool:
    return any(counts(graph)[0] for graph in graphs)


def substituted(m, x):
    twice = {name: 2 * p for name, p in m.named_parameters()}
    return lambda x: functional_call(m, twice, (x,))


def partly_substituted(m, x):
    twice = {name: 2 * p for name, p in m.named_parameters() if name.startswith("2")}
    return lambda x: functional_call(m, twice, (x,))


def multiplied(m, x):
    def run(x):
        for p in m.parameters():
            p.mul_(1.5)
        return m(x)

    return run


def written_between(m, x):
    def run(x):
        m[0].weight.copy_(OTHER)
        y = m(x)
        m[0].weight.copy_(0.5 * OTHER)
        return y + m(x)

    return run


def averaged(m, x):
    other = model(False, seed=3)

    def run(x):
        for p, q in zip(m.parameters(), other.parameters()):
            p.lerp_(q, 0.5)
        return m(x)

    return run


def exchanged(m, x):
    def run(x):
        m[0].weight = nn.Parameter(OTHER)
        return m(x)

    return run


def multiplied_together(m, x):
    def run(x):
        torch._foreach_mul_([p.detach() for p in m.parameters()], 1.5)
        return m(x)

    return run


def tied_by_memory(m, x):
    other = nn.Parameter(m[2].weight.detach())

    def run(x):
        other.mul_(1.5)
        return m(x)

    return run


def other_data(m, x):
    def run(x):
        m[0].weight.data = OTHER
        return m(x)

    return run


def other_layer(m, x):
    torch.manual_seed(4)
    layer = nn.Linear(32, 64)

    def run(x):
        m[0] = layer
        return m(x)

    return run


def other_activation(m, x):
    def run(x):
        m[1].approximate = "tanh"
        return m(x)

    return run


def written_after(m, x):
    def run(x):
        y = m(x)
        for p in m.parameters():
            p.mul_(2)
        return y

    return run


def ensemble(m, x):
    other = copy.deepcopy(m)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(2)
    parameters, _ = stack_module_state([m, other])
    return lambda x: vmap(lambda p: functional_call(m, p, (x,)))(parameters)


def tangent(m, x):
    return lambda x: jvp(m, (x,), (torch.ones_like(x),))[1]


def dual(m, x):
    def run(x):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(m(forward_ad.make_dual(x, torch.ones_like(x)))).tangent

    return run


def jacobian(m, x):
    return jacfwd(lambda y: m(y).sum())


CHANGES = [
    substituted,
    partly_substituted,
    multiplied,
    multiplied_together,
    tied_by_memory,
    written_between,
    averaged,
    exchanged,
    other_data,
    other_layer,
    other_activation,
    written_after,
]
TRANSFORMS = [ensemble, tangent, dual, jacobian]


@pytest.mark.parametrize("make", CHANGES + TRANSFORMS)
def test_what_a_compiled_function_does_to_the_weights(make: Callable[..., Any]):
    """Such a graph must see the weights; the module that they belong to does not show the change yet."""
    found = []
    for swapped in (False, True):
        torch._dynamo.reset()
        with torch.no_grad():
            compiled = torch.compile(make(model(swapped), GIVEN), backend="aot_eager", fullgraph=True)
            found.append(torch.stack([compiled(GIVEN), compiled(GIVEN)]))
    assert found[0].isfinite().all() and found[0].any()
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


def test_a_change_before_the_graph_is_none_of_the_graph():
    m = model(True)
    with torch.no_grad():
        for p in m.parameters():
            p.mul_(1.1)
        compiled, graphs = recorded(lambda x: m[0].weight.sum() + m(x))
        compiled(GIVEN)
    assert has_operator(graphs)


NOT_FOR_IT = {
    "gradients": torch.enable_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "reference": lambda: mvkernels.use_backend("reference"),
}


@pytest.mark.parametrize("name", NOT_FOR_IT)
def test_graphs_without_the_operator(name):
    for inside in (False, True):
        torch._dynamo.reset()
        with torch.no_grad(), NOT_FOR_IT[name]() if inside else contextlib.nullcontext():
            compiled, graphs = recorded(model(True))
            compiled(GIVEN)
        assert has_operator(graphs) is not inside


def test_a_compiled_model_learns():
    gradients = []
    for swapped in (False, True):
        torch._dynamo.reset()
        m = model(swapped)
        torch.compile(m, backend="aot_eager", fullgraph=True)(GIVEN).square().sum().backward()
        gradients.append([copy.copy(p.grad) for p in m.parameters()])
    for one, other in zip(*gradients):
        torch.testing.assert_close(other, one)


@pytest.mark.parametrize("pre_dispatch", [False, True])
def test_make_fx_keeps_no_packed_weights(pre_dispatch):
    m = model(True)
    with torch.no_grad():
        m(GIVEN)
        traced = make_fx(m, pre_dispatch=pre_dispatch)(GIVEN)
        for p in m.parameters():
            p.mul_(2)
        torch.testing.assert_close(traced(GIVEN), m(GIVEN), rtol=1e-4, atol=1e-5)


def test_a_compiled_model_inside_a_transform_and_by_itself():
    m = model(True)
    with torch.no_grad():
        compiled, wanted = torch.compile(m, backend="aot_eager"), m(GIVEN)
        torch.testing.assert_close(torch.vmap(compiled)(GIVEN[None])[0], wanted, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(compiled(GIVEN), wanted, rtol=1e-4, atol=1e-5)


def test_an_attribute_of_a_part_of_a_block_that_the_graph_changes():
    """The block is one operator; what is changed lies deeper in it."""

    class Block(nn.Sequential):
        pass

    found = []
    for swapped in (False, True):
        torch._dynamo.reset()
        m = nn.Sequential(Block(model(swapped), nn.Identity()))

        def run(x, m=m):
            m[0][0][2].bias = None
            return m(x)

        with torch.no_grad():
            found.append(torch.compile(run, backend="aot_eager")(GIVEN))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
