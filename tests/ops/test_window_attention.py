"""Window attention: the reference against an independent formula, every backend against the reference."""

import itertools
import math
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mvkernels
from mvkernels import testing
from mvkernels.dispatch import checks
from mvkernels.dispatch.registry import OPS
from tests.ops import bridges
from tests.ops.bridges import INSTRUCTION_SETS, assert_ok

OP = OPS["window_attention"]
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
DEVICE = os.environ.get("MVKERNELS_TEST_DEVICE", "cpu")
needs_cpp = bridges.needs_cpp("window_attention")


def by_definition(query, key, value, window_size, shift=(0, 0), bias=None, scale=None):
    """One dense attention over all pixels, with -inf between pixels of different windows."""
    y, x = torch.meshgrid(*(torch.arange(side) for side in query.shape[3:]), indexing="ij")
    (wh, ww), (sy, sx) = window_size, shift
    window = torch.stack(((y - sy).div(wh, rounding_mode="floor"), (x - sx).div(ww, rounding_mode="floor"))).flatten(1)
    place = ((y - sy) % wh * ww + (x - sx) % ww).flatten()
    scores = torch.einsum("bhdi,bhdj->bhij", query.flatten(3), key.flatten(3)) * (scale or query.shape[2] ** -0.5)
    if bias is not None:
        scores = scores + bias[:, place][:, :, place]
    apart = (window[:, :, None] != window[:, None, :]).any(0)
    scores = scores.masked_fill(apart, -math.inf)
    return torch.einsum("bhij,bhdj->bhdi", scores.softmax(-1), value.flatten(3)).reshape(value.shape)


def swin(query, key, value, window, shift, bias):
    """As Swin's own code: rolled, cut, with its mask of -100, rolled back."""
    return OP.peers["eager"](query, key, value, window, shift, bias)


@st.composite
def problems(draw, dtypes=DTYPES, most=17, device="cpu"):
    """Arguments of window attention: any shape, window, shift, stride kinds and dtype."""
    dtype = draw(st.sampled_from(dtypes))
    b, h = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    d = draw(st.sampled_from([1, 3, 4, 8, 13, 16, 20, 32, 36, 60, 100]))
    dv = draw(st.sampled_from([d, draw(st.integers(1, 40))]))
    size = draw(st.integers(1, most)), draw(st.integers(1, most))
    window = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    shift = tuple(draw(st.integers(0, side - 1)) for side in window)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    arguments = {}
    for name, dim in (("query", d), ("key", d), ("value", dv)):
        kind = draw(st.sampled_from(testing.STRIDES))
        arguments[name] = testing.make_map((b, h, dim, *size), kind, dtype, device, generator)
    arguments |= {"window_size": window, "shift": shift}
    if draw(st.booleans()):
        n = window[0] * window[1]
        full = torch.randn(h, n, n + 3, generator=generator).to(device, dtype)
        arguments["bias"] = full[..., 1 : n + 1] if draw(st.booleans()) else full[..., :n].transpose(1, 2)
    if draw(st.booleans()):
        arguments["scale"] = draw(st.sampled_from([0.1, 0.3, -0.4]))
    return arguments


@settings(max_examples=80, deadline=None, derandomize=True)
@given(problems(dtypes=(torch.float64,)))
def test_the_reference_is_the_definition(arguments):
    torch.testing.assert_close(OP.reference(**arguments), by_definition(**arguments), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("size", "window", "shift"),
    [((14, 14), (7, 7), (3, 3)), ((12, 8), (6, 4), (3, 2)), ((7, 14), (7, 7), (0, 3)), ((16, 8), (8, 8), (4, 4))],
)
def test_swins_rolled_windows_and_mask_are_a_shift(size, window, shift):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (testing.make_map((2, 3, 8, *size), "channels_last", torch.float64, "cpu", generator) for _ in range(3))
    bias = torch.randn(3, window[0] * window[1], window[0] * window[1], generator=generator, dtype=torch.float64)
    out = mvkernels.window_attention(q, k, v, window, shift=shift, bias=bias)
    torch.testing.assert_close(out, swin(q, k, v, window, shift, bias), rtol=1e-12, atol=1e-12)


