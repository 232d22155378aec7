"""A swapped Local2Global's second result: the original's scores, for who uses them, and no cost for who does not."""

from __future__ import annotations

import copy
import io
import operator
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mvkernels.swap import swap, verify_swap
from mvkernels.swap.families import authors_mobile_former
from mvkernels.swap.later import LaterTensor
from tests import mobile_former_layout as layout
from tests.swap.test_mobile_former import bridge, inputs, model


class Parent(nn.Module):
    def __init__(self):
        super().__init__()
        self.local_global = bridge()

    def forward(self, x):
        tokens, scores = self.local_global(x)
        return tokens, scores.softmax(1)


@pytest.fixture
def formed(monkeypatch):
    """How often scores were formed."""
    seen = []
    original = authors_mobile_former._scores
    monkeypatch.setattr(authors_mobile_former, "_scores", lambda *a: seen.append(1) or original(*a))
    return seen


def results(module, x, uses):
    """The outputs of ``module``, and the gradients of its inputs and parameters."""
    leaves = [t.detach().clone().requires_grad_() for t in x]
    out = uses(*module(tuple(1 * t for t in leaves)))
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in out]
    return *out, *torch.autograd.grad(out, [*leaves, *module.parameters()], cotangents)


USES = {
    "method": lambda s: s.softmax(1),
    "function": lambda s: torch.softmax(s, 1),
    "functional": lambda s: F.adaptive_avg_pool2d(s.mean(1), 2),
    "einsum": lambda s: torch.einsum("bhmij,bhmij->bm", s, s),
    "list": lambda s: torch.cat([s, s.square()]),
    "index": lambda s: s[:, 0],
    "left": lambda s: 2 * s + s,
    "right": lambda s: torch.ones(5, 7, dtype=torch.float64) - s / 2,
    "negative": operator.neg,
    "iteration": lambda s: torch.stack([row.sum() for row in s]),
    "compared": lambda s: (s > 0) * s,
    "itself": lambda s: s.tensor,
    "both": lambda s: s.clone() @ s.transpose(-1, -2),
}


@pytest.mark.parametrize("use", USES)
def test_values_and_gradients(use, formed):
    """Also of what both results come from."""
    module = bridge().double()
    x = inputs(dtype=torch.float64)

    def both(tokens, scores):
        if isinstance(scores, torch.Tensor) and use == "itself":
            return tokens, scores
        return tokens, USES[use](scores)

    expected = results(module, x, both)
    assert swap(module).count == 1
    formed.clear()
    torch.testing.assert_close(results(module, x, both), expected, rtol=1e-9, atol=1e-9)
    assert formed == [1]


def test_nobody_pays_for_what_is_not_used(formed):
    network = model()
    swap(network)
    formed.clear()
    network(torch.randn(1, 3, 64, 64)).sum().backward()
    scores = network.local_global((torch.randn(1, 96, 2, 2), torch.randn(3, 1, 128)))[1]
    assert scores is not None and not isinstance(scores, torch.Tensor) and {scores: 1}
    torch.utils._pytree.tree_map(lambda leaf: leaf, {"a": [scores]})
    assert list(nn.parallel.distributed._find_tensors((scores,))) == []
    assert not formed
    assert scores.shape == (1, 2, 3, 2, 2) and len(formed) == 1


def test_python_sees_a_tensor():
    module = bridge()
    x = inputs()
    expected = module(x)[1]
    swap(module)
    scores = module(x)[1]
    assert len(scores) == 2 and scores.shape == expected.shape and scores.dtype == expected.dtype
    assert repr(scores)[:7] == "tensor(" and f"{scores.mean():.3f}" == f"{expected.mean():.3f}"
    assert bool((scores == scores.clone()).all()) and scores.detach().numpy().shape == (2, 2, 3, 5, 7)
    with torch.no_grad():
        scores.zero_()
        assert not scores.any()
        scores[0] = 1
        scores += 1
    assert float(scores.max()) == 2 and isinstance(scores, torch.Tensor)
    scores = module(x)[1]
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        scores.nothing_of_the_kind  # noqa: B018


