"""What holds for a swapped module of every family: its names, its modes, its gradients, and the way back."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import types

import pytest
import torch
from torch import nn
from torch.autograd.functional import jacobian
from torch.nn.attention import SDPBackend, sdpa_kernel

import mvkernels
from mvkernels.swap import swap
from mvkernels.swap.engine import unswap
from mvkernels.swap.report import original_of
from tests.swap.every_family import EVERY, cast, tensor

DOUBLE = torch.float64


@pytest.fixture(params=EVERY)
def example(request):
    return EVERY[request.param]


def every_tensor(result) -> list[torch.Tensor]:
    """All that a module returns, formed if it was not yet."""
    results = result if isinstance(result, tuple) else (result,)
    return [getattr(t, "tensor", t) for t in results if t is not None]


def test_the_class_keeps_its_name(example):
    module = example.make()
    kind, text = type(module), repr(module)
    signature = inspect.signature(kind.forward)
    assert swap(module).count == 1
    swapped = type(module)
    assert original_of(module) is not None and isinstance(module, kind)
    assert (swapped.__name__, swapped.__qualname__, swapped.__module__) == (
        kind.__name__,
        kind.__qualname__,
        kind.__module__,
    )
    assert repr(module) == text and inspect.signature(swapped.forward) == signature


class OfATuple(nn.Sequential):
    def forward(self, x, tokens):
        return self[0]((x, tokens))


def test_a_symbolic_trace_says_so(example, caplog):
    """Whether or not the original can be traced: its forward is what is tried."""
    module, twin = example.make(), example.make()
    swap(module)
    answers = []
    for each in (module, twin):
        kind = OfATuple if isinstance(example.inputs(), tuple) else nn.Sequential
        try:
            answers.append([node.op for node in torch.fx.symbolic_trace(kind(each)).graph.nodes])
        except (torch.fx.proxy.TraceError, TypeError) as error:
            answers.append(str(error))
    assert answers[0] == answers[1]
    said = [record.getMessage().split(": ")[1] for record in caplog.records if record.name == "mvkernels"]
    assert said == ["torch.fx is tracing it"]


@pytest.mark.core
def test_copies_and_pickles_stay_swapped(example):
    module, x = example.make(), example.inputs()
    swap(module, backend="reference")
    expected = tensor(module(x))
    saved = io.BytesIO()
    torch.save(module, saved)
    saved.seek(0)
    copies = [copy.deepcopy(module), copy.copy(module), torch.load(saved, weights_only=False)]
    copies += [pickle.loads(pickle.dumps(module, protocol)) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]
    for other in copies:
        assert type(other) is type(module) and original_of(other) is not None
        assert swap(other).entries[0].reason == "already swapped"
        assert torch.equal(tensor(other(x)), expected)


def test_the_answer_does_not_depend_on_the_mode(example):
    for settings in ({}, example.random):
        answers = []
        for training in (False, True):
            module = example.make(**settings)
            module.train(training)
            answers.append(swap(module).entries)
        assert answers[0] == answers[1] and answers[0][0].swapped


@pytest.mark.parametrize("name", [name for name, example in EVERY.items() if example.random])
def test_what_training_draws_is_drawn_as_before(name):
    """Drop path, and dropout on the attention probabilities: such a call is the original's."""
    example = EVERY[name]
    module, x = example.make(**example.random), example.inputs(batch=4)
    module.train()
    twin = copy.deepcopy(module)
    assert swap(module).count == 1
    outputs = []
    for each in (module, twin):
        torch.manual_seed(0)
        outputs.append(tensor(each(x)))
    assert torch.equal(*outputs)
    module.eval()
    twin.eval()
    torch.testing.assert_close(tensor(module(x)), tensor(twin(x)), rtol=1e-4, atol=1e-4)


def test_another_backend_takes_effect(example):
    """And is undone by the report of the call that chose it."""
    module, x = example.make().double(), example.inputs(batch=1, dtype=DOUBLE)
    first = swap(module, backend="cuda")
    with pytest.raises(mvkernels.BackendUnavailable):
        module(x)
    second = swap(module, backend="reference")
    assert [(e.swapped, e.reason) for e in second.entries] == [(True, "already swapped, now with backend reference")]
    assert second.count == 0
    module(x)
    assert swap(module).entries[0].reason == "already swapped"
    assert swap(module, only=[], backend="cuda").entries[0].reason == "already swapped"
    module(x)
    second.restore()
    with pytest.raises(mvkernels.BackendUnavailable):
        module(x)
    third = swap(module, backend="auto")
    module(x)
    first.restore()
    third.restore()
    assert original_of(module) is None and "mvk_backend" not in module.__dict__


