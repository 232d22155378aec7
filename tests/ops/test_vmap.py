"""Gradients of many cotangents at once, and vmap: what a loop gives, for every op and backend."""

import functools
import warnings

import pytest
import torch
from torch._vmap_internals import _vmap
from torch.autograd.functional import jacobian
from torch.func import vmap
from torch.utils._python_dispatch import TorchDispatchMode

from mvkernels import testing
from mvkernels.dispatch.registry import OPS
from tests.ops.bridges import interpreter
from tests.ops.test_contract_all import TRAINED, call_function, differentiable, example, native, needs, tensors_of

SIZES = [((4, 6), "contiguous"), ((3, 4), "channels_last")]
NATIVE = differentiable(native(torch.float64))


class _Convolutions(TorchDispatchMode):
    """Counts PyTorch's convolutions, which take no axis of no entries."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.convolution.default
        return func(*args, **(kwargs or {}))


@functools.cache
def convolves(name):
    """Whether an op's reference does."""
    with _Convolutions() as mode:
        OPS[name].function(**example(name, batch=1, size=(2, 3)), backend="reference")
    return mode.count > 0


def leaves(name, dtype=torch.float64, **settings):
    arguments = example(name, dtype, **settings)
    inputs = {key: value.detach().clone().requires_grad_() for key, value in tensors_of(arguments).items()}
    for key in set(OPS[name].maps) & set(inputs):  # a clone is dense, a map keeps its strides
        inputs[key] = arguments[key].detach().requires_grad_()
    return testing.with_tensors(arguments, inputs), list(inputs.values())


def check(found, rows):
    for batched, *each in zip(found, *rows):
        torch.testing.assert_close(batched, torch.stack(each), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("name", "backend"), NATIVE)
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(("size", "strides"), SIZES)
def test_gradients_of_many_cotangents_at_once(name, backend, batch, size, strides):
    """By either of PyTorch's vmaps, with no warning of a slow path."""
    arguments, inputs = leaves(name, batch=batch, size=size, strides=strides)
    out = OPS[name].function(**arguments, backend=backend)
    cotangents = torch.randn(3, *out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(0))

    def gradients(cotangent, **settings):
        return torch.autograd.grad(out, inputs, cotangent, retain_graph=True, **settings)

    rows = [gradients(cotangent) for cotangent in cotangents]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(gradients(cotangents, is_grads_batched=True), rows)
        check(vmap(gradients)(cotangents), rows)
        if backend != "reference":  # PyTorch's own convolutions refuse it
            assert [tuple(grad.shape) for grad in vmap(gradients)(cotangents[:0])] == [(0, *v.shape) for v in inputs]
        pairs = torch.stack((cotangents, cotangents.flip(0)))  # two deep
        for found, row in zip(zip(*vmap(vmap(gradients))(pairs)), (rows, rows[::-1])):
            check(found, row)


@pytest.mark.parametrize(("name", "backend"), NATIVE)
@pytest.mark.parametrize("sizes", [(0,), (2, 0), (0, 2), (1, 0, 2)])
@pytest.mark.parametrize("transform", [_vmap, vmap])
def test_gradients_of_no_cotangents(name, backend, sizes, transform):
    """``is_grads_batched=True`` itself asks for the first of them; what it calls gives gradients of no entries."""
    if backend == "reference" and (transform is _vmap or convolves(name)):
        pytest.skip("PyTorch's own softmax and convolutions refuse an axis of no entries")
    arguments, inputs = leaves(name, batch=1)
    out = OPS[name].function(**arguments, backend=backend)
    for again in (False, True):

        def gradients(cotangent, again=again):
            return torch.autograd.grad(out, inputs, cotangent, retain_graph=True, create_graph=again)

        for _ in sizes:
            gradients = transform(gradients)
        found = gradients(torch.randn(*sizes, *out.shape, dtype=out.dtype))
        assert [(g.shape, g.dtype) for g in found] == [((*sizes, *value.shape), value.dtype) for value in inputs]


