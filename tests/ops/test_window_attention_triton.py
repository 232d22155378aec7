"""The Triton kernels of window_attention on CPU tensors, through Triton's interpreter."""

from __future__ import annotations

import math
import os
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mvkernels import testing
from mvkernels.dispatch.registry import OPS
from mvkernels.testing import make_map, poisoned
from mvkernels.triton import configs, maps
from tests.ops.bridges import interpreter

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
kernels = pytest.importorskip("mvkernels.ops.window_attention.triton.launcher")
plan = pytest.importorskip("mvkernels.triton.attention.plan")

OP = OPS["window_attention"]
Pair = tuple[int, int]


def draw(
    shape: tuple[int, ...],
    window: Pair,
    shift: Pair = (0, 0),
    bias: bool = False,
    strides: str = "contiguous",
    dtype: torch.dtype = torch.float32,
    dv: int = 0,
    seed: int = 0,
) -> dict[str, Any]:
    """The op's arguments; strides "mixed" takes another kind for each map."""
    generator = torch.Generator().manual_seed(seed)
    kinds = ("packed", "transposed", "contiguous") if strides == "mixed" else (strides,) * 3
    b, h, d, height, width = shape
    shapes = (shape, shape, (b, h, dv or d, height, width))
    tensors = (make_map(each, kind, dtype, generator=generator) for each, kind in zip(shapes, kinds))
    arguments: dict[str, Any] = dict(zip(("query", "key", "value"), tensors))
    arguments |= {"window_size": window, "shift": shift}
    if bias:
        n = math.prod(window)
        arguments["bias"] = torch.randn(h, n, n, generator=generator).to(dtype)
    return arguments


def check(arguments: dict[str, Any]) -> None:
    for comparison in testing.check(OP, arguments, "triton"):
        assert comparison.ok, str(comparison)


def run(arguments: dict[str, Any], grad: Tensor) -> dict[str, Tensor]:
    """Results of the kernels, on poisoned buffers."""
    names = list(testing.tensors_in(arguments))
    with poisoned():
        return testing.run(lambda **kw: OP.function(**kw, backend="triton"), arguments, names, grad)


@interpreter
@settings(max_examples=16, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    b=st.integers(1, 2),
    h=st.integers(1, 3),
    d=st.sampled_from([1, 3, 8, 16, 20, 36, 64]),
    dv=st.sampled_from([0, 0, 5, 40]),
    size=st.tuples(st.integers(1, 11), st.integers(1, 11)),
    window=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    places=st.tuples(st.integers(0, 8), st.integers(0, 8)),
    bias=st.booleans(),
    strides=st.sampled_from([*testing.STRIDES, "mixed"]),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    seed=st.integers(0, 1000),
)
def test_any_shape_window_and_strides(b, h, d, dv, size, window, places, bias, strides, dtype, seed):
    shift = tuple(place % extent for place, extent in zip(places, window))
    check(draw((b, h, d, *size), window, shift, bias, strides, dtype, dv, seed))


@interpreter
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize(
    ("size", "window", "shift", "dtype"),
    [
        ((14, 14), (7, 7), (3, 3), torch.float16),
        ((13, 14), (12, 12), (6, 6), torch.float32),
        ((20, 17), (16, 16), (5, 0), torch.float16),
        ((16, 16), (4, 16), (0, 0), torch.float32),
    ],
    ids=["49", "144, clipped", "256, clipped", "64 in whole rows"],
)
def test_windows_of_models_and_of_several_blocks(size, window, shift, dtype, bias):
    check(draw((1, 1, 8, *size), window, shift, bias, "packed", dtype))


@interpreter
@pytest.mark.parametrize(
    ("size", "window", "shift"),
    [
        ((5, 6), (40, 40), (0, 0)),  # one window, as a patch of one pixel
        ((5, 6), (40, 40), (30, 2)),
        ((9, 9), (40, 3), (4, 1)),
        ((7, 7), (7, 7), (0, 0)),
    ],
)
def test_windows_larger_than_the_map(size, window, shift):
    check(draw((2, 2, 8, *size), window, shift, strides="channels_last"))