def test_reports_undo_their_own_call_in_any_order(example):
    def backend(module):
        return vars(module if "mvk_original" in dir(type(module)) else module.processor).get("mvk_backend")

    module = example.make()
    first, second, third = swap(module), swap(module, backend="reference"), swap(module, backend="cuda")
    second.restore()
    assert backend(module) == "cuda"
    assert [(e.swapped, e.reason) for e in second.entries] == [(True, "already swapped")]
    third.restore()
    assert backend(module) is None and original_of(module) is not None
    second = swap(module, backend="reference")
    first.restore()
    assert original_of(module) is None
    again, third = swap(module, backend="auto"), swap(module, backend="cuda")
    second.restore()
    first.restore()
    assert backend(module) == "cuda" and original_of(module) is not None
    assert [(e.swapped, e.reason) for e in third.entries] == [(True, "already swapped, now with backend cuda")]
    unswap(module)
    fourth = swap(module, backend="reference")
    again.restore()
    third.restore()
    assert backend(module) == "reference" and fourth.count == 1
    assert all(not e.swapped or e.reason == "already swapped" for e in (*again.entries, *third.entries))
    fourth.restore()
    assert original_of(module) is None and "0 of 1 swapped" in str(fourth)


def test_second_derivatives_with_the_reference(example):
    module, x = settled(example.make().double()), example.inputs(batch=1, dtype=DOUBLE)
    twin = copy.deepcopy(module)
    swap(module)
    swap(module, backend="reference")
    found = []
    for each in (module, twin):
        leaves = cast(x, lambda t: t.clone().requires_grad_())
        leaf = leaves if isinstance(leaves, torch.Tensor) else leaves[0]
        (gradient,) = torch.autograd.grad(tensor(each(leaves)).square().sum(), leaf, create_graph=True)
        found += torch.autograd.grad(gradient.square().sum(), leaf)
    # Some originals compute in float32, whatever they are given.
    difference = (found[0] - found[1]).detach().abs().max()
    assert float(difference) <= 1e-4 * float(found[1].detach().abs().max())


def test_a_restored_report_says_so(example):
    module = example.make()
    report = swap(module)
    assert report.count == 1 and "1 of 1 swapped" in str(report)
    report.restore()
    assert report.count == 0 and "0 of 1 swapped" in str(report) and "restored" in str(report)
    assert [(e.swapped, e.reason) for e in report.entries] == [(False, "restored")]


def test_restore_keeps_the_class_that_others_made(example):
    module, x = example.make(), example.inputs()
    expected = tensor(module(x))
    own = type(module)
    report = swap(module)
    swapped = type(module)

    class Doubled(swapped):
        def forward(self, *args, **kwargs):
            result = super().forward(*args, **kwargs)
            return (2 * result[0], *result[1:]) if isinstance(result, tuple) else 2 * result

        @property
        def by_its_class(self):
            return super().training

    module.__class__ = Doubled
    torch.testing.assert_close(tensor(module(x)), 2 * expected, rtol=1e-3, atol=1e-3)
    report.restore()
    assert original_of(module) is None and not hasattr(type(module), "mvk_original")
    assert type(module).__name__ == "Doubled" and type(module).__bases__ == (own,)
    assert torch.equal(tensor(module(x)), 2 * expected)
    with pytest.raises(AttributeError):  # super() has no instance attributes, but it is found
        module.by_its_class  # noqa: B018


def test_restore_after_a_parametrization(example):
    """Of a parameter of the module itself, where it has one, else of one that it is given."""
    module, x = example.make(), example.inputs()
    if not module._parameters:
        module.register_parameter("own", nn.Parameter(torch.ones(2)))
    name = next(iter(module._parameters))
    twin = copy.deepcopy(module)
    report = swap(module)
    for each in (module, twin):
        nn.utils.parametrize.register_parametrization(each, name, nn.Tanh())
    report.restore()
    assert nn.utils.parametrize.is_parametrized(module, name) and original_of(module) is None
    assert torch.equal(getattr(module, name), getattr(twin, name))
    assert torch.equal(tensor(module(x)), tensor(twin(x)))
    nn.utils.parametrize.remove_parametrizations(module, name)
    assert type(module) is type(example.make())


