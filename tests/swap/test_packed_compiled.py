"""Inference on packed weights under torch.compile."""

from __future__ import annotations

import copy

import pytest
import torch

from mvkernels.dispatch import extension
from mvkernels.swap import swap
from mvkernels.swap.engine import unswap
from tests.swap.inference import average, logits, make, picture, statistics

pytestmark = pytest.mark.skipif(extension.module is None, reason=extension.reason)


def targets(model, x):
    """The operators in the graphs that torch.compile makes of a call without gradients, and the compiled model."""
    seen = []

    def note(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    compiled = torch.compile(model, backend=note, fullgraph=True)
    logits(compiled, x)
    return seen, compiled


def test_compiled_the_graph_calls_what_an_eager_call_does_and_follows_every_change(model):
    x = picture(model)
    report = swap(model, inference=True)
    plain = copy.deepcopy(model)
    unswap(plain)
    seen, compiled = targets(model, x)
    assert [t for t in seen if "packed" in t] and not [t for t in seen if "pack." in t]
    torch.testing.assert_close(logits(compiled, x), logits(model, x), rtol=1e-4, atol=1e-4)
    assert report.packed_bytes
    for change in (average, statistics):
        change(model), change(plain)
        found, wanted = logits(compiled, x), logits(plain, x)
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mobilevit_xxs", "transformers"])
def test_compiled_by_inductor_for_any_size(name):
    model = make(name)
    plain = copy.deepcopy(model)
    swap(model, inference=True)
    compiled = torch.compile(model, dynamic=True)
    for side in (64, 96, 60):
        x = picture(model, side)
        wanted = logits(plain, x)
        torch.testing.assert_close(logits(compiled, x), wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


def test_a_hook_is_called_in_a_compiled_model_too(small):
    swap(small, inference=True)
    x = picture(small)
    _, compiled = targets(small, x)
    seen = []
    with small.stages[0][0].conv2_kxk.register_forward_hook(lambda m, given, out: seen.append(out.shape)):
        logits(compiled, x)
    assert seen


def test_compiled_with_gradients_it_is_the_original(small):
    swap(small, inference=True)
    x = picture(small)
    compiled = torch.compile(small, backend="aot_eager")
    torch.testing.assert_close(compiled(x), small(x), rtol=1e-3, atol=1e-4)