def test_a_window_of_the_whole_map_and_one_of_a_patch_are_patch_attention():
    q, k, v = (torch.randn(2, 2, 6, 8, 12, dtype=torch.float64) for _ in range(3))
    whole = mvkernels.patch_attention(q, k, v, 1)
    for window in ((8, 12), (9, 12), (100, 2**40)):
        torch.testing.assert_close(mvkernels.window_attention(q, k, v, window), whole)
    # Turned inside out, the patches of a map are the windows of another.
    turned = [
        m.unflatten(4, (3, 4)).unflatten(3, (4, 2)).permute(0, 1, 2, 4, 3, 6, 5).reshape(m.shape) for m in (q, k, v)
    ]
    out = mvkernels.window_attention(*turned, (4, 3))
    back = out.unflatten(4, (4, 3)).unflatten(3, (2, 4)).permute(0, 1, 2, 4, 3, 6, 5).reshape(out.shape)
    torch.testing.assert_close(back, mvkernels.patch_attention(q, k, v, (2, 4)))


@pytest.mark.core
@needs_cpp
@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS, indirect=True)
@settings(max_examples=80, deadline=None, derandomize=True)
@given(arguments=problems())
def test_cpp_on_any_shape_window_stride_and_dtype(instruction_set, arguments):
    assert_ok(testing.check(OP, arguments, "cpp"))


@pytest.mark.skipif(DEVICE == "cpu", reason="MVKERNELS_TEST_DEVICE names no other device")
@settings(max_examples=200, deadline=None)
@given(problems(dtypes=(torch.float32, torch.float16, torch.bfloat16), device=DEVICE))
def test_the_device_on_any_shape_window_stride_and_dtype(arguments):
    assert mvkernels.can_run("window_attention", "triton", **arguments) == (True, "")
    assert_ok(testing.check(OP, arguments, "triton"))


@pytest.mark.skipif(DEVICE == "cpu", reason="MVKERNELS_TEST_DEVICE names no other device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=checks.short)
def test_the_device_on_the_suite(dtype):
    for case in OP.suite("full"):
        for layout in case.layouts:
            assert_ok(testing.check(OP, case.make(batch=3, dtype=dtype, device=DEVICE, layout=layout), "triton"))


@needs_cpp
@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=checks.short)
def test_cpp_on_the_suite(instruction_set, dtype):
    for case in OP.suite("full"):
        if case.shape["height"] > (16 if dtype == torch.float32 else 14) or case.shape["window"] > 14:
            continue
        for layout in case.layouts:
            assert_ok(testing.check(OP, case.make(batch=2, dtype=dtype, layout=layout), "cpp"))


