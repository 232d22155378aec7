"""Bridges of Mobile-Former that are swapped: copies, precision, compilation, export."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch

from mvkernels.swap import swap
from tests import mobile_former_layout as layout
from tests.swap.test_mobile_former import KINDS, bridge, inputs, model, tokens_or_map


def test_copy_and_pickle():
    network = model()
    swap(network, backend="reference")
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = network(x)
        buffer = io.BytesIO()
        torch.save(network, buffer)
        buffer.seek(0)
        copies = copy.deepcopy(network), pickle.loads(pickle.dumps(network)), torch.load(buffer, weights_only=False)
        for other in copies:
            assert swap(other).count == 0
            assert torch.equal(other(x), expected)
            assert [type(m) for m in other.modules()] == [type(m) for m in network.modules()]
            for p in other.parameters():
                p.zero_()
            assert torch.equal(network(x), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind):
    module = bridge(kind)
    x = inputs()
    with torch.no_grad():
        exact = tokens_or_map(copy.deepcopy(module).double()(tuple(t.double() for t in x)))
        with torch.autocast("cpu", torch.bfloat16):
            baseline = tokens_or_map(module(x))
            swap(module)
            actual = tokens_or_map(module(x))
    assert actual.dtype == baseline.dtype
    errors = [float((out - exact).abs().max()) for out in (actual, baseline)]
    assert errors[0] <= 2 * errors[1] + 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_and_exported(kind):
    module = bridge(kind)
    swap(module)
    x = inputs()
    expected = tokens_or_map(module(x))
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(tokens_or_map(compiled(x)), expected)
    program = torch.export.export(module, (x,))
    torch.testing.assert_close(tokens_or_map(program.module()(x)), expected)
    namespaces = {str(node.target).split(".")[0] for node in program.graph.nodes if node.op == "call_function"}
    assert not any(name.startswith("mvkernels") for name in namespaces), namespaces


def test_moves():
    module = bridge()
    swap(module)
    x, tokens = inputs()
    assert module.bfloat16()((x.bfloat16(), tokens.bfloat16()))[0].dtype == torch.bfloat16
    assert module.double()((x.double(), tokens.double()))[0].dtype == torch.float64


def test_a_bridge_without_memory():
    """Swapping does not read the weights, so that they may not be there yet."""
    with torch.device("meta"):
        module = layout.Local2Global(12, token_dim=16, token_num=3)
    assert swap(module).count == 1
    assert next(module.parameters()).is_meta
