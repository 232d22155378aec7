"""What users of PyTorch do to a model, asked of every registered op and of modules built on them."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.func import functional_call, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from mvkernels import nn as fused
from mvkernels import testing
from mvkernels.dispatch.registry import OPS
from mvkernels.swap import swap
from tests.ops import test_contract_all as contract
from tests.ops.test_contract_all import differentiable, native, tensors_of
from tests.swap.conftest import randomise, timm_block, transformers_block

NATIVE, NATIVE64 = differentiable(native()), differentiable(native(torch.float64))


def example(name, dtype=torch.float32, batch=2, size=(4, 6)):
    """The contract's example, its lists of tensors and its 4-D maps of this dtype and size too."""
    arguments = contract.example(name, dtype, batch, size)
    for key, value in arguments.items():
        if isinstance(value, (list, tuple)):
            arguments[key] = type(value)(v.to(dtype) if isinstance(v, torch.Tensor) else v for v in value)
        elif isinstance(value, torch.Tensor) and key in OPS[name].maps and value.dim() == 4:
            generator = torch.Generator().manual_seed(0)
            arguments[key] = torch.randn(batch, value.shape[1], *size, generator=generator).to(dtype)
    return arguments


def call(name, arguments, backend):
    return OPS[name].function(**arguments, backend=backend)


def leaves(arguments):
    return {key: value.detach().clone().requires_grad_() for key, value in tensors_of(arguments).items()}


COTANGENTS = {
    "transposed": lambda g: g.transpose(-1, -2).contiguous().transpose(-1, -2),
    "sliced": lambda g: torch.stack((g, torch.full_like(g, float("nan"))), dim=-1)[..., 0],
    "expanded": lambda g: g[..., :1, :1].expand(g.shape),
    "negative offset": lambda g: torch.cat((torch.full_like(g[:1], float("nan")), g))[1:],
}


@pytest.mark.core
@pytest.mark.parametrize(("name", "backend"), NATIVE64)
def test_cotangents_of_any_strides(name, backend):
    arguments = example(name, torch.float64)
    inputs = leaves(arguments)
    out = call(name, testing.with_tensors(arguments, inputs), backend)
    dense = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(0))
    for kind, lay in COTANGENTS.items():
        cotangent = lay(dense)
        found = torch.autograd.grad(out, list(inputs.values()), cotangent, retain_graph=True)
        wanted = torch.autograd.grad(out, list(inputs.values()), cotangent.contiguous(), retain_graph=True)
        for a, b in zip(found, wanted):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, msg=kind)


@pytest.mark.parametrize(("name", "backend"), NATIVE)
@pytest.mark.parametrize("reentrant", [False, True], ids=["modern", "reentrant"])
def test_checkpointing(name, backend, reentrant):
    arguments = example(name)
    grads = []
    for kept in (True, False):
        inputs = leaves(arguments)
        names = list(inputs)

        def block(*values, names=names):
            return call(name, testing.with_tensors(arguments, dict(zip(names, values))), backend).sin()

        values = list(inputs.values())
        out = block(*values) if kept else checkpoint(block, *values, use_reentrant=reentrant)
        out.square().sum().backward()
        grads.append([v.grad for v in values])
    for a, b in zip(*grads):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", OPS)
