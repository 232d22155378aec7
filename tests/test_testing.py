"""The criterion that everything else relies on can say no."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mvkernels import testing
from mvkernels.dispatch import checks, extension
from mvkernels.dispatch.registry import OPS

OP = OPS["patch_attention"]


def arguments(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    maps = (testing.make_map((1, 2, 8, 6, 8), "packed", dtype, generator=generator) for _ in range(3))
    return dict(zip(("query", "key", "value"), maps), patch_size=(2, 2))


@pytest.mark.core
def test_the_reference_passes_and_a_wrong_kernel_does_not():
    assert all(c.ok for c in testing.check(OP, arguments(), "reference"))

    def wrong_scale(backend=None, **kwargs):
        return OP.reference(**{**kwargs, "scale": 0.36})

    def one_pixel(backend=None, **kwargs):
        out = OP.reference(**kwargs)
        return out + torch.zeros_like(out).index_fill(3, torch.tensor([5]), 1e-4)

    def unwritten(backend=None, **kwargs):
        out = torch.empty(kwargs["value"].shape)
        good = OP.reference(**kwargs)
        return torch.cat([good[..., :-1], out[..., -1:]], -1)

    for wrong in (wrong_scale, one_pixel):
        comparisons = testing.check(OP, arguments(), "reference", function=wrong)
        assert not all(c.ok for c in comparisons)
    comparisons = testing.check(OP, arguments(), "reference", backward=False, function=unwritten)
    assert comparisons[0].error == math.inf and "WRONG" in str(comparisons[0])


def test_a_blur_below_the_largest_error_is_seen_by_the_root_mean_square():
    exact = torch.zeros(1000, dtype=torch.float64)
    baseline = exact.clone()
    baseline[0] = 1e-3
    blurred = torch.full((1000,), 1e-3)
    comparison = testing.compare("x", blurred, exact, baseline)
    assert not comparison.ok and "root mean square" in comparison.detail
    assert testing.compare("x", baseline, exact, baseline).ok


@pytest.mark.parametrize(
    ("actual", "exact", "error"),
    [
        ([math.nan], [math.nan], 0.0),
        ([math.inf], [math.inf], 0.0),
        ([math.inf], [-math.inf], math.inf),
        ([math.nan], [1.0], math.inf),
        ([1.0], [math.nan], math.inf),
        ([1.0], [1.5], 0.5),
        ([], [], 0.0),
        ([1.0], [1.0, 2.0], math.inf),
    ],
)
def test_max_error(actual, exact, error):
    assert testing.max_error(torch.tensor(actual), torch.tensor(exact, dtype=torch.float64)) == error


def test_a_baseline_that_overflows_gives_no_licence():
    exact = torch.tensor([1.0], dtype=torch.float64)
    assert not testing.compare("x", torch.tensor([9.0]), exact, torch.tensor([math.inf])).ok


def test_poison_reaches_python_and_cpp_buffers_and_goes_away():
    with testing.poisoned():
        assert torch.empty(3).isnan().all() and torch.empty_like(torch.ones(2)).isnan().all()
        assert torch.ones(2).new_empty(3).isnan().all()
        assert torch.empty(3, dtype=torch.int64).dtype == torch.int64
        if extension.module is not None:
            assert extension.module.set_poison(True) is True
    assert torch.empty is not None and not hasattr(torch.empty, "__wrapped__")
    if extension.module is not None:
        assert extension.module.set_poison(False) is False


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.sampled_from(testing.STRIDES), st.tuples(*[st.integers(1, 4)] * 5))
def test_make_map(kind, shape):
    made = testing.make_map(shape, kind)
    assert made.shape == shape and made.isfinite().all()
    if kind in ("channels_last", "packed"):
        assert checks.channels_last(made)
    storage = torch.empty(0, dtype=made.dtype).set_(made.untyped_storage())
    if kind in ("packed", "sliced", "offset"):
        assert storage.isnan().any()
    with pytest.raises(ValueError, match="unknown strides"):
        testing.make_map(shape, "spiral")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_exact_value_rounded_once_is_right_where_the_formula_overflows(dtype):
    exact = 3e4 * torch.rand(50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    overflown = torch.full((50,), float("inf"), dtype=dtype)
    assert testing.compare("out", exact.to(dtype), exact, overflown).ok
    step = torch.finfo(dtype).eps * 3e4
    assert not testing.compare("out", (exact + 3 * step).to(dtype), exact, overflown).ok


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_exact_value_that_the_dtype_cannot_hold_may_be_infinite(dtype):
    most = torch.finfo(dtype).max
    exact = torch.tensor([1.0, 3 * most, -1.5 * most], dtype=torch.float64)
    assert testing.compare("out", exact.to(dtype), exact, exact.to(dtype)).ok
    for wrong in (torch.tensor([1.0, most / 4, -most]), torch.tensor([float("inf"), most, -most]), -exact):
        assert not testing.compare("out", wrong.to(dtype), exact, exact.to(dtype)).ok
    assert not testing.compare("out", torch.tensor([most], dtype=dtype), torch.tensor([float("inf")]), exact[:1]).ok


def test_half_types_may_err_as_float32_does_where_their_formula_is_exact_by_luck():
    """Keys that are all the same: in float16 the weights are 1/N and what they leave of the gradient is exactly 0."""
    generator = torch.Generator().manual_seed(0)
    query, value = torch.randn(2, 1, 2, 100, 2, 3, generator=generator).half()
    arguments = {"query": query, "key": torch.full_like(query, 100), "value": value + 100, "patch_size": 2}
    assert all(each.ok for each in testing.check(OP, arguments, "reference"))
