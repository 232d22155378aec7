"""The element-wise kernels around attention, and who may be replaced by them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from mvkernels import testing
from mvkernels.dispatch import extension
from mvkernels.ops.common import activations
from mvkernels.swap.folding import elementwise

pytestmark = pytest.mark.skipif(extension.module is None, reason="the C++ extension is not built")

ACTIVATIONS = list(activations.ACTIVATIONS.values())  # by number
LAYOUTS = [torch.contiguous_format, torch.channels_last]
INSTRUCTION_SETS = extension.module.instruction_sets() if extension.module else []


def on(instruction_set, kernel, *arguments):
    before = extension.module.set_instruction_set(instruction_set)
    try:
        with testing.poisoned():
            return kernel(*arguments)
    finally:
        extension.module.set_instruction_set(before)


def normalised(x, mean, var, weight, bias, conv_bias, eps, activation, dtype):
    x, mean, var, weight, bias, conv_bias = (
        t if t is None else t.to(dtype) for t in (x, mean, var, weight, bias, conv_bias)
    )
    x = x if conv_bias is None else x + conv_bias.view(-1, 1, 1)
    return ACTIVATIONS[activation](F.batch_norm(x, mean, var, weight, bias, eps=eps))


@st.composite
def maps(draw):
    sizes = [draw(st.integers(1, most)) for most in (3, 40, 9, 40)]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9)))
    x = 4 * torch.randn(sizes, generator=generator)
    return x.contiguous(memory_format=draw(st.sampled_from(LAYOUTS))), generator


@settings(max_examples=150, deadline=None)
@given(maps(), st.integers(0, len(ACTIVATIONS) - 1), st.sampled_from(INSTRUCTION_SETS), st.tuples(*[st.booleans()] * 3))
def test_norm_and_activation(made, activation, instruction_set, given_parameters):
    x, generator = made
    mean, weight, bias, conv_bias = torch.randn(4, x.shape[1], generator=generator)
    var = torch.rand(x.shape[1], generator=generator) + 0.1
    weight, bias, conv_bias = (t if g else None for t, g in zip((weight, bias, conv_bias), given_parameters))
    norm = (mean, var, weight, bias, conv_bias, 1e-3, activation)
    out = on(instruction_set, elementwise.norm_activation, x, *norm)
    assert out.stride() == x.stride()
    wanted = normalised(x, *norm, torch.float64)
    error = testing.max_error(normalised(x, *norm, torch.float32), wanted)
    # Of a few elements the baseline may have rounded every one to the nearest.
    assert testing.max_error(out, wanted) <= 2 * error + 1e-6 + 2e-7 * float(wanted.abs().max())
    inside = x.clone()
    on(instruction_set, elementwise.norm_activation_, inside, *norm)
    assert torch.equal(inside, out)


@settings(max_examples=100, deadline=None)
@given(maps(), st.sampled_from(INSTRUCTION_SETS))
def test_pooled_difference(made, instruction_set):
    x, _ = made
    wanted = F.avg_pool2d(x.double(), 3, 1, 1, count_include_pad=False) - x.double()
    out = on(instruction_set, elementwise.pooled_difference, x)
    assert out.stride() == x.stride()
    assert testing.max_error(out, wanted) <= 3e-6


@settings(max_examples=100, deadline=None)
@given(maps(), st.sampled_from(INSTRUCTION_SETS), st.booleans())
def test_pooled_difference_with_the_sum_behind_it(made, instruction_set, of_each_picture):
    x, generator = made
    # A part of a larger tensor.
    factor = torch.randn((x.shape[0] if of_each_picture else 1, 2, x.shape[1]), generator=generator)[:, 0]
    out = on(instruction_set, elementwise.pooled_difference, x, factor)
    assert out.stride() == x.stride()
    assert testing.max_error(out, pooled_sum(x, factor)) <= 3e-6 * (1 + float(factor.abs().max()))


def pooled_sum(x, factor):
    pooled = F.avg_pool2d(x.double(), 3, 1, 1, count_include_pad=False) - x.double()
    return x.double() + factor.double()[..., None, None] * pooled


@settings(max_examples=100, deadline=None)
@given(maps(), st.sampled_from(INSTRUCTION_SETS), st.sampled_from([0.0, 3.3, -1e4]), st.floats(0.01, 300.0))
def test_pooled_differences_of_maps_far_from_zero(made, instruction_set, mean, most):
    """The factors of a norm are large where the deviations are small."""
    x, generator = made
    x = x / most + mean
    of_norm = torch.randn((x.shape[0], 3, x.shape[1]), generator=generator) * most
    of_norm[:, 1] = x.mean((1, 2, 3))[:, None]
    out = on(instruction_set, elementwise.pooled_difference, x, of_norm)
    assert out.stride() == x.stride()
    # The deviations times the factors are of some units, whatever `most` is; the sum is rounded once.
    far = (x - of_norm[:, 1, 0, None, None, None]).abs().max() * of_norm[:, 0].abs().max()
    assert testing.max_error(out, pooled_sum(x, of_norm[:, 0])) <= 4e-7 * float(far) + 1.2e-7 * float(out.abs().max())


@settings(max_examples=100, deadline=None)
@given(maps(), st.sampled_from(INSTRUCTION_SETS), st.tuples(st.booleans(), st.booleans()), st.integers(0, 3))
def test_factors_means_and_shifts_of_a_norm_over_pictures(made, instruction_set, given_parameters, kind):
    """Of usual maps, of those far from 0, of constant ones and of one peak among zeros."""
    x, generator = made
    if kind == 1:
        x += 10000
    elif kind == 2:
        x.fill_(12345.6)
    elif kind == 3:
        x.zero_()[0, 0, 0, 0] = 1e4
    weight, bias = (torch.randn(x.shape[1], generator=generator) if g else None for g in given_parameters)
    made = on(instruction_set, elementwise.picture_norm, x, weight, bias, 1e-5)
    assert made.shape == (x.shape[0], 3, x.shape[1])
    factor, mean, shift = made.double()[..., None, None].unbind(1)
    found = (x.double() - mean) * factor + shift
    parameters = (t if t is None else t.double() for t in (weight, bias))
    exact = torch.native_group_norm(x.double(), *parameters, *x.shape[:2], x.shape[2] * x.shape[3], 1, 1e-5)[0]
    # Rounded are the variance, the factor and the shift, and no product with what is far from 0.
    assert testing.max_error(found, exact) <= 4e-7 * float(1 + exact.abs().max())


@pytest.mark.parametrize("activation", range(len(ACTIVATIONS)))
@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
def test_values_at_the_edge(activation, instruction_set):
    """NaN and infinity come out as from PyTorch, or as the limit where that gives NaN; nothing reaches a neighbour."""
    values = [float("nan"), float("inf"), -float("inf"), 1e30, -1e30, 1e-40, -0.0, 90.0, -90.0, 3.0, -3.0]
    x = torch.tensor(values).view(1, 1, 1, -1).expand(1, 2, 5, -1).contiguous()
    one, zero = torch.ones(2), torch.zeros(2)
    out = on(instruction_set, elementwise.norm_activation, x, zero, one, None, None, None, 0.0, activation)
    wanted = ACTIVATIONS[activation](x)
    limit = wanted.isnan() & ~x.isnan()
    torch.testing.assert_close(out[~limit], wanted[~limit], rtol=1e-5, atol=1e-6, equal_nan=True)
    inf = torch.inf
    assert torch.isin(out[limit].nan_to_num(nan=inf, posinf=inf), torch.tensor([inf, 0.0])).all()


def test_threads_divide_nothing_but_units():
    x = torch.randn(2, 48, 33, 35)
    norm = (torch.randn(48), torch.rand(48) + 0.1, None, None, None, 1e-5, 2)
    found = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        of_norm = elementwise.picture_norm(x, None, None, 1e-5)
        pooled = elementwise.pooled_difference(x), elementwise.pooled_difference(x, of_norm)
        found.append((elementwise.norm_activation(x, *norm), of_norm, *pooled))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for some in found[1:] for a, b in zip(found[0], some))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_as_operators(layout):
    x = torch.randn(2, 3, 5, 7).contiguous(memory_format=layout)
    norm = (torch.randn(3), torch.rand(3), None, torch.randn(3), None, 1e-5, 2)
    torch.library.opcheck(elementwise.norm_activation, (x, *norm))
    torch.library.opcheck(elementwise.norm_activation_, (x, *norm))
    torch.library.opcheck(elementwise.pooled_difference, (x,))
    torch.library.opcheck(elementwise.pooled_difference, (x, torch.randn(1, 3)))
    torch.library.opcheck(elementwise.pooled_difference, (x, torch.randn(2, 3, 3)))
    torch.library.opcheck(elementwise.picture_norm, (x, torch.randn(3), None, 1e-5))


def test_raw_operators_refuse_what_they_cannot_index():
    norm = (torch.zeros(4), torch.ones(4), None, None, None, 0.0, 1)
    x = torch.randn(1, 4, 6, 6)
    for bad in (x[..., ::2], x.double(), x[0], x[:, :3]):
        with pytest.raises(RuntimeError):
            elementwise.norm_activation(bad, *norm)
    for bad in (torch.ones(1, 5), torch.ones(2, 4), torch.ones(1, 2, 4), torch.ones(1, 3, 5), torch.ones(1, 8)[:, ::2]):
        with pytest.raises(RuntimeError, match="factors"):
            elementwise.pooled_difference(x, bad)
    with pytest.raises(RuntimeError, match="parameters"):
        elementwise.norm_activation(x, torch.zeros(8)[::2], *norm[1:])


def test_which_activations_are_known():
    tanh, hooked = nn.GELU(approximate="tanh"), nn.SiLU()
    hooked.register_forward_hook(lambda *_: None)
    active = nn.Dropout()
    for modules, number in (
        ((), 0),
        ((nn.Identity(), nn.ReLU(inplace=True)), 1),
        ((nn.Dropout().eval(), nn.SiLU()), 2),
        ((nn.Hardswish(), nn.Identity()), 3),
        ((nn.GELU(),), 4),
        ((tanh,), 6),
        ((hooked,), None),
        ((active, nn.ReLU()), None),
        ((nn.ReLU(), nn.ReLU()), None),
        ((nn.Tanh(),), None),
    ):
        assert elementwise.activation_of(modules) == number, modules


def test_which_poolings_are_known():
    assert not elementwise.not_neighbours(nn.AvgPool2d(3, 1, 1, count_include_pad=False))
    for other in (
        nn.AvgPool2d(3, 1, 1),
        nn.AvgPool2d(3, 1, 0, count_include_pad=False),
        nn.AvgPool2d(3, 2, 1, count_include_pad=False),
        nn.AvgPool2d(5, 1, 2, count_include_pad=False),
        nn.AvgPool2d(3, 1, 1, ceil_mode=True, count_include_pad=False),
        nn.AvgPool2d(3, 1, 1, count_include_pad=False, divisor_override=4),
        nn.MaxPool2d(3, 1, 1),
        None,
    ):
        assert elementwise.not_neighbours(other)
