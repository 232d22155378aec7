"""Rows whose softmax is 1 at one place, as large queries make them: their scores have no gradient, and a rounding error
in its place would be multiplied by the size of the queries. And rows in which one place has nearly all."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mvkernels import testing
from mvkernels.dispatch import checks
from mvkernels.dispatch.registry import OPS
from tests.ops.bridges import INSTRUCTION_SETS, assert_ok, interpreter, needs_cpp

ALIKE = {"mobile_to_former": ("query",), "former_to_mobile": ("x", "key"), "patch_attention": ("query", "key")}
ALIKE["window_attention"] = ALIKE["patch_attention"]
"""Of each op the tensors whose gradient comes through the scores alone."""


@pytest.fixture(params=[1, 3], ids=["one thread", "threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def peaked(
    name: str,
    shape: tuple[int, ...],
    count: int,
    size: float,
    mean: float,
    dtype: torch.dtype,
    strides: str,
    seed: int,
) -> dict[str, Any]:
    """Arguments of an op such that each row of scores has one highest by far: queries of ``size`` along one axis each,
    and of the keys one along each axis, among many near their mean."""
    generator = torch.Generator().manual_seed(seed)
    b, h, d, height, width = shape
    few, many = (b, h, count, d), (b, h, height * width, d)

    def queries(rows: tuple[int, ...]) -> torch.Tensor:
        axis = torch.randint(axes, rows[:3], generator=generator)
        return size * (torch.eye(d)[axis] + 0.02 * torch.randn(rows, generator=generator))

    def keys(rows: tuple[int, ...]) -> torch.Tensor:
        out = 0.3 * torch.randn(rows, generator=generator)
        out[:, :, :axes] += 8 * torch.eye(d)[:axes]
        return mean + out[:, :, torch.randperm(rows[2], generator=generator)]

    def on_map(tokens: torch.Tensor) -> torch.Tensor:
        values = tokens.transpose(2, 3).unflatten(3, (height, width)).to(dtype)
        out = testing.make_map(values.shape, strides, dtype)
        return out.copy_(values)

    if name == "mobile_to_former":
        axes = min(d, height * width)
        return {"query": queries(few).to(dtype), "x": on_map(keys(many)), "scale": 1.0}
    if name == "former_to_mobile":
        axes = min(d, count)
        key, value = keys(few).to(dtype), (mean + torch.randn(few, generator=generator)).to(dtype)
        return {"x": on_map(queries(many)), "key": key, "value": value, "scale": 1.0, "residual": False}
    axes = min(d, height * width)
    value = mean + torch.randn(many, generator=generator)
    maps = {"query": on_map(queries(many)), "key": on_map(keys(many)), "value": on_map(value)}
    if name == "window_attention":  # that rows meet the keys made for them, they all lie in one window
        return {**maps, "window_size": (height + 1, width), "scale": 1.0}
    return {**maps, "patch_size": 1, "scale": 1.0}


@st.composite
def problems(draw: Any, most: int, dtypes: tuple[torch.dtype, ...]) -> tuple[str, dict[str, Any]]:
    name = draw(st.sampled_from(sorted(ALIKE)))
    dtype = draw(st.sampled_from(dtypes))
    shape = (draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.sampled_from([4, 7, 16, 24, 36, 64, 88, 128])))
    side = min(most, 24) if name in ("patch_attention", "window_attention") else most
    shape += (draw(st.integers(1, side)), draw(st.integers(1, side)))
    size = draw(st.sampled_from([1e2, 1e3, 1e4, *([] if dtype == torch.float16 else [1e5])]))
    strides = draw(st.sampled_from([s for s in testing.STRIDES if s != "expanded"]))
    settings_ = draw(st.sampled_from([1, 2, 6, 9])), size, draw(st.sampled_from([0.0, 5.0, 20.0]))
    return name, peaked(name, shape, *settings_, dtype, strides, draw(st.integers(0, 2**31)))


def assert_no_gradient_through_scores(name: str, arguments: dict[str, Any], backend: str) -> None:
    op = OPS[name]
    arguments = dict(zip(inspect.signature(op.check).parameters, op.check(**arguments)))
    tensors = testing.tensors_in(arguments)
    doubles = testing.with_tensors(arguments, {n: t.double() for n, t in tensors.items()})
    dtype, shape = tensors["query" if "query" in tensors else "x"].dtype, op.reference(**doubles).shape
    cotangent = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    exact = testing.run(op.reference, doubles, list(tensors), cotangent.double())
    with testing.poisoned():
        found = testing.run(partial(op.function, backend=backend), arguments, list(tensors), cotangent)
    for each in tensors:
        actual, wanted = found[f"d{each}"], exact[f"d{each}"]
        if each in ALIKE[name]:
            assert wanted.abs().max() < 1e-20, "the softmax is not 1"
            assert not actual.count_nonzero(), each
        else:
            torch.testing.assert_close(actual, wanted.to(dtype), atol=1e-5, rtol=1e-2)


HALVES = (torch.float32, torch.float16, torch.bfloat16)


@needs_cpp("mobile_to_former")
@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS, indirect=True)
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(problem=problems(40, HALVES))
def test_cpp_leaves_no_rounding_error(instruction_set, threads, problem):
    assert_no_gradient_through_scores(*problem, "cpp")


@interpreter
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(problem=problems(11, HALVES[:2]))
def test_triton_leaves_no_rounding_error(problem):
    assert_no_gradient_through_scores(*problem, "triton")


@st.composite
def scaled(draw: Any, most: int, dtypes: tuple[torch.dtype, ...]) -> tuple[str, dict[str, Any]]:
    """Random arguments with queries of any size: rows from flat to a single weight, with all between them. Queries are
    normal, or nearly along one axis, and so are the keys then."""
    name = draw(st.sampled_from(sorted(ALIKE)))
    dtype = draw(st.sampled_from(dtypes))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    b, h, d = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.sampled_from([4, 7, 16, 24, 36, 64, 128]))
    many = (b, h, d, draw(st.integers(1, most)), draw(st.integers(1, most)))
    few = (b, h, draw(st.sampled_from([1, 2, 6, 9, 21, 64])), d)
    size = draw(st.sampled_from([1, 10, 1e2, 1e3, *([] if dtype == torch.float16 else [1e4, 1e5])]))
    mean = draw(st.sampled_from([0.0, 5.0, 20.0]))
    strides = draw(st.sampled_from([s for s in testing.STRIDES if s != "expanded"]))

    along_axes = draw(st.booleans())

    def random(shape: tuple[int, ...], channels: int) -> torch.Tensor:
        values = torch.randn(shape, generator=generator)
        if along_axes:
            which = torch.randint(d, values.select(channels, 0).shape, generator=generator).unsqueeze(channels)
            values = (0.01 * values).scatter_add_(channels, which, torch.ones(which.shape))
        return values

    def tokens(factor: float, mean: float) -> torch.Tensor:
        return (factor * random(few, 3) + mean).to(dtype)

    def a_map(factor: float, mean: float) -> torch.Tensor:
        return testing.make_map(many, strides, dtype).copy_((factor * random(many, 2) + mean).to(dtype))

    if name == "mobile_to_former":
        return name, {"query": tokens(size, 0), "x": a_map(1, mean)}
    if name == "former_to_mobile":
        key, value = tokens(1, mean), tokens(1, mean)
        return name, {"x": a_map(size, 0), "key": key, "value": value, "residual": draw(st.booleans())}
    found: dict[str, Any] = {"query": a_map(size, 0), "key": a_map(1, mean), "value": a_map(1, mean)}
    height, width = many[3:]
    if name == "window_attention":
        height = draw(st.integers(1, height))
        found |= {"window_size": (height, width), "shift": (draw(st.integers(0, height - 1)), 0)}
    else:
        found["patch_size"] = 1
    if draw(st.booleans()):
        found["bias"] = torch.randn(h, height * width, height * width, generator=generator).to(dtype)
    return name, found


@needs_cpp("mobile_to_former")
@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS, indirect=True)
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(problem=scaled(24, HALVES))
def test_cpp_with_queries_of_any_size(instruction_set, threads, problem):
    assert_ok(testing.check(OPS[problem[0]], problem[1], "cpp"))


@interpreter
@settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(problem=scaled(11, HALVES[:2]))
def test_triton_with_queries_of_any_size(problem):
    assert_ok(testing.check(OPS[problem[0]], problem[1], "triton"))


@interpreter
@pytest.mark.parametrize(("seed", "dim", "mean"), [(884060411, 16, 0), (108221873, 7, 20)])
def test_triton_with_nearly_one_weight_a_row(seed, dim, mean):
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(1, 1, dim, 12, 11, generator=generator) for _ in range(3))
    arguments = {"query": query * 1e4, "key": key, "value": value + mean, "patch_size": 1}
    assert_ok(testing.check(OPS["patch_attention"], arguments, "triton"))


@needs_cpp("mobile_to_former")
@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS, indirect=True)
@pytest.mark.parametrize("size", [1e3, 1e4], ids=str)
def test_a_token_with_large_queries(instruction_set, size):
    for seed in range(20):
        assert_ok(testing.check(OPS["mobile_to_former"], a_large_query(seed, size, 28), "cpp"))


@interpreter
@pytest.mark.parametrize("size", [1e3, 1e4], ids=str)
def test_triton_with_a_large_query(size):
    for seed in range(4):
        assert_ok(testing.check(OPS["mobile_to_former"], a_large_query(seed, size, 18), "triton"))


def a_large_query(seed: int, size: float, side: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    query, x = torch.randn(1, 1, 1, 16, generator=generator), torch.randn(1, 1, 16, side, side, generator=generator)
    return {"query": query * size, "x": x}


@needs_cpp("mobile_to_former")
@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS, indirect=True)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=checks.short)
@pytest.mark.parametrize("strides", ["contiguous", "channels_last"])
def test_half_types_on_maps_far_from_0(instruction_set, threads, dtype, strides):
    """The sum of dP, which is of large terms then, is not to be made of an output that was rounded."""
    generator = torch.Generator().manual_seed(0)
    for dim, side, mean in ((4, 28, 5.0), (16, 33, 20.0), (40, 56, 20.0)):
        x = testing.make_map((1, 2, dim, side, side), strides, torch.float32, generator=generator)
        x = x.copy_(x + mean).to(dtype)
        query = torch.randn(1, 2, 3, dim, generator=generator).to(dtype)
        assert_ok(testing.check(OPS["mobile_to_former"], {"query": query, "x": x}, "cpp"))


@interpreter
@pytest.mark.parametrize("mean", [5.0, 20.0])
def test_triton_half_types_in_groups_of_several_blocks(mean):
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        query, key, value = torch.randn(3, 1, 1, 16, 9, 9, generator=generator)
        arguments = {"query": query.half(), "key": (key + mean).half(), "value": (value + mean).half()}
        assert_ok(testing.check(OPS["patch_attention"], {**arguments, "patch_size": 1}, "triton"))
