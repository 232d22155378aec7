"""torch.compile and torch.export of swapped models."""

from __future__ import annotations

import pytest
import torch

from mvkernels.swap import swap


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_compiled_block_without_graph_breaks(family):
    block = family.block().double()
    x = torch.randn(2, 12, 7 * family.scale, 8 * family.scale, dtype=torch.float64, requires_grad=True)
    swap(block)
    expected = block(x)
    (gradient,) = torch.autograd.grad(expected.square().sum(), x)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    out = compiled(x)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(torch.autograd.grad(out.square().sum(), x)[0], gradient, rtol=1e-9, atol=1e-9)


def test_compiled_block_follows_training_mode(family):
    """A compiled block that goes to training with dropout on the attention is traced again, as the original."""
    block = family.block(**family.attention_dropout)
    swap(block)
    compiled = torch.compile(block, fullgraph=True, backend="eager")
    x = torch.randn(1, 12, 8, 8)
    with torch.no_grad():
        assert torch.equal(compiled(x), compiled(x))
        block.train()
        assert not torch.equal(compiled(x), compiled(x))


@pytest.mark.core
def test_compiled_model():
    from .conftest import transformers_model

    model = transformers_model()
    swap(model)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(x).logits
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("strict, size", [(False, (8, 8)), (True, (7, 9))], ids=["non-strict", "strict"])
def test_exported_block_needs_nothing_of_this_library(family, strict, size):
    block = family.block()
    x = torch.randn(2, 12, size[0] * family.scale, size[1] * family.scale)
    with torch.no_grad():
        expected = block(x)
        swap(block)
        program = torch.export.export(block, (x,), strict=strict)
    torch.testing.assert_close(program.module()(x), expected, rtol=1e-4, atol=1e-4)
    namespaces = {str(node.target).split(".")[0] for node in program.graph.nodes if node.op == "call_function"}
    assert not any(name.startswith("mvkernels") for name in namespaces), namespaces


def test_exported_model():
    from .conftest import timm_model

    model = timm_model()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        swap(model)
        program = torch.export.export(model, (x,))
        torch.testing.assert_close(program.module()(x), expected, rtol=1e-4, atol=1e-4)


def test_a_swap_of_another_model_compiles_nothing_anew(monkeypatch):
    from mvkernels.swap import eligibility

    from .conftest import timm_model, transformers_model

    monkeypatch.setattr(eligibility, "_written", eligibility._Written())  # as in a fresh process
    model, other, x = transformers_model(), timm_model(), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        swap(model)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        compiled(x)
        swap(other, fold_norms=True)
        other(x)
        with torch._dynamo.config.patch(error_on_recompile=True):
            compiled(x)
