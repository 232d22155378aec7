"""What the operators for inference can do beyond their ops, for whole models: gates, dynamic ReLUs, hidden maps."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from mvkernels import testing
from mvkernels.ops.common.activations import ACTIVATIONS, CODES
from mvkernels.ops.inverted_residual import operators as inverted_residual
from mvkernels.ops.pointwise import operators as pointwise
from tests.ops.bridges import assert_ok
from tests.ops.inference import CHANNELS, SEEDS, SIDES, STRIDES, everywhere, make_map, needs_cpp


def bend(x, slopes):
    """Dynamic ReLU."""
    first, second = slopes[..., None, None].unbind(1)
    return torch.maximum(x * first, x * second)


def formula(activations, stride, *given):
    """Of hidden maps: what the operator does, in PyTorch, for a dtype."""

    def of(dtype):
        x, expand, expand_bias, depthwise, depthwise_bias, project, project_bias, before, after = (
            None if t is None else t.to(dtype) for t in given
        )
        first, second = (ACTIVATIONS[name] for name in activations)
        if expand is not None:
            x = first(F.conv2d(x, expand, expand_bias))
            x = x if before is None else bend(x, before)
        x = second(F.conv2d(x, depthwise, depthwise_bias, stride, depthwise.shape[-1] // 2, groups=len(depthwise)))
        x = x if after is None else bend(x, after)
        return {"output": x if project is None else F.conv2d(x, project, project_bias)}

    return of


@st.composite
def blocks(draw):
    generator = torch.Generator().manual_seed(draw(SEEDS))
    batch, inputs, hidden, outputs = draw(st.integers(1, 3)), draw(CHANNELS), draw(CHANNELS), draw(CHANNELS)
    kernel, stride, expands, projects = (
        draw(st.sampled_from(choices)) for choices in ((3, 5), (1, 2), (True, False), (True, False))
    )
    hidden = hidden if expands else inputs

    def normal(*shape):
        return torch.randn(shape, generator=generator) * (shape[1] * shape[2] ** 2) ** -0.5

    def slopes():
        return torch.randn(batch, 2, hidden, generator=generator) if draw(st.booleans()) else None

    x = make_map((batch, inputs, draw(SIDES), draw(SIDES)), draw(st.sampled_from(STRIDES)), generator)
    weights = [
        *((normal(hidden, inputs, 1, 1), torch.randn(hidden, generator=generator)) if expands else (None, None)),
        *(normal(hidden, 1, kernel, kernel), torch.randn(hidden, generator=generator)),
        *((normal(outputs, hidden, 1, 1), torch.randn(outputs, generator=generator)) if projects else (None, None)),
    ]
    activations = [draw(st.sampled_from([None, "relu6", "silu"])) for _ in range(2)]
    return x, weights, stride, activations, slopes() if expands else None, slopes()


@pytest.mark.core
@everywhere
@settings(max_examples=150, deadline=None, derandomize=True)
@given(block=blocks())
def test_inverted_residuals_with_slopes_and_without_a_projection(instruction_set, block):
    x, weights, stride, activations, before, after = block
    packed = inverted_residual.pack(*weights)
    assert packed.shape == (inverted_residual.packed_size(weights[0], weights[2], weights[4]),)
    outputs = 0 if weights[4] is None else weights[4].shape[0]
    sizes = (weights[2].shape[0], outputs, weights[2].shape[2], weights[0] is not None)
    with testing.poisoned():
        out = inverted_residual.forward(
            *(x, packed, *sizes, stride, CODES[activations[1]], False, CODES[activations[0]], before, after)
        )
    measure = testing.Yardstick(formula(activations, stride, x, *weights, before, after), torch.float32)
    assert_ok(measure.compare({"output": out}))
    fake = inverted_residual._fake(x.to("meta"), None, *sizes, stride)
    assert fake.stride() == out.stride() and fake.shape == out.shape


@everywhere
@settings(max_examples=100, deadline=None, derandomize=True)
@given(data=st.data(), seed=SEEDS, inputs=CHANNELS, outputs=CHANNELS, residual=st.booleans(), shifted=st.booleans())
def test_products_of_gated_maps(instruction_set, data, seed, inputs, outputs, residual, shifted):
    generator = torch.Generator().manual_seed(seed)
    shape = (data.draw(st.integers(1, 3)), inputs, data.draw(SIDES), data.draw(SIDES))
    x = make_map(shape, data.draw(st.sampled_from(STRIDES)), generator)
    gate = torch.rand((shape[0], 3, shape[1]) if shifted else shape[:2], generator=generator)
    weight, bias = torch.randn(outputs, inputs, generator=generator) * inputs**-0.5, torch.randn(outputs)
    plus = torch.randn((shape[0], outputs, *shape[2:]), generator=generator) if residual else None
    packed = pointwise.pack(weight, bias, False, None, None)
    with testing.poisoned():
        out = pointwise.forward(x, packed, outputs, False, 0.0, CODES["relu"], plus, gate)

    def exact(dtype):
        factors = gate.to(dtype)[..., None, None]
        given = x.to(dtype)
        given = (given - factors[:, 1]) * factors[:, 0] + factors[:, 2] if shifted else given * factors
        made = F.conv2d(given, weight.to(dtype)[..., None, None], bias.to(dtype))
        return {"output": made.relu() + (0 if plus is None else plus.to(dtype))}

    assert_ok(testing.Yardstick(exact, torch.float32).compare({"output": out}))


@needs_cpp
@pytest.mark.parametrize(
    "wrong", ["before without expansion", "batch", "channels", "kinds", "gate", "gate of two", "gate and norm"]
)
def test_what_does_not_fit_is_refused(wrong):
    x = torch.randn(2, 8, 5, 5)
    weights = (None, None, torch.randn(8, 1, 3, 3), None, None, None)
    slopes = {"batch": (1, 2, 8), "channels": (2, 2, 9), "kinds": (2, 3, 8)}
    packed = inverted_residual.pack(*weights)
    product = pointwise.pack(torch.randn(4, 8), None, wrong == "gate and norm", None, None)
    with pytest.raises(RuntimeError):
        if wrong.startswith("gate"):
            gate = torch.rand(*{"gate": (2, 7), "gate of two": (2, 2, 8), "gate and norm": (2, 8)}[wrong])
            pointwise.forward(x, product, 4, wrong == "gate and norm", 0.0, 0, None, gate)
        elif wrong in slopes:
            given = torch.randn(slopes[wrong])
            inverted_residual.forward(x, packed, 8, 0, 3, False, 1, 0, False, -1, None, given)
        else:
            inverted_residual.forward(x, packed, 8, 0, 3, False, 1, 0, False, -1, torch.randn(2, 2, 8), None)
