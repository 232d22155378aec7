"""Multi-scale linear attention: the reference against its definition, every backend against the reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import pad

import mvkernels
from mvkernels import testing
from mvkernels.dispatch import checks
from mvkernels.dispatch.registry import OPS
from tests.ops import bridges
from tests.ops.bridges import DEVICE, INSTRUCTION_SETS, assert_ok, interpreter, needs_device

OP = OPS["multiscale_linear_attention"]
needs_cpp = bridges.needs_cpp(OP.name)
KERNELS = [pytest.param("cpp", marks=needs_cpp), pytest.param("triton", marks=bridges.INTERPRETER)]
EVERY = ["reference", *KERNELS]


def arguments_of(heads=2, dim=8, size=(6, 7), kernels=(3,), biases=(False, False), batch=2, dtype=torch.float32,
                 kind="contiguous", device="cpu", seed=0):  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    channels = 3 * heads * dim

    def normal(*shape, scale=1.0):
        return (scale * torch.randn(*shape, generator=generator)).to(device, dtype)

    arguments = {
        "qkv": testing.make_map((batch, channels, *size), kind, dtype, device, generator),
        "depthwise": [normal(channels, 1, k, k, scale=1 / k) for k in kernels],
        "pointwise": [normal(channels, dim, 1, 1, scale=dim**-0.5) for _ in kernels],
        "head_dim": dim,
    }
    for name, given_ in zip(("depthwise_bias", "pointwise_bias"), biases):
        if given_:  # of several scales, the second has none
            arguments[name] = [None if i == 1 else normal(channels) for i in range(len(kernels))]
    return arguments


@st.composite
def problems(draw, dtypes=bridges.DTYPES, device="cpu", most=12, heads=3, sides=(1, 3, 5, 7), dims=(1, 3, 8, 16, 32)):
    arguments = arguments_of(
        draw(st.integers(1, heads)),
        draw(st.sampled_from(dims)),
        (draw(st.integers(1, most)), draw(st.integers(1, most))),
        draw(st.lists(st.sampled_from(sides), max_size=2)),
        (draw(st.booleans()), draw(st.booleans())),
        draw(st.integers(1, 2)),
        draw(st.sampled_from(dtypes)),
        draw(st.sampled_from(testing.STRIDES)),
        device,
        draw(st.integers(0, 2**31)),
    )
    return arguments | ({"eps": 1e-5} if draw(st.booleans()) else {})


def by_definition(qkv, depthwise, pointwise, head_dim, depthwise_bias=None, pointwise_bias=None, eps=1e-15):
    """Taps, groups and heads one by one."""
    channels, (height, width) = qkv.shape[1], qkv.shape[2:]
    scales = [qkv]
    for i, (wide, mixing) in enumerate(zip(depthwise, pointwise)):
        k = wide.shape[-1]
        room = pad(qkv, [k // 2] * 4)
        each = sum(
            room[:, :, y : y + height, x : x + width] * wide[None, :, 0, y, x, None, None]
            for y in range(k)
            for x in range(k)
        )
        if depthwise_bias and depthwise_bias[i] is not None:
            each = each + depthwise_bias[i][None, :, None, None]
        groups = range(0, channels, head_dim)
        mixed = [torch.einsum("oi,bihw->bohw", mixing[g : g + head_dim, :, 0, 0], each[:, g : g + head_dim])
                 for g in groups]  # fmt: skip
        mixed = torch.cat(mixed, 1)
        if pointwise_bias and pointwise_bias[i] is not None:
            mixed = mixed + pointwise_bias[i][None, :, None, None]
        scales.append(mixed)
    heads = [head for scale in scales for head in scale.split(3 * head_dim, 1)]
    out = [mvkernels.relu_linear_attention(*head.unsqueeze(1).split(head_dim, 2), eps=eps, backend="reference")
           for head in heads]  # fmt: skip
    return torch.cat(out, 1).flatten(1, 2)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(problems(dtypes=(torch.float64,), most=7))
def test_the_reference_is_the_definition(arguments):
    torch.testing.assert_close(OP.reference(**arguments), by_definition(**arguments), rtol=1e-9, atol=1e-9)


@pytest.mark.core
@needs_cpp
@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS, indirect=True)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(arguments=problems())
def test_cpp_on_any_shape_stride_and_dtype(instruction_set, arguments):
    assert_ok(testing.check(OP, arguments, "cpp"))


@needs_device
@settings(max_examples=200, deadline=None)
@given(problems(device=DEVICE, most=40))
def test_the_device_on_any_shape_stride_and_dtype(arguments):
    assert_ok(testing.check(OP, arguments, "triton"))


@needs_device
@pytest.mark.parametrize("dtype", bridges.DTYPES, ids=checks.short)
def test_the_device_on_the_suite(dtype):
    for case in OP.suite("full"):
        for layout in case.layouts:
            assert_ok(testing.check(OP, case.make(batch=3, dtype=dtype, device=DEVICE, layout=layout), "triton"))


TRITON = {
    "channels first, all biases": {"kernels": (3,), "biases": (True, True), "dim": 3},
    "channels last": {"kind": "channels_last", "dim": 8},
    "float16, slices of a qkv": {"kind": "packed", "dtype": torch.float16, "biases": (True, False), "dim": 5},
    "float64, one channel in memory": {"kind": "expanded", "dtype": torch.float64, "size": (3, 2)},
    "one pixel, one tap": {"kernels": (1,), "size": (1, 1), "kind": "transposed"},
    "kernel wider than the map": {"kernels": (5,), "size": (2, 3), "kind": "sliced"},
    "taps of a row in two programs": {"kernels": (9,), "size": (5, 6), "biases": (True, True), "dim": 3},
    "two scales": {"kernels": (3, 1), "size": (3, 4), "biases": (True, True), "dim": 2},
    "no scale": {"kernels": (), "heads": 2, "size": (5, 4)},
}


@interpreter
@pytest.mark.parametrize("name", TRITON)
def test_triton(name):
    assert_ok(testing.check(OP, arguments_of(**{"heads": 1, "batch": 1} | TRITON[name]), "triton"))


@interpreter
@pytest.mark.parametrize(
    ("batch", "size", "found"), [(1, (9, 10), 3), (2, (9, 10), 6), (5, (9, 10), 9), (2, (9, 36), 6)]
)
def test_triton_sums_the_weights_gradients_over_slices_of_tiles_and_batch(batch, size, found):
    from mvkernels.ops.multiscale_linear_attention.triton import plan

    # Of 3 tiles or 11, and with 5 images or 11 tiles the last slice is not full.
    arguments = arguments_of(1, 8, size, kernels=(1,), biases=(True, True), batch=batch)
    maps = [(name, arguments["qkv"].unflatten(1, (3, 8))) for name in "gx"]
    launches, slices = plan.weight_launches(
        plan.ScaleProblem.of(maps[0][1], maps, True, kernel=1, biases=(False, False))
    )
    assert slices == found
    assert [one.name for one in launches] == ["weight_sums", "sum_slices", "weight_gradients"]
    assert_ok(testing.check(OP, arguments, "triton"))


@interpreter
@pytest.mark.parametrize("kind", ["contiguous", "packed"])
def test_opcheck_triton(kind):
    namespace = torch.ops.mvkernels_triton
    given_ = arguments_of(1, 2, (3, 2), kernels=(1,), batch=1, biases=(True, False), kind=kind)
    values = [given_["depthwise"], given_["pointwise"], 2, given_["depthwise_bias"], [None], 1e-5]
    torch.library.opcheck(namespace.multiscale_linear_attention_forward, (given_["qkv"], *values))
    out, sums = namespace.multiscale_linear_attention_forward(given_["qkv"], *values)
    for weights in (True, False):
        arguments = (torch.randn_like(out), given_["qkv"], sums, *values, weights)
        torch.library.opcheck(namespace.multiscale_linear_attention_backward, arguments)


@pytest.mark.parametrize("backend", EVERY)
def test_without_scales_it_is_relu_linear_attention(backend):
    given_ = arguments_of(2, 8, (4, 5), kernels=())
    q, k, v = given_["qkv"].unflatten(1, (2, 3, 8)).unbind(2)
    expected = mvkernels.relu_linear_attention(q, k, v, backend=backend).flatten(1, 2)
    torch.testing.assert_close(mvkernels.multiscale_linear_attention(**given_, backend=backend), expected)


@pytest.mark.parametrize("backend", EVERY)
def test_the_function_gives_gradients_to_all_in_the_lists(backend):
    given_ = arguments_of(1, 8, (3, 4), kernels=(3, 1), biases=(True, True), batch=1)
    tensors = {n: t.requires_grad_() for n, t in testing.tensors_in(given_).items()}
    outs = [
        mvkernels.MultiscaleLinearAttentionFunction.apply(*given_.values(), 1e-5, backend),
        mvkernels.multiscale_linear_attention(**given_, eps=1e-5, backend=backend),
    ]
    grads = [torch.autograd.grad(out.square().sum(), list(tensors.values())) for out in outs]
    for name, a, b in zip(tensors, *grads):
        assert a.shape == tensors[name].shape and torch.equal(a, b) and a.any()


@pytest.mark.parametrize("backend", EVERY)
def test_float16_of_magnitude_50_is_finite_and_accurate(backend):
    given_ = arguments_of(1, 8, (6, 7) if backend == "triton" else (128, 128), batch=1, dtype=torch.float16)
    given_["qkv"] = (50 * given_["qkv"]).clamp(-50, 50)
    assert_ok(testing.check(OP, given_, backend))
    wide = {n: t.float().requires_grad_() for n, t in testing.tensors_in(given_).items()}
    with torch.autocast("cpu", dtype=torch.float16):
        out = mvkernels.multiscale_linear_attention(**testing.with_tensors(given_, wide), backend=backend)
    assert out.dtype == torch.float16 and out.isfinite().all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.float().sum(), list(wide.values())))


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=checks.short)
def test_cpp_on_the_suite(dtype):
    for case in OP.suite("full"):
        if case.shape["height"] <= 14:
            for layout in case.layouts:
                assert_ok(testing.check(OP, case.make(batch=2, dtype=dtype, layout=layout), "cpp"))


def test_parameter_lists_are_lists():
    given_ = arguments_of(1, 4)
    lists = {n: torch.nn.ParameterList(given_[n]) for n in ("depthwise", "pointwise")}
    torch.testing.assert_close(
        mvkernels.multiscale_linear_attention(**(given_ | lists)), mvkernels.multiscale_linear_attention(**given_)
    )


def changed(**change):
    return lambda: arguments_of(1, 4, biases=(True, True)) | change


W, M, B = torch.zeros(12, 1, 3, 3), torch.zeros(12, 4, 1, 1), torch.zeros(12)
BAD = {
    "rank": (ValueError, "qkv has 3 axes", changed(qkv=torch.zeros(12, 4, 4))),
    "W = 0": (ValueError, "W is 0", changed(qkv=torch.zeros(1, 12, 4, 0))),
    "head_dim does not divide": (ValueError, "head_dim is 3, qkv", changed(head_dim=3)),
    "head_dim = 0": (ValueError, "head_dim is 0", changed(head_dim=0)),
    "head_dim is no int": (TypeError, "head_dim is 4.0, want an int", changed(head_dim=4.0)),
    "a tensor for a list": (TypeError, "depthwise is a Tensor, want a list", changed(depthwise=W)),
    "text for a list": (TypeError, "depthwise is a str, want a list", changed(depthwise="")),
    "None for a list": (TypeError, "pointwise is a NoneType, want a list", changed(pointwise=None)),
    "None in a list": (TypeError, r"depthwise\[0\] is a NoneType", changed(depthwise=[None])),
    "lists of other lengths": (ValueError, "pointwise has 2 entries, depthwise has 1", changed(pointwise=[M, M])),
    "biases of another length": (ValueError, "pointwise_bias has 0 entries", changed(pointwise_bias=[])),
    "even k": (ValueError, r"depthwise\[0\] is .* k odd", changed(depthwise=[torch.zeros(12, 1, 4, 4)])),
    "k x l": (ValueError, r"depthwise\[0\] is", changed(depthwise=[torch.zeros(12, 1, 3, 5)])),
    "dense, not depthwise": (ValueError, r"depthwise\[0\] is", changed(depthwise=[torch.zeros(12, 12, 3, 3)])),
    "groups": (ValueError, r"pointwise\[0\] is .* want \(3C, head_dim, 1, 1\) = \(12, 4, 1, 1\)",
               changed(pointwise=[torch.zeros(12, 12, 1, 1)])),
    "bias": (ValueError, r"pointwise_bias\[0\] is \(4,\), want \(3C,\)", changed(pointwise_bias=[B[:4]])),
    "dtypes": (ValueError, r"pointwise\[0\] has dtype float64, qkv has float32", changed(pointwise=[M.double()])),
    "devices": (ValueError, r"depthwise\[0\] is on meta", changed(depthwise=[W.to("meta")])),
    "eps": (TypeError, "eps is '1'", changed(eps="1")),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    error, message, make = BAD[name]
    with pytest.raises(error, match=message) as caught:
        mvkernels.multiscale_linear_attention(**make())
    assert "\n" not in str(caught.value) and str(caught.value).startswith("multiscale_linear_attention: ")
    assert not mvkernels.can_run("multiscale_linear_attention", "reference", **make())[0]