@needs_cpp
@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS, indirect=True)
@pytest.mark.parametrize(("window", "shift"), [((16, 16), (0, 0)), ((16, 20), (5, 11)), ((24, 40), (23, 1))], ids=str)
def test_cpp_on_windows_of_several_blocks_of_keys(instruction_set, window, shift):
    """More keys than a block: running maximum, also where the first blocks are wholly masked; clipped ones too."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (testing.make_map((1, 2, 12, 24, 40), "channels_last", generator=generator) for _ in range(3))
    n = window[0] * window[1]
    bias = torch.randn(2, n, n, generator=generator)
    bias[:, : n // 2, : n - 3] = -math.inf
    for more in ({}, {"bias": torch.randn(2, n, n, generator=generator)}, {"bias": bias}):
        arguments = {"query": 6 * q, "key": k, "value": v, "window_size": window, "shift": shift, **more}
        assert_ok(testing.check(OP, arguments, "cpp"))


@needs_cpp
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize(("size", "window", "shift"), [((9, 31), (9, 31), 0), ((9, 9), 4, 1), ((3, 3), 7, 2)], ids=str)
def test_cpp_splits_few_windows_over_threads(threads, size, window, shift):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (testing.make_map((1, 1, 8, *size), generator=generator) for _ in range(3))
    arguments = {"query": q, "key": k, "value": v, "window_size": window, "shift": shift}
    n = math.prod(window) if isinstance(window, tuple) else window**2
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_ok(testing.check(OP, arguments, "cpp"))
        assert_ok(testing.check(OP, {**arguments, "bias": torch.randn(1, n, n, generator=generator)}, "cpp"))
    finally:
        torch.set_num_threads(before)


@needs_cpp
@pytest.mark.parametrize("kind", testing.STRIDES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=checks.short)
@pytest.mark.parametrize("with_bias", [False, True])
def test_opcheck(kind, dtype, with_bias):
    q, k, v = (testing.make_map((2, 3, dim, 4, 6), kind, dtype) for dim in (5, 5, 7))
    bias = torch.randn(3, 6, 6).to(dtype) if with_bias else None
    operators = torch.ops.mvkernels_cpp.window_attention_forward, torch.ops.mvkernels_cpp.window_attention_backward
    torch.library.opcheck(operators[0], (q, k, v, 2, 3, 1, 0, bias, 0.4))
    grad = testing.make_map(v.shape, kind, dtype)
    torch.library.opcheck(operators[1], (grad, q, k, v, 2, 3, 1, 0, bias, 0.4, with_bias))


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpp", marks=needs_cpp)])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", ["query", "key", "value"])
def test_nan_and_infinity_stay_in_their_window(backend, bad, which):
    """At the border of a clipped window and inside, on a map that ends in the middle of one."""
    torch.manual_seed(0)
    for y, x in ((0, 1), (3, 4), (5, 6)):
        maps = {name: torch.randn(2, 2, 5, 6, 7) for name in ("query", "key", "value")}
        maps[which][0, 1, 2, y, x] = bad
        arguments = {"window_size": (3, 4), "shift": (1, 2), "bias": torch.randn(2, 12, 12)}
        with testing.poisoned():
            out = mvkernels.window_attention(**maps, **arguments, backend=backend)
        doubles = {name: tensor.double() for name, tensor in (maps | {"bias": arguments["bias"]}).items()}
        exact = by_definition(**{**arguments, **{n: t.nan_to_num(0, 0, 0) for n, t in doubles.items()}})
        inside = (torch.arange(6)[:, None] - 1).div(3, rounding_mode="floor") == (y - 1) // 3
        inside = inside & ((torch.arange(7) - 2).div(4, rounding_mode="floor") == (x - 2) // 4)
        # Outside of the window nothing changes, inside something is not finite.
        other = ~inside.expand(out.shape).clone()
        other[0, 0], other[1] = True, True
        assert testing.max_error(out[other], exact[other]) < 1e-5
        wanted = OP.reference(**{**arguments, **doubles})
        assert torch.equal(out.isfinite(), wanted.isfinite())
        assert not (out.isfinite().all() and math.isnan(bad))  # a score of -inf is a weight of 0


def test_a_masked_row_outside_the_map_makes_no_gradient_nan():
    q = torch.randn(1, 1, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(1, 16, 16, dtype=torch.float64)
    bias[0, 15] = -math.inf  # of a pixel that the map lacks
    grads = []
    for backend in ("reference", "auto"):
        given = bias.clone().requires_grad_()
        out = mvkernels.window_attention(q, q, q, 4, bias=given, backend=backend)
        grads.append(torch.autograd.grad(out.square().sum(), (q, given)))
        assert all(grad.isfinite().all() for grad in grads[-1])
    for found, wanted in zip(*grads):
        torch.testing.assert_close(found, wanted)


@needs_cpp
def test_cpp_is_deterministic():
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, 2, 20, 9, 14, requires_grad=True) for _ in range(3))
    bias = torch.randn(2, 20, 20, requires_grad=True)

    def once():
        out = mvkernels.window_attention(q, k, v, (4, 5), shift=(1, 3), bias=bias, backend="cpp")
        return out, *torch.autograd.grad(out.square().sum(), (q, k, v, bias))

    first = once()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, once()))


@needs_cpp
def test_some_gradients_only():
    torch.manual_seed(0)
    q, k, v, bias = *(torch.randn(2, 2, 6, 4, 5) for _ in range(3)), torch.randn(2, 9, 9)
    for wanted in itertools.product([False, True], repeat=4):
        if not any(wanted):
            continue
        inputs = [m.clone().requires_grad_(w) for m, w in zip((q, k, v, bias), wanted)]
        leaves = [m for m in inputs if m.requires_grad]
        outs = [
            mvkernels.window_attention(*inputs[:3], 3, shift=1, bias=inputs[3], backend=b) for b in ("cpp", "reference")
        ]
        grads = [torch.autograd.grad(o.sum(), leaves) for o in outs]
        for a, b in zip(*grads):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