@interpreter
@pytest.mark.parametrize("name", [name for name in TRAINED if "triton" in OPS[name].why_not])
def test_gradients_of_many_cotangents_at_once_on_triton(name):
    arguments, inputs = leaves(name, torch.float32, batch=1, size=(2, 3))
    out = OPS[name].function(**arguments, backend="triton")
    cotangents = torch.randn(2, *out.shape, generator=torch.Generator().manual_seed(0))

    def gradients(cotangent, **settings):
        return torch.autograd.grad(out, inputs, cotangent, retain_graph=True, **settings)

    rows = [gradients(cotangent) for cotangent in cotangents]
    check(gradients(cotangents, is_grads_batched=True), rows)
    check(vmap(gradients)(cotangents), rows)


@pytest.mark.parametrize(("name", "backend"), NATIVE)
def test_a_vectorized_jacobian(name, backend):
    arguments, inputs = leaves(name, batch=1, size=(2, 3))
    first, *_ = tensors_of(arguments)

    def f(value):
        return OPS[name].function(**testing.with_tensors(arguments, {first: value}), backend=backend).flatten()[:5]

    value = inputs[0].detach()
    torch.testing.assert_close(jacobian(f, value, vectorize=True), jacobian(f, value), rtol=1e-12, atol=1e-12)
    reverse = torch.func.jacrev(lambda v: _unnamed(name, arguments, first, v))
    torch.testing.assert_close(reverse(value), jacobian(f, value), rtol=1e-9, atol=1e-9)


def _unnamed(name, arguments, first, value):
    """A transform chooses the reference by itself, unless a backend is named."""
    return OPS[name].function(**testing.with_tensors(arguments, {first: value})).flatten()[:5]


@pytest.mark.parametrize("name", OPS)
def test_vmap_over_no_entries(name):
    if convolves(name):
        pytest.skip("PyTorch's convolution makes a batch of 0 of no entries, whatever their batch is")
    arguments = example(name, torch.float64, batch=1)
    first, *_ = tensors_of(arguments)
    out = OPS[name].function(**arguments)

    def one(value):
        return OPS[name].function(**testing.with_tensors(arguments, {first: value}))

    value = arguments[first]
    for in_dim in (0, 2):
        none = value.new_empty((*value.shape[:in_dim], 0, *value.shape[in_dim:]))
        found = vmap(one, in_dims=in_dim)(none)
        assert found.shape == (0, *out.shape) and found.dtype == out.dtype


@pytest.mark.parametrize("name", TRAINED)
def test_the_functions_reference_takes_many_cotangents(name):
    arguments, inputs = leaves(name, batch=1, size=(3, 4))
    out = call_function(name, arguments, "reference")
    cotangents = torch.randn(2, *out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(0))

    def gradients(cotangent, **settings):
        return torch.autograd.grad(out, inputs, cotangent, retain_graph=True, **settings)

    rows = [gradients(cotangent) for cotangent in cotangents]
    check(gradients(cotangents, is_grads_batched=True), rows)
    check(vmap(gradients)(cotangents), rows)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("size", [(5, 7), (1, 3)])
def test_vmap_over_any_argument_of_the_reference(name, size):
    """Also on maps that a patch does not divide: the reference writes nothing in place."""
    arguments = example(name, torch.float64, batch=1, size=size)
    for which, value in tensors_of(arguments).items():
        stacked = torch.stack([value * factor for factor in (0.5, 1.0, 2.0)], dim=1)

        def one(value, which=which):
            return OPS[name].function(**testing.with_tensors(arguments, {which: value}), backend="reference")

        found = vmap(one, in_dims=1)(stacked)
        torch.testing.assert_close(found, torch.stack([one(value) for value in stacked.unbind(1)]))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=needs(name, "cpp")) for name in TRAINED if OPS[name].has_backward("cpp")]
)
def test_a_further_derivative_of_many_cotangents_is_refused_too(name):
    arguments, inputs = leaves(name, batch=1)
    out = OPS[name].function(**arguments, backend="cpp")
    cotangents = torch.ones(2, *out.shape, dtype=out.dtype)

    def gradients(cotangent, **settings):
        return torch.autograd.grad(out, inputs, cotangent, create_graph=True, **settings)

    for grads in (
        gradients(cotangents, is_grads_batched=True),
        vmap(gradients)(cotangents),
        vmap(vmap(gradients))(cotangents[None]),
    ):
        for grad in grads:
            with pytest.raises(RuntimeError, match="no second derivative"):
                torch.autograd.grad(grad.sum(), inputs[0], retain_graph=True)