def test_the_first_bridge_of_a_model_by_itself():
    network = model(hyper_token_id=-1).double()
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        expected = network(x)
        assert swap(network.features[1].local_global).count == 1
        torch.testing.assert_close(network(x), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("training", [False, True])
def test_scores_asked_for_after_the_swap(training):
    """Outputs and every gradient."""
    network = model().double()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    network.train(training)

    def run(network):
        out = network(x)
        return out, torch.autograd.grad(out.square().sum(), [*network.parameters()])

    twin = copy.deepcopy(network)
    assert swap(network).count == 17
    for each in (network, twin):
        for part in each.modules():
            for name in ("hyper_token_id", "sel_token_id"):
                if hasattr(part, name):
                    setattr(part, name, -1)
    torch.testing.assert_close(run(network), run(twin), rtol=1e-7, atol=1e-7)


def test_of_that_call():
    """Weights that change afterwards do not matter, and maps that change are told."""
    module = bridge().double()
    x, tokens = inputs(dtype=torch.float64)
    expected = module((x, tokens))[1]
    swap(module)
    first, second = module((x, tokens))[1], module((x, tokens))[1]
    with torch.no_grad():
        module.q.weight.zero_()
        torch.testing.assert_close(first.tensor, expected)
    x.zero_()
    torch.testing.assert_close(first.tensor, expected)
    with pytest.raises(RuntimeError, match="changed in place since"):
        second.tensor  # noqa: B018


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("frozen", [0, 1, None])
def test_checkpoints(reentrant, frozen):
    """Around the bridge, with the scores used outside."""
    module = bridge().double()
    x = inputs(dtype=torch.float64)

    def run(swapped):
        leaves = [t.clone().requires_grad_(i != frozen) for i, t in enumerate(x)]
        given = [1 * t for t in leaves]
        if swapped:
            tokens, scores = checkpoint(module, given, use_reentrant=False)
            if reentrant:
                tokens, scores = checkpoint(lambda *z: module(z), *given, use_reentrant=True)
        else:
            tokens, scores = module(given)
        wanted = [t for t in leaves if t.requires_grad]
        ((tokens**2).sum() + (scores.softmax(-1) ** 2).sum()).backward()
        return [t.grad for t in wanted]

    expected = run(False)
    swap(module)
    torch.testing.assert_close(run(True), expected, rtol=1e-9, atol=1e-12)


def test_modes_of_that_call():
    module = bridge()
    x = inputs()
    swap(module)
    with torch.no_grad():
        scores = module(x)[1]
    assert not scores.requires_grad
    scores = module(x)[1]
    with torch.no_grad():
        assert scores.requires_grad
    with torch.inference_mode():
        scores = module(x)[1]
    assert not scores.requires_grad and scores.tensor.isfinite().all()
    with torch.autocast("cpu", torch.bfloat16):
        scores, expected = module(x)[1], module.mvk_original.forward(module, x)[1]
        half = module(x)[1]
        assert half.dtype == expected.dtype == torch.bfloat16
    assert scores.dtype == torch.bfloat16


def test_copies_are_tensors():
    module = bridge()
    swap(module)
    with torch.no_grad():
        tokens, scores = module(inputs())
    buffer = io.BytesIO()
    torch.save(scores, buffer)
    buffer.seek(0)
    copies = [copy.copy(scores), copy.deepcopy((tokens, scores))[1], pickle.loads(pickle.dumps(scores))]
    for other in (*copies, torch.load(buffer)):
        assert type(other) is torch.Tensor and torch.equal(other, scores.tensor)


def test_verify_swap_compares_the_scores_of_who_returns_them():
    parent = Parent()
    result = verify_swap(parent, (inputs(),))
    assert result.ok and result.swapped == 1, str(result)
    assert "output [1]" in [row.name for row in result.rows]


def test_compiled():
    """In one graph, with the scores if they are used and without if not."""
    for used in (True, False):
        torch._dynamo.reset()
        module = Parent() if used else bridge()
        swap(module)
        x = inputs()
        graphs = []

        def backend(graph, example_inputs, graphs=graphs):
            graphs.append(graph)
            return graph.forward

        def compiled_backend(graph, example_inputs, backend=backend):
            from torch._dynamo.backends.common import aot_autograd

            return aot_autograd(fw_compiler=backend)(graph, example_inputs)

        def run(x, module=module, used=used):
            out = module(x)
            return out if used else out[0]

        with torch.no_grad():
            expected = run(x)
            out = torch.compile(run, fullgraph=True, backend=compiled_backend)(x)
        torch.testing.assert_close(out, expected)
        (graph,) = graphs
        shapes = [tuple(n.meta["val"].shape) for n in graph.graph.nodes if hasattr(n.meta.get("val"), "shape")]
        assert ((2, 2, 3, 5, 7) in shapes) is used


def test_compiled_parts_outside():
    """Scores formed later that come into a compiled function."""
    torch._dynamo.reset()
    module, hyper = bridge(), layout.HyperFunc(16, 12, -1)
    x = inputs()
    tokens, scores = module(x)
    expected = hyper((tokens, scores.mean(1)))
    swap(module)
    tokens, scores = module(x)
    assert isinstance(scores, LaterTensor)
    compiled = torch.compile(lambda t, s: hyper((t, s.mean(1))), backend="eager")
    torch.testing.assert_close(compiled(tokens, scores), expected)


def test_exported_inside_a_block():
    block = layout.DnaBlock(12, 12, 2, 16, 3).eval()
    swap(block)
    x = inputs()
    program = torch.export.export(block, (x,))
    torch.testing.assert_close(program.module()(x), block(x))
    parent = Parent()
    swap(parent)
    program = torch.export.export(parent, (x,))
    torch.testing.assert_close(program.module()(x), parent(x))