@interpreter
def test_bias_of_a_window_larger_than_the_map_has_a_gradient_of_zero_where_nothing_lies():
    arguments = draw((1, 2, 8, 4, 5), (9, 8), (3, 0), bias=True)
    found = run(arguments, arguments["value"])["dbias"].view(2, 9, 8, 9, 8)
    # Rows 6 to 8 of the first window, then 0; columns 0 to 4.
    inside = torch.zeros(9, 8, dtype=torch.bool)
    inside[[0, 6, 7, 8], :5] = True
    pairs = inside[:, :, None, None] & inside
    assert (found[:, ~pairs] == 0).all() and (found[:, pairs] != 0).any()
    check(arguments)


@interpreter
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize(
    ("size", "window", "shift"),
    [((9, 8), (4, 4), (1, 2)), ((8, 8), (4, 4), (0, 0)), ((16, 13), (7, 7), (3, 3)), ((10, 9), (9, 8), (4, 0))],
    ids=["packed, clipped", "packed", "unit, clipped", "blocks, clipped"],
)
def test_nan_and_inf_stay_in_their_window(size, window, shift, bias):
    arguments = draw((1, 2, 8, *size), window, shift, bias)
    grad = make_map((1, 2, 8, *size), "contiguous", torch.float32, generator=torch.Generator().manual_seed(1))
    clean = run(arguments, grad)
    dirty = {name: tensor.clone() for name, tensor in testing.tensors_in(arguments).items()}
    bad = grad.clone()
    for tensor, value in zip((*(dirty[name] for name in OP.maps), bad), (math.nan, math.inf, math.nan, math.inf)):
        tensor[0, 1, 0, -1, -1] = value
    found = run(testing.with_tensors(arguments, dirty), bad)
    # The last window, which in most cases here is clipped.
    corner = [size[axis] - 1 - (size[axis] - 1 - shift[axis]) % window[axis] for axis in (0, 1)]
    for name in ("out", "dquery", "dkey", "dvalue"):
        before, after = clean[name], found[name]
        assert torch.equal(before[:, 0], after[:, 0]), name
        inside = torch.zeros(size, dtype=torch.bool)
        inside[max(corner[0], 0) :, max(corner[1], 0) :] = True
        assert torch.equal(before[0, 1][:, ~inside], after[0, 1][:, ~inside]), name
        assert not after[0, 1][:, inside].isfinite().all(), name
    if bias:
        assert torch.equal(clean["dbias"][0], found["dbias"][0])


@interpreter
@pytest.mark.parametrize("window", [(4, 4), (7, 7), (9, 9)], ids=["packed", "unit", "blocks"])
def test_what_a_bias_has_for_places_outside_the_map_is_not_used(window):
    arguments = draw((1, 2, 8, 10, 11), window, (2, 3), bias=True)
    wh, ww = window
    places = arguments["bias"].view(2, wh, ww, wh, ww)
    alone = {**arguments, "query": arguments["query"][..., :2, :3], "key": arguments["key"][..., :2, :3],
             "value": arguments["value"][..., :2, :3]}  # fmt: skip
    before = run(alone, torch.ones(1, 2, 8, 2, 3))
    places[:, : wh - 2] = math.nan  # the one window is left with its last two rows and three columns
    places[:, :, : ww - 3] = math.inf
    places[:, :, :, : wh - 2] = math.nan
    places[:, :, :, :, : ww - 3] = -math.inf
    after = run(alone, torch.ones(1, 2, 8, 2, 3))
    assert all(torch.equal(before[name], after[name]) and after[name].isfinite().all() for name in before)


