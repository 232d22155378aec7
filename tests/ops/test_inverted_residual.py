"""inverted_residual on any block and map: its kernel against float64, and its contract."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import hardtanh

import mvkernels
from mvkernels import testing
from mvkernels.dispatch.registry import OPS
from mvkernels.ops.common.activations import ACTIVATIONS
from tests.ops import inference
from tests.ops.bridges import assert_ok
from tests.ops.inference import CHANNELS, SEEDS, STRIDES, everywhere, needs_cpp
from tests.ops.inference import inverted_residual as example

OP = OPS["inverted_residual"]
# Hidden channels too that are taken in more than one group.
HIDDEN = st.sampled_from([257, 288, 400, 530])


@st.composite
def problems(draw):
    """Any block, map, strides and activation."""
    expands, residual = draw(st.booleans()), draw(st.booleans())
    hidden = draw(st.one_of(CHANNELS, HIDDEN) if expands else CHANNELS)
    inputs = draw(CHANNELS) if expands else hidden
    arguments = example(
        batch=draw(st.integers(1, 3)),
        size=(draw(st.integers(1, 20)), draw(st.integers(1, 20))),
        inputs=inputs,
        hidden=hidden,
        outputs=inputs if residual else draw(CHANNELS),
        kernel=draw(st.sampled_from([3, 5])),
        expands=expands,
        biases=[draw(st.booleans()) for _ in range(3)],
        kind=draw(st.sampled_from(STRIDES)),
        seed=draw(SEEDS),
    )
    return {
        **arguments,
        "stride": 1 if residual else draw(st.sampled_from([1, 2])),
        "activation": draw(st.sampled_from(list(ACTIVATIONS))),
        "residual": residual,
    }


@pytest.mark.core
@everywhere
@settings(max_examples=200, deadline=None, derandomize=True)
@given(arguments=problems())
def test_cpp_on_any_block_map_and_strides(instruction_set, arguments):
    assert_ok(testing.check(OP, arguments, "cpp"))


@everywhere
@settings(max_examples=60, deadline=None, derandomize=True)
@given(arguments=problems())
def test_the_result_is_the_same_on_two_threads_in_any_batch_and_with_packed_weights(instruction_set, arguments):
    inference.assert_the_same_on_threads_in_batches_and_packed(OP, arguments)


def test_the_reference_is_the_definition():
    """Pixel by pixel, in float64."""
    given = example(batch=1, size=(4, 5), kernel=3, expands=True)
    given = testing.with_tensors(given, {key: value.double() for key, value in testing.tensors_in(given).items()})
    (we, be), (wd, bd), (wp, bp) = (given[name] for name in ("expand", "depthwise", "project"))
    f = lambda t: hardtanh(t, 0.0, 6.0)  # noqa: E731
    hidden = f(torch.einsum("oi,bihw->bohw", we[:, :, 0, 0], given["x"]) + be[:, None, None])
    for stride in (1, 2):
        out = OP.reference(**given, stride=stride, activation="relu6", residual=stride == 1)
        for y in range(out.shape[2]):
            for x in range(out.shape[3]):
                sums = bd.clone()
                for i in range(3):
                    for j in range(3):
                        row, column = y * stride + i - 1, x * stride + j - 1
                        if 0 <= row < 4 and 0 <= column < 5:
                            sums += wd[:, 0, i, j] * hidden[0, :, row, column]
                wanted = wp[:, :, 0, 0] @ f(sums) + bp + (given["x"][0, :, y, x] if stride == 1 else 0)
                torch.testing.assert_close(out[0, :, y, x], wanted, rtol=1e-12, atol=1e-12)


@everywhere
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("expands", [True, False])
def test_what_is_not_finite_stays_where_it_belongs(instruction_set, value, activation, kernel, stride, expands):
    arguments = example(
        size=(11, 12), inputs=21, hidden=37 if expands else 21, outputs=19, kernel=kernel, expands=expands
    )
    arguments |= {"stride": stride, "activation": activation}
    arguments["x"][1, 5, 4, 6] = value
    assert_ok(testing.check(OP, arguments, "cpp"))
    out = OP.function(**arguments, backend="cpp")
    for side, at, axis in ((out.shape[2], 4, 2), (out.shape[3], 6, 3)):
        for place in range(side):
            if abs(place * stride - at) > kernel // 2:
                assert out.select(axis, place).isfinite().all()
    assert out[0].isfinite().all()


@everywhere
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("inside", ["expand", "depthwise", "project"])
def test_a_weight_that_is_not_finite(instruction_set, value, inside):
    for part in (0, 1):
        arguments = example(hidden=37, outputs=19, inputs=21)
        arguments[inside][part][3] = value
        assert_ok(testing.check(OP, arguments, "cpp"))


@everywhere
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_large_small_and_constant_maps(instruction_set, activation):
    for factor in (1e-38, 1e-20, 1e-3, 30.0, 1e4, 1e18, 1e30):
        arguments = example(size=(9, 8), hidden=40, kernel=5)
        arguments |= {"x": arguments["x"] * factor, "activation": activation, "residual": True}
        assert_ok(testing.check(OP, arguments, "cpp"))
        assert_ok(testing.check(OP, arguments | {"x": torch.full_like(arguments["x"], factor)}, "cpp"))
        assert_ok(testing.check(OP, arguments | {"x": torch.full_like(arguments["x"], -factor)}, "cpp"))
    zeros = testing.with_tensors(arguments, {k: v * 0 for k, v in testing.tensors_in(arguments).items()})
    assert not OP.function(**zeros, backend="cpp").any()


@needs_cpp
def test_a_map_that_threads_divide(threads):
    """Large enough for chunks of rows, with a height that nothing divides."""
    for kernel, stride in ((3, 1), (5, 2)):
        arguments = example(batch=1, size=(67, 61), inputs=40, hidden=120, outputs=40, kernel=kernel)
        assert_ok(testing.check(OP, arguments | {"stride": stride, "residual": stride == 1}, "cpp"))


@everywhere
@pytest.mark.parametrize("size", [(13, 40), (7, 200)])
def test_rows_that_are_too_much_for_the_cache(instruction_set, size):
    """Fewer rows are taken at a time, down to one."""
    for hidden, kernel, stride in ((600, 5, 2), (1030, 3, 1)):
        arguments = example(batch=1, size=size, inputs=9, hidden=hidden, outputs=9, kernel=kernel)
        assert_ok(testing.check(OP, arguments | {"stride": stride, "residual": stride == 1}, "cpp"))


@needs_cpp
def test_weights_of_any_strides_and_on_any_bias():
    arguments = example(inputs=16, hidden=48, outputs=20, kernel=5)
    wanted = OP.function(**arguments, backend="cpp")
    laid = {name: (weight.transpose(0, 1).contiguous().transpose(0, 1), torch.stack((bias, bias), 1)[:, 0])
            for name, (weight, bias) in arguments.items() if name != "x"}  # fmt: skip
    laid["depthwise"] = arguments["depthwise"][0].mT.contiguous().mT, laid["depthwise"][1]
    assert torch.equal(OP.function(**arguments | laid, backend="cpp"), wanted)
    lists = {name: list(pair) for name, pair in laid.items()}
    assert torch.equal(OP.function(**arguments | lists, backend="cpp"), wanted)


WRONG = {
    "stride of 3": ({"stride": 3}, ValueError, "stride is 3, want 1 or 2"),
    "stride of a float": ({"stride": 1.0}, TypeError, "stride is 1.0, want 1 or 2"),
    "stride of a bool": ({"stride": True}, TypeError, "stride is True"),
    "activation": ({"activation": "swish"}, ValueError, "activation is 'swish', want 'relu', 'silu'"),
    "activation of no name": ({"activation": torch.nn.ReLU()}, ValueError, "activation is ReLU()"),
    "residual": ({"residual": 1}, TypeError, "residual is 1, want a bool"),
    "residual with a stride": ({"residual": True, "stride": 2}, ValueError, "a residual needs a stride of 1"),
    "no pair": ({"depthwise": torch.ones(24, 1, 3, 3)}, TypeError, "depthwise is a Tensor, want a pair"),
    "no depthwise": ({"depthwise": None}, TypeError, "depthwise is a NoneType, want a pair"),
    "a pair of three": ({"project": (torch.ones(8, 24, 1, 1),) * 3}, ValueError, "project has 3 parts"),
    "no weight": ({"project": (None, torch.ones(8))}, TypeError, "project[0] is a NoneType"),
    "an even kernel": ({"depthwise": (torch.ones(24, 1, 2, 2), None)}, ValueError, "want an odd kernel"),
    "an oblong kernel": ({"depthwise": (torch.ones(24, 1, 3, 5), None)}, ValueError, "depthwise[0] is (24, 1, "),
    "not depthwise": ({"depthwise": (torch.ones(24, 24, 3, 3), None)}, ValueError, "want (24, 1, 3, 3)"),
    "an expansion by 3 x 3": ({"expand": (torch.ones(24, 8, 3, 3), None)}, ValueError, "want (24, 8, 1, 1)"),
    "another width": ({"expand": (torch.ones(25, 8, 1, 1), None)}, ValueError, "expand[0] is (25, 8, 1, 1)"),
    "another width after": ({"project": (torch.ones(8, 25, 1, 1), None)}, ValueError, "project[0] is (8, 25, 1, 1)"),
    "a longer bias": (
        {"project": (torch.ones(8, 24, 1, 1), torch.ones(9))},
        ValueError,
        "project[1] is (9,), want (8,)",
    ),
    "no outputs": ({"project": (torch.ones(0, 24, 1, 1), None)}, ValueError, "no channels of 0"),
    "other channels": ({"x": torch.ones(2, 9, 6, 7)}, ValueError, "x has 9 channels, its first weight is for 8"),
    "no pixels": ({"x": torch.ones(2, 8, 0, 7)}, ValueError, "x is (2, 8, 0, 7)"),
    "a vector": ({"x": torch.ones(8)}, ValueError, "x has 1"),
    "packed of no tensor": ({"packed": [1.0]}, TypeError, "packed is a list"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_arguments_are_one_line(kind):
    inference.assert_refused(OP, example(), *WRONG[kind])


def test_a_residual_needs_as_many_channels():
    with pytest.raises(ValueError, match="channels go from 8 to 9"):
        OP.function(**example(outputs=9), residual=True)


def test_the_gradients_of_the_reference_with_a_stride_are_right():
    assert_ok(testing.check(OP, example(hidden=33, outputs=5) | {"stride": 2}, "reference"))


@needs_cpp
@pytest.mark.parametrize("kernel", [1, 7, 9])
def test_other_kernels_take_the_reference(kernel):
    arguments = example(kernel=kernel)
    inference.assert_takes_the_reference(OP, arguments, f"the depthwise kernel is {kernel}, want 3 or 5")
    with pytest.raises(mvkernels.BackendUnavailable, match=f"the depthwise kernel is {kernel}"):
        inference.pack(OP.name, arguments)