@pytest.mark.parametrize("wrap", ["method", "accelerate"])
def test_restore_while_somebody_keeps_the_forward(example, wrap):
    """accelerate keeps the bound method and puts a function of its own on the module, which stays."""
    module, x = example.make(), example.inputs()
    expected = tensor(module(x))
    report = swap(module)
    kept = module.forward
    if wrap == "accelerate":
        hooks = pytest.importorskip("accelerate.hooks")
        hooks.add_hook_to_module(module, hooks.ModelHook())
    else:
        module.forward = types.MethodType(lambda self, *args: kept(*args), module)
    torch.testing.assert_close(tensor(module(x)), expected, rtol=1e-3, atol=1e-3)
    report.restore()
    assert "forward" in module.__dict__
    assert torch.equal(tensor(module(x)), expected)


def test_on_the_meta_device(example):
    module, x = example.make(), cast(example.inputs(), lambda t: t.to("meta"))
    module.to("meta")
    expected = every_tensor(module(x))
    assert swap(module).count == 1
    with torch.autocast("cpu", enabled=False):
        actual = every_tensor(module(x))
    assert [(t.shape, t.dtype, t.device) for t in actual] == [(t.shape, t.dtype, t.device) for t in expected]


def settled(module: nn.Module) -> nn.Module:
    """Without random draws, and with attention that PyTorch can differentiate however it is asked."""
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        if hasattr(part, "fused_attn"):
            part.fused_attn = False
    return module


class WithNorm(nn.Module):
    """Batch norm, then the module: PyTorch's batch norm minds how the gradient lies in memory."""

    def __init__(self, module: nn.Module, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, affine=False)
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.5, 2.0)
        self.module = module

    def forward(self, x):
        if isinstance(x, tuple):
            return tensor(self.module((self.norm(x[0]), *x[1:])))
        return tensor(self.module(self.norm(x) if x.dim() == 4 else x))


@sdpa_kernel(SDPBackend.MATH)  # the one that torch.func can differentiate for a bias
@pytest.mark.parametrize("layout", ["channels_first", "channels_last"])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_vectorized_gradients(example, training, batch, layout):
    module, x = settled(example.make().double()), example.inputs(batch=batch, dtype=DOUBLE)
    first = x if isinstance(x, torch.Tensor) else x[0]
    channels = first.shape[1]
    model = WithNorm(module, channels).double()
    if layout == "channels_last":
        model.to(memory_format=torch.channels_last)
        x = cast(x, lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t)
    model.train(training)
    twin = copy.deepcopy(model)
    assert swap(model).count == 1
    found = []
    for each in (model, twin):
        leaves = cast(x, lambda t: t.clone(memory_format=torch.preserve_format).requires_grad_())
        wanted = [leaves] if isinstance(leaves, torch.Tensor) else [*leaves]
        wanted += [p for p in each.parameters() if p.requires_grad]
        out = each(leaves)
        cotangents = torch.randn(3, *out.shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(1))
        one_by_one = zip(*(torch.autograd.grad(out, wanted, c, retain_graph=True) for c in cotangents))
        found.append([torch.stack(grads) for grads in one_by_one])
        found.append([*torch.autograd.grad(out, wanted, cotangents, is_grads_batched=True)])

        def few(t, each=each, rest=leaves):
            return each(t if isinstance(rest, torch.Tensor) else (t, *rest[1:])).flatten()[:4]

        found[-1].append(jacobian(few, wanted[0].detach(), vectorize=True))
        found[-2].append(jacobian(few, wanted[0].detach()))
        if not training:  # running statistics are changed in place, which torch.func refuses
            found[-1].append(torch.func.jacrev(few)(wanted[0].detach()))
            found[-2].append(found[-2][-1])
            grad = torch.func.grad(lambda t, w, few=few: (few(t) * w).sum())
            weights = torch.eye(4, dtype=DOUBLE)
            found[-1].append(torch.func.vmap(grad, (None, 0))(wanted[0].detach(), weights))
            found[-2].append(found[-2][-1].reshape(4, *wanted[0].shape))
    tolerance = (
        1e-9 if example.adapter.startswith(("authors", "cvnets", "transformers", "torchvision", "timm_mob")) else 1e-4
    )
    for name, others in (("against the original", found[2]), ("batched", found[1]), ("original batched", found[3])):
        for expected, actual in zip(found[0], others):
            size = float(expected.detach().abs().max()) + 1e-3
            assert float((actual - expected).detach().abs().max()) <= tolerance * size, name