def test_vmap_is_a_loop(name):
    arguments = example(name, torch.float64)
    first = next(iter(tensors_of(arguments)))
    stacked = torch.stack([arguments[first] * scale for scale in (0.5, 1.0, 2.0)])

    def one(value):
        return OPS[name].function(**(arguments | {first: value}))

    found = vmap(one)(stacked)
    for row, value in zip(found, stacked):
        torch.testing.assert_close(row, OPS[name].function(**(arguments | {first: value}), backend="reference"))
    with pytest.raises(Exception) as caught:  # one clear error, and no wrong result
        vmap(lambda value: call(name, arguments | {first: value}, "cpp"))(stacked)
    assert name in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "backend"), NATIVE)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_a_scaled_step_under_autocast(name, backend, dtype):
    inputs = leaves(example(name))
    arguments = testing.with_tensors(example(name), inputs)
    optimizer = torch.optim.SGD(list(inputs.values()), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    before = {key: value.detach().clone() for key, value in inputs.items()}
    with torch.autocast("cpu", dtype=dtype):
        loss = call(name, arguments, backend).float().square().mean()
    scaler.scale(loss).backward()
    assert all(v.grad.dtype == torch.float32 for v in inputs.values())
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 8.0  # nothing overflowed, the step was taken
    assert any(not torch.equal(before[key], value) for key, value in inputs.items())


@pytest.mark.parametrize(("name", "backend"), NATIVE64)
def test_mixed_requires_grad(name, backend):
    """Every subset of two: gradients for these, none for the others, the same as when all are wanted."""
    arguments = example(name, torch.float64)
    every = leaves(arguments)
    call(name, testing.with_tensors(arguments, every), backend).square().sum().backward()
    names = list(every)
    for position, one in enumerate(names):
        chosen = {one, names[(position + 1) % len(names)]}  # one alone where there is no other
        some = {key: value.detach().clone().requires_grad_(key in chosen) for key, value in every.items()}
        call(name, testing.with_tensors(arguments, some), backend).square().sum().backward()
        for key, value in some.items():
            assert (value.grad is not None) == (key in chosen)
            if key in chosen:
                torch.testing.assert_close(value.grad, every[key].grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "recorded"),
    [(name, True) for name in OPS] + [(name, False) for name in OPS if not OPS[name].has_backward("cpp")],
)
def test_no_recompilation_past_the_first_dynamic_one(name, recorded):
    """Sizes that change without being announced: one static graph, one dynamic graph, and no more.

    Without a gradient too where the kernel is taken only then."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(
        lambda arguments: OPS[name].function(**arguments).sin(), fullgraph=True, backend="aot_eager"
    )
    for batch, size in ((5, (10, 8)), (3, (12, 14)), (4, (6, 16)), (7, (18, 10))):
        arguments = example(name, batch=batch, size=size)
        if not recorded:
            compiled(arguments)
            continue
        compiled(testing.with_tensors(arguments, leaves(arguments))).square().sum().backward()
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] <= 2 and not counters["graph_break"], counters
    torch._dynamo.reset()


class _NoQuestions(TorchDispatchMode):
    """Raises where a device is asked for a number, or for sizes that depend on values: no CUDA graph holds that."""

    ASKS = frozenset(
        f"aten::{name}"
        for name in ("_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "_unique2", "bincount")
    )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.name().partition(".")[0] not in self.ASKS, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("name", "backend"), contract.ALL)
def test_no_op_waits_for_the_device(name, backend):
    arguments = example(name, batch=1, size=(2, 4))
    inputs = leaves(arguments)
    with _NoQuestions(), torch.set_grad_enabled(OPS[name].has_backward(backend)):
        out = call(name, testing.with_tensors(arguments, inputs), backend)
        if out.requires_grad:
            torch.autograd.grad(out, list(inputs.values()), torch.ones_like(out))
    with pytest.raises(AssertionError, match="waits for the device"), _NoQuestions():
        out.sum().item()


def test_no_module_waits_for_the_device(module):
    model, inputs = module
    with _NoQuestions():
        model(*inputs).mean().backward()


def _patch_transformer():
    return fused.PatchTransformer(8, depth=1, heads=2), (torch.randn(2, 8, 6, 4),)


def _mobile_to_former():
    return fused.MobileToFormer(8, 12), (torch.randn(2, 8, 6, 4), torch.randn(2, 3, 12))


def _former_to_mobile():
    return fused.FormerToMobile(8, 12), (torch.randn(2, 8, 6, 4), torch.randn(2, 3, 12))


def _lite_mla():
    return fused.LiteMLA(16, head_dim=8, scales=(3,)), (torch.randn(2, 16, 6, 4),)


def _swapped(block):
    block = block()
    assert swap(block).count == 1
    return block, (torch.randn(2, 12, 8, 12),)


MODULES = {
    "PatchTransformer": _patch_transformer,
    "MobileToFormer": _mobile_to_former,
    "FormerToMobile": _former_to_mobile,
    "LiteMLA": _lite_mla,
    "transformers": lambda: _swapped(transformers_block),
    "timm": lambda: _swapped(timm_block),
}


@pytest.fixture(params=MODULES)
def module(request):
    torch.manual_seed(0)
    model, inputs = MODULES[request.param]()
    return randomise(model), inputs


def test_copies_are_equal_and_independent(module):
    model, inputs = module
    with torch.no_grad():
        expected = model(*inputs)
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert type(copied) is type(model)
            assert torch.equal(copied(*inputs), expected)
            next(copied.parameters()).add_(1.0)
            assert torch.equal(model(*inputs), expected)


def test_functional_call_uses_the_weights_it_is_given(module):
    model, inputs = module
    other = {name: value.detach() * 1.5 for name, value in model.named_parameters()}
    changed = copy.deepcopy(model)
    changed.load_state_dict(model.state_dict() | other)
    with torch.no_grad():
        found = functional_call(model, other, inputs)
        torch.testing.assert_close(found, changed(*inputs))
        assert not torch.allclose(found, model(*inputs))
    grads = torch.func.grad(lambda weights: functional_call(model, weights, inputs).square().mean())(other)
    changed(*inputs).square().mean().backward()
    for name, parameter in changed.named_parameters():
        torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-3, atol=1e-4)


def test_frozen_weights_stay_and_the_others_learn(module):
    model, inputs = module
    parameters = list(model.parameters())
    for parameter in parameters[::2]:
        parameter.requires_grad_(False)
    model(*inputs).square().mean().backward()
    assert all((p.grad is None) == (not p.requires_grad) for p in parameters)


def test_a_module_in_a_checkpoint(module):
    model, inputs = module
    inputs = tuple(x.requires_grad_() for x in inputs)
    out = model(*inputs)
    wanted = torch.autograd.grad(out.square().mean(), [*inputs, *model.parameters()])
    found = torch.autograd.grad(
        checkpoint(model, *inputs, use_reentrant=False).square().mean(), [*inputs, *model.parameters()]
    )
    for a, b in zip(found, wanted):
        assert torch.equal(a, b)


def test_a_compiled_module_takes_other_sizes_without_recompiling(module):
    model, inputs = module
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for batch, height, width in ((2, 12, 16), (3, 20, 8), (5, 16, 28)):
        sized = [
            torch.randn(batch, x.shape[1], height, width) if x.dim() == 4 else x[:1].expand(batch, -1, -1)
            for x in inputs
        ]
        out, expected = compiled(*sized), model(*sized)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
        out.square().mean().backward()
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] <= 2 and not counters["graph_break"], counters
    torch._dynamo.reset()


def test_state_is_what_the_module_says(module):
    """A state_dict round trip through bytes changes nothing."""
    model, inputs = module
    fresh = copy.deepcopy(model)
    randomise(fresh, seed=5)
    fresh.load_state_dict(pickle.loads(pickle.dumps(model.state_dict())))
    with torch.no_grad():
        assert torch.equal(fresh(*inputs), model(*inputs))
        assert isinstance(fresh, nn.Module)