@interpreter
@pytest.mark.parametrize("window", [(4, 4), (7, 7), (9, 8)], ids=["packed", "unit", "blocks"])
def test_the_same_bits_in_every_run(window):
    arguments = draw((1, 2, 8, 10, 7), window, (1, 0), True, "packed", torch.float16)
    grad = torch.ones(1, 2, 8, 10, 7, dtype=torch.float16)
    first, second = (run(arguments, grad) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_why_not():
    q = torch.zeros(1, 1, 8, 4, 4)
    reason = kernels.why_not(q, q, q, (2, 2), (1, 1), None, 1.0)
    assert reason is None if INTERPRETED else "TRITON_INTERPRET" in reason
    assert kernels.why_not(*[q.to("meta")] * 3, (2, 2), (0, 0), None, 1.0) == "no Triton for device type meta"
    if INTERPRETED:
        assert "float64" in kernels.why_not(*[q.double()] * 3, (2, 2), (0, 0), None, 1.0)
        bias = torch.empty(1, 2**15, 2**15, device="meta")
        assert "bias spans" in kernels.why_not(q, q, q, (128, 256), (0, 0), bias, 1.0)
        bias = torch.empty(1, 1, 1, device="meta").expand(1, 2**30, 2**30)
        assert "places" in kernels.why_not(q, q, q, (2**15, 2**15), (1, 1), bias, 1.0)
        # Without a bias there is no use for places outside the map.
        assert kernels.why_not(q, q, q, (2**15, 2**15), (1, 1), None, 1.0) is None


def geometry(size: Pair, window: Pair, shift: Pair, bias: bool = False) -> Any:
    shape = (2, 3, 16, *size)
    strides = tuple((name, torch.empty(shape, device="meta").stride()) for name in "qkv")
    n = math.prod(window)
    return maps.Geometry(shape, strides, 2, 16, window, (n * n, n, 1) if bias else None, 2, shift)


def test_how_windows_are_planned():
    of = geometry((14, 14), (7, 7), (3, 3))
    assert (of.kind, of.tokens, of.units, of.starts) == (maps.CLIPPED, 49, 2 * 3 * 9, (-4, -4))
    of = geometry((14, 14), (7, 7), (0, 0))
    assert (of.kind, of.tokens, of.units, of.linear) == (maps.WINDOWS, 49, 2 * 3 * 4, False)
    # One window that is the whole map needs no division of its tokens.
    for bias in (False, True):
        of = geometry((7, 7), (7, 7), (0, 0), bias)
        assert (of.kind, of.tokens, of.units, of.linear) == (maps.PATCHES, 49, 6, True)
    assert geometry((7, 7), (9, 12), (0, 0)).linear and geometry((7, 7), (9, 12), (8, 7)).linear
    of = geometry((7, 7), (9, 12), (0, 0), bias=True)
    assert (of.kind, of.tokens, of.units) == (maps.CLIPPED, 108, 6)
    # What reaches beyond both ends takes no more places than the larger part.
    of = geometry((7, 7), (90, 7), (2, 0))
    assert (of.kind, of.tokens, of.units, of.starts) == (maps.CLIPPED, 35, 12, (-3, 0))


def test_launches_of_swin():
    device = configs.Device("none", "sm_90", 132)
    strides = (56 * 56 * 288, 32, 1, 56 * 288, 288)
    problem = plan.AttentionProblem(
        (128, 3, 32, 56, 56), tuple((name, strides) for name in "qkvg"), torch.bfloat16, "ieee", device,
        "window_attention", 32, (49 * 49, 49, 1), 2, (7, 7), (3, 3),
    )  # fmt: skip
    (forward,) = plan.forward_launches(problem)
    assert forward.name == "forward_rows" and forward.grid == 128 * 3 * 81 and forward.meta["ONE_PASS"]
    assert forward.meta["KIND"] == maps.CLIPPED and (forward.meta["LQ"], forward.meta["AQ"]) == (1, 8)
    backward, uses_rows, parts = plan.backward_launches(problem, True)
    assert [one.name for one in backward] == ["backward_unit", "sum_slices"] and not uses_rows and parts > 1
