"""pointwise on any map, layer and norm: its kernel against float64, and its contract."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import layer_norm

import mvkernels
from mvkernels import testing
from mvkernels.dispatch.registry import OPS
from mvkernels.ops.common.activations import ACTIVATIONS
from tests.ops import inference
from tests.ops.bridges import assert_ok
from tests.ops.inference import CHANNELS, SEEDS, SIDES, STRIDES, everywhere, needs_cpp
from tests.ops.inference import pointwise as example

OP = OPS["pointwise"]
# Inputs too whose sums are taken in parts.
INPUTS = st.one_of(CHANNELS, CHANNELS, CHANNELS, st.sampled_from([511, 512, 513, 600, 1030]))
NORMS = (None, (True, True), (True, False), (False, True), (False, False))

normed = pytest.mark.parametrize("norm", NORMS)


@st.composite
def problems(draw):
    """Any map, layer, strides and settings."""
    arguments = example(
        batch=draw(st.integers(1, 3)),
        size=(draw(SIDES), draw(SIDES)),
        inputs=draw(INPUTS),
        outputs=draw(CHANNELS),
        bias=draw(st.booleans()),
        norm=draw(st.sampled_from(NORMS)),
        residual=draw(st.sampled_from([None, *STRIDES])),
        kind=draw(st.sampled_from(STRIDES)),
        seed=draw(SEEDS),
    )
    return {
        **arguments,
        "activation": draw(st.sampled_from(list(ACTIVATIONS))),
        "eps": draw(st.sampled_from([1e-5, 1e-6, 0.1])),
    }


@pytest.mark.core
@everywhere
@settings(max_examples=200, deadline=None, derandomize=True)
@given(arguments=problems())
def test_cpp_on_any_map_layer_and_strides(instruction_set, arguments):
    assert_ok(testing.check(OP, arguments, "cpp"))


@everywhere
@settings(max_examples=60, deadline=None, derandomize=True)
@given(arguments=problems())
def test_the_result_is_the_same_on_two_threads_in_any_batch_and_with_packed_weights(instruction_set, arguments):
    inference.assert_the_same_on_threads_in_batches_and_packed(OP, arguments)


@normed
def test_the_reference_is_pytorchs(norm):
    given = example(norm=norm, residual="contiguous", size=(3, 5))
    given = testing.with_tensors(given, {key: value.double() for key, value in testing.tensors_in(given).items()})
    rows = given["x"].permute(0, 2, 3, 1)
    if norm is not None:
        rows = layer_norm(rows, rows.shape[-1:], *given["norm"], 0.01)
    wanted = (rows @ given["weight"].T + given["bias"]).relu().permute(0, 3, 1, 2) + given["residual"]
    torch.testing.assert_close(OP.reference(**given, eps=0.01, activation="relu"), wanted, rtol=1e-12, atol=1e-12)


@needs_cpp
def test_tokens_are_a_map():
    """As the docstring says, and in place."""
    arguments = example(norm=None)
    tokens = torch.randn(3, 10, 16)
    x = tokens.transpose(1, 2).unsqueeze(2)
    out = OP.function(**arguments | {"x": x}, backend="cpp")
    wanted = tokens @ arguments["weight"].T + arguments["bias"]
    found = out.squeeze(2).transpose(1, 2)
    assert found.is_contiguous()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@everywhere
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@normed
def test_what_is_not_finite_stays_in_its_pixel(instruction_set, value, activation, norm):
    arguments = example(size=(11, 12), inputs=21, outputs=19, norm=norm, residual="contiguous")
    arguments["activation"] = activation
    for which in ("x", "residual"):
        clean = OP.function(**arguments, backend="cpp")
        changed = arguments | {which: arguments[which].clone()}
        changed[which][1, 5, 4, 6] = value
        assert_ok(testing.check(OP, changed, "cpp"))
        out = OP.function(**changed, backend="cpp")
        out[1, :, 4, 6] = clean[1, :, 4, 6]
        assert torch.equal(out, clean)


@everywhere
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", ["weight", "bias", "norm[0]", "norm[1]"])
def test_a_weight_that_is_not_finite(instruction_set, value, which):
    arguments = example(inputs=21, outputs=19)
    weights = testing.tensors_in(arguments)[which].clone()
    weights[3] = value
    assert_ok(testing.check(OP, testing.with_tensors(arguments, {which: weights}), "cpp"))


@everywhere
@pytest.mark.parametrize("activation", ACTIVATIONS)
@normed
def test_large_small_and_constant_maps(instruction_set, activation, norm):
    for factor in (1e-38, 1e-20, 1e-3, 3.3, 12345.7, 1e18):  # 3.3: a mean of 40 of them is rounded
        arguments = example(size=(5, 4), inputs=40, norm=norm, residual="contiguous") | {"activation": activation}
        maps = {name: arguments[name] * factor for name in OP.maps}
        assert_ok(testing.check(OP, arguments | maps, "cpp"))
        for sign in (1, -1):
            constant = {name: torch.full_like(value, sign * factor) for name, value in maps.items()}
            assert_ok(testing.check(OP, arguments | constant, "cpp"))
    for value in (3.3, 12345.7):
        for spread in (0, 1e-3):
            near = {"x": arguments["x"] * spread + value}
            assert_ok(testing.check(OP, arguments | near, "cpp"))
    zeros = testing.with_tensors(arguments, {k: v * 0 for k, v in testing.tensors_in(arguments).items()})
    assert not OP.function(**zeros, backend="cpp").any()


@everywhere
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_each_activation_of_any_value(instruction_set, activation):
    """Of the values themselves: a layer that copies its one channel to several."""
    near, far = torch.linspace(-12, 12, 20001), torch.logspace(-45, 38, 1001, dtype=torch.float64).float()
    ends = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan])
    x = torch.cat((near, near * 10, far, -far, ends))
    out = mvkernels.pointwise(x.view(1, 1, 1, -1), torch.ones(19, 1), activation=activation, backend="cpp")
    wanted = ACTIVATIONS[activation](x.double())
    torch.testing.assert_close(out[0, :, 0].double(), wanted.expand(19, -1), rtol=5e-7, atol=2e-7, equal_nan=True)


@everywhere
@pytest.mark.parametrize("inputs", [1, 2, 3, 7, 17, 48, 100, 144, 600])
@pytest.mark.parametrize("mean", [1.0, 0.1, -3.3, 1e3, 1e6, 1e10])
def test_rows_of_one_value_normalise_to_nothing(instruction_set, inputs, mean):
    """Their variance is 0, whatever the mean rounds to."""
    for norm in NORMS[1:]:
        arguments = example(inputs=inputs, norm=norm, bias=False)
        arguments["x"][:] = mean
        assert_ok(testing.check(OP, arguments, "cpp"))


@everywhere
@pytest.mark.parametrize("inputs", [2, 17, 48, 100, 144, 600])
@pytest.mark.parametrize("mean", [3.0, -1e2, 1e4, 1e6])
@pytest.mark.parametrize("spread", [1e-3, 1.0])
def test_means_far_above_the_spread(instruction_set, inputs, mean, spread):
    arguments = example(inputs=inputs, size=(5, 9))
    arguments["x"] = arguments["x"] * spread + mean
    assert_ok(testing.check(OP, arguments, "cpp"))


@everywhere
@pytest.mark.parametrize("height", [1e2, 1e6])
@normed
def test_peaked_maps(instruction_set, height, norm):
    """One channel far above all others, in one pixel and in all."""
    arguments = example(inputs=70, norm=norm)
    arguments["x"][:, 3, 2, 5] = height
    assert_ok(testing.check(OP, arguments, "cpp"))
    arguments["x"][:, 3] = height
    assert_ok(testing.check(OP, arguments, "cpp"))


@needs_cpp
@pytest.mark.parametrize("kind", ["channels_last", "some channels", "sliced"])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_map_that_threads_divide(threads, kind, batch):
    """Large enough for several blocks, of a number of pixels that nothing divides."""
    arguments = example(batch=batch, size=(67, 61), inputs=40, outputs=50, kind=kind, residual="some channels")
    assert_ok(testing.check(OP, arguments, "cpp"))


@needs_cpp
@pytest.mark.parametrize("size", [(1, 37), (37, 1), (1, 1), (5, 7)])
@pytest.mark.parametrize("along", [2, 3])
def test_rows_and_columns_of_a_larger_map_are_read_in_place(size, along):
    """Pixels that are not equally far apart are several lines."""
    whole = [side * 2 if axis == along else side for axis, side in enumerate(size, start=2)]
    arguments = example(batch=3, size=tuple(whole), inputs=19, residual="channels_last")
    halves = {name: arguments[name].narrow(along, 0, size[along - 2]) for name in OP.maps}
    steps = {name: arguments[name][:, :, :: 1 + (along == 2), :: 1 + (along == 3)] for name in OP.maps}
    for maps in (halves, steps, {"x": halves["x"], "residual": steps["residual"]}):
        assert maps["x"].stride(1) == 1
        assert_ok(testing.check(OP, arguments | maps, "cpp"))


@needs_cpp
@normed
def test_weights_of_any_strides_and_on_any_bias(norm):
    arguments = example(inputs=21, outputs=20, norm=norm)
    wanted = OP.function(**arguments, backend="cpp")
    weight = arguments["weight"]

    def strided(value):
        return None if value is None else torch.stack((value, value), 1)[:, 0]

    laid = {"bias": strided(arguments["bias"])}
    if norm is not None:
        laid["norm"] = [strided(part) for part in arguments["norm"]]
    for each in (
        weight.T.contiguous().T,
        weight[:, :, None, None],
        strided(weight.T).T,
        weight.T.contiguous().T[..., None, None],
    ):
        assert torch.equal(OP.function(**arguments | laid | {"weight": each}, backend="cpp"), wanted)


WRONG = {
    "activation": ({"activation": "swish"}, ValueError, "activation is 'swish', want 'relu', 'silu'"),
    "eps of text": ({"eps": "1"}, TypeError, "eps"),
    "a kernel of 3": ({"weight": torch.ones(24, 16, 3, 3)}, ValueError, "weight is (24, 16, 3, 3), want (C_out, C)"),
    "a weight of 3 axes": ({"weight": torch.ones(24, 16, 1)}, ValueError, "weight has 3 axes"),
    "a vector of weights": ({"weight": torch.ones(24)}, ValueError, "weight has 1"),
    "no outputs": ({"weight": torch.ones(0, 16)}, ValueError, "channels of at least 1"),
    "a longer bias": ({"bias": torch.ones(25)}, ValueError, "bias is (25,), want (24,)"),
    "a square bias": ({"bias": torch.ones(4, 6)}, ValueError, "bias has 2 axes"),
    "no pair": ({"norm": torch.ones(16)}, TypeError, "norm is a Tensor, want a pair (weight, bias)"),
    "a module": ({"norm": torch.nn.LayerNorm(16)}, TypeError, "norm is a LayerNorm, want a pair"),
    "a norm of three": ({"norm": (torch.ones(16),) * 3}, ValueError, "norm has 3 parts, want (weight, bias)"),
    "a norm of the outputs": ({"norm": (torch.ones(24), None)}, ValueError, "norm[0] is (24,), want (16,)"),
    "a norm's longer bias": ({"norm": (None, torch.ones(17))}, ValueError, "norm[1] is (17,), want (16,)"),
    "a norm of numbers": ({"norm": (1.0, 0.0)}, TypeError, "norm[0] is a float"),
    "other channels": ({"x": torch.ones(2, 9, 6, 7)}, ValueError, "x has 9 channels, the weight is for 16"),
    "no pixels": ({"x": torch.ones(2, 16, 0, 7)}, ValueError, "x is (2, 16, 0, 7)"),
    "tokens": ({"x": torch.ones(2, 42, 16)}, ValueError, "x has 3 axes"),
    "nothing": ({"x": None}, TypeError, "x is a NoneType"),
    "residual": ({"residual": True}, TypeError, "residual is a bool"),
    "a residual of one map": (
        {"residual": torch.ones(1, 24, 6, 7)}, ValueError, "residual is (1, 24, 6, 7), want (2, 24, 6, 7)",
    ),
    "a residual of the inputs": ({"residual": torch.ones(2, 16, 6, 7)}, ValueError, "want (2, 24, 6, 7)"),
    "a residual of three axes": ({"residual": torch.ones(24, 6, 7)}, ValueError, "residual has 3 axes"),
    "two dtypes": ({"residual": torch.ones(2, 24, 6, 7).double()}, ValueError, "want one dtype"),
    "packed of no tensor": ({"packed": [1.0]}, TypeError, "packed is a list"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_arguments_are_one_line(kind):
    inference.assert_refused(OP, example(), *WRONG[kind])


@needs_cpp
@pytest.mark.parametrize("parts", [(0,), (1,), (0, 1)])
def test_a_gradient_of_a_norm_is_the_references(parts):
    arguments = example()
    arguments["norm"] = tuple(p.requires_grad_(i in parts) for i, p in enumerate(arguments["norm"]))
    assert OP.function(**arguments).requires_grad
    assert not mvkernels.can_run(OP.name, "cpp", **arguments)[0]
