"""Former to Mobile: the reference against its definition, every backend against the reference."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings

import mvkernels
from mvkernels import testing
from mvkernels.dispatch import checks
from mvkernels.dispatch.registry import OPS
from tests.ops import bridges
from tests.ops.bridges import DEVICE, INSTRUCTION_SETS, assert_ok, interpreter, needs_device, tokens

OP = OPS["former_to_mobile"]
NAMES = ("x", "key", "value")
needs_cpp = bridges.needs_cpp(OP.name)
KERNELS = [pytest.param("cpp", marks=needs_cpp), pytest.param("triton", marks=bridges.INTERPRETER)]


def by_definition(x, key, value, scale=None, residual=True):
    """Pixel by pixel, exponentials and their sum spelt out."""
    out = x.clone() if residual else torch.zeros_like(x)
    scale = x.shape[2] ** -0.5 if scale is None else scale
    for row in range(x.shape[3]):
        for column in range(x.shape[4]):
            score = (key * x[:, :, None, :, row, column]).sum(-1) * scale
            weight = (score - score.amax(-1, keepdim=True)).exp()
            weight = weight / weight.sum(-1, keepdim=True)
            out[..., row, column] += (weight[..., None] * value).sum(2)
    return out


@settings(max_examples=40, deadline=None, derandomize=True)
@given(bridges.problems(NAMES, dtypes=(torch.float64,), residual=True))
def test_the_reference_is_the_definition(arguments):
    arguments["x"] = arguments["x"].contiguous()  # an expanded map cannot be added to in place
    torch.testing.assert_close(OP.reference(**arguments), by_definition(**arguments), rtol=1e-9, atol=1e-9)


@pytest.mark.core
@needs_cpp
@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS, indirect=True)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(arguments=bridges.problems(NAMES, residual=True))
def test_cpp_on_any_shape_stride_and_dtype(instruction_set, arguments):
    assert_ok(testing.check(OP, arguments, "cpp"))


@needs_cpp
@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS, indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=checks.short)
def test_cpp_on_the_suite(instruction_set, dtype):
    for case in OP.suite("full"):
        if case.shape["height"] > 28:
            continue
        for layout in case.layouts:
            assert_ok(testing.check(OP, case.make(batch=2, dtype=dtype, layout=layout), "cpp"))


@needs_device
@settings(max_examples=200, deadline=None)
@given(bridges.problems(NAMES, device=DEVICE, most=40, residual=True))
def test_the_device_on_any_shape_stride_and_dtype(arguments):
    assert mvkernels.can_run(OP.name, "triton", **arguments) == (True, "")
    assert_ok(testing.check(OP, arguments, "triton"))


@needs_device
@pytest.mark.parametrize("dtype", bridges.DTYPES, ids=checks.short)
def test_the_device_on_the_suite(dtype):
    for case in OP.suite("full"):
        for layout in case.layouts:
            assert_ok(testing.check(OP, case.make(batch=3, dtype=dtype, device=DEVICE, layout=layout), "triton"))


@interpreter
@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(bridges.problems(NAMES, dtypes=(torch.float32, torch.float16, torch.float64), residual=True))
def test_triton_on_any_shape_stride_and_dtype(arguments):
    assert_ok(testing.check(OP, arguments, "triton"))


@interpreter
@settings(max_examples=4, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    bridges.problems(
        NAMES, (torch.float32, torch.float64, torch.float16), most=6, head_dims=bridges.WIDE_HEAD_DIMS, residual=True
    )
)
def test_triton_on_wide_heads(arguments):
    assert mvkernels.can_run(OP.name, "triton", **arguments) == (True, "")
    assert_ok(testing.check(OP, arguments, "triton"))


@interpreter
@pytest.mark.parametrize("m", [4, 20])
@pytest.mark.parametrize("shape", [(1, 1, 6, 11, 15), (1, 2, 24, 13, 13)])
def test_triton_adds_up_slices_of_pixels(shape, m):
    from mvkernels.ops.former_to_mobile.triton import plan
    from mvkernels.triton.bridge import plan as bridge

    generator = torch.Generator().manual_seed(0)
    x = testing.make_map(shape, "contiguous", generator=generator)
    key, value = (tokens((*shape[:2], m, shape[2]), "split", x.dtype, "cpu", generator) for _ in range(2))
    problem = bridge.problem_of(OP.name, x, m, (("g", x), ("x", x), ("k", key), ("v", value)), True)
    launches, slices = plan.backward_launches(problem)
    first = ["backward_slices"] * (1 if m <= 16 else 2)
    assert slices > 1 and [one.name for one in launches] == [*first, "sum_slices"]
    assert_ok(testing.check(OP, {"x": x, "key": 4 * key, "value": value}, "triton"))


@interpreter
@pytest.mark.parametrize("m", [3, 20])
def test_triton_adds_up_slices_of_pixels_of_wide_heads(m):
    from mvkernels.ops.former_to_mobile.triton import plan
    from mvkernels.triton.bridge import plan as bridge

    generator = torch.Generator().manual_seed(0)
    x = testing.make_map((1, 1, 70, 17, 19), "transposed", generator=generator)
    key, value = (tokens((1, 1, m, 70), "strided", x.dtype, "cpu", generator) for _ in range(2))
    problem = bridge.problem_of(OP.name, x, m, (("g", x), ("x", x), ("k", key), ("v", value)), True)
    launches, slices = plan.backward_launches(problem)
    first = ["backward_wide"] * (1 if m <= 16 else 2)
    assert slices > 1 and [one.name for one in launches] == [*first, "sum_slices"]
    assert_ok(testing.check(OP, {"x": x, "key": key, "value": value}, "triton"))


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("kind", ["contiguous", "packed", "sliced", "transposed", "expanded"])
def test_opcheck(backend, kind):
    generator = torch.Generator().manual_seed(0)
    namespace = getattr(torch.ops, f"mvkernels_{backend}")
    x, grad = (testing.make_map((2, 3, 5, 4, 6), lie, generator=generator) for lie in (kind, "transposed"))
    key, value = (tokens((2, 3, 4, 5), lie, torch.float32, "cpu", generator) for lie in ("split", "strided"))
    torch.library.opcheck(namespace.former_to_mobile_forward, (x, key, value, 0.4, True))
    torch.library.opcheck(namespace.former_to_mobile_backward, (grad, x, key, value, 0.4, False))


def _tensor(*shape):
    return torch.randn(*shape)


X, K = (1, 2, 4, 6, 5), (1, 2, 3, 4)
BAD = {
    "x rank": (ValueError, "x has 4 axes", lambda: ((_tensor(*K), _tensor(*K), _tensor(*K)), {})),
    "key rank": (ValueError, "key has 5 axes", lambda: ((_tensor(*X), _tensor(*X), _tensor(*K)), {})),
    "value rank": (ValueError, "value has 5 axes", lambda: ((_tensor(*X), _tensor(*K), _tensor(*X)), {})),
    "batch": (ValueError, "differ along axis 0", lambda: ((_tensor(*X),) + (_tensor(2, 2, 3, 4),) * 2, {})),
    "heads": (ValueError, "differ along axis 1", lambda: ((_tensor(*X), _tensor(*K), _tensor(1, 1, 3, 4)), {})),
    "head_dim": (ValueError, "differ in head_dim", lambda: ((_tensor(*X), _tensor(*K), _tensor(1, 2, 3, 5)), {})),
    "tokens": (ValueError, "differ along axis 2", lambda: ((_tensor(*X), _tensor(*K), _tensor(1, 2, 2, 4)), {})),
    "M = 0": (ValueError, "M is 0", lambda: ((_tensor(*X),) + (_tensor(1, 2, 0, 4),) * 2, {})),
    "H = 0": (ValueError, "H is 0", lambda: ((_tensor(1, 2, 4, 0, 5),) + (_tensor(*K),) * 2, {})),
    "W = 0": (ValueError, "W is 0", lambda: ((_tensor(1, 2, 4, 6, 0),) + (_tensor(*K),) * 2, {})),
    "heads = 0": (ValueError, "heads is 0", lambda: ((_tensor(1, 0, 4, 6, 5),) + (_tensor(1, 0, 3, 4),) * 2, {})),
    "head_dim = 0": (ValueError, "head_dim is 0", lambda: ((_tensor(1, 2, 0, 6, 5),) + (_tensor(1, 2, 3, 0),) * 2, {})),
    "scale": (TypeError, "scale is '1'", lambda: ((_tensor(*X), _tensor(*K), _tensor(*K)), {"scale": "1"})),
    "residual": (TypeError, "residual is 1", lambda: ((_tensor(*X), _tensor(*K), _tensor(*K)), {"residual": 1})),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    error, message, make = BAD[name]
    args, kwargs = make()
    with pytest.raises(error, match=message) as caught:
        mvkernels.former_to_mobile(*args, **kwargs)
    assert "\n" not in str(caught.value) and str(caught.value).startswith("former_to_mobile: ")
    runs, reason = mvkernels.can_run("former_to_mobile", "reference", *args, **kwargs)
    assert not runs and reason


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", NAMES)
@pytest.mark.parametrize("m", [3, 20])
def test_nan_and_infinity_stay_in_their_rows(backend, bad, which, m):
    torch.manual_seed(0)
    arguments = {"x": torch.randn(1, 2, 5, 6, 7), "key": torch.randn(1, 2, m, 5), "value": torch.randn(1, 2, m, 5)}
    arguments[which][(0, 1, 2, 3, 4)[: arguments[which].dim()]] = bad
    with testing.poisoned():
        out = mvkernels.former_to_mobile(**arguments, backend=backend)
    exact = OP.reference(**{n: m.double() for n, m in arguments.items()})
    assert torch.equal(out.isfinite(), exact.isfinite())
    assert testing.max_error(out.nan_to_num(7, 8, 9), exact.nan_to_num(7, 8, 9)) < 1e-5


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("m", [3, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=checks.short)
def test_scores_of_any_size(backend, m, dtype):
    """Attention to one token, scores past what 24 bits count, scales of 0 and near it: finite as the reference is."""
    torch.manual_seed(0)
    x, key, value = (torch.randn(1, 1, *shape).to(dtype) for shape in ((8, 6, 6), (m, 8), (m, 8)))
    for factor, scale in ((1e5, None), (1e5, 1e4), (1.0, 3e8), (1.0, 0.0), (1.0, 1e-40), (1.0, -1e6)):
        inputs = [t.requires_grad_() for t in (x * factor, key * factor, value.clone())]
        for name in (backend, "reference"):
            out = mvkernels.former_to_mobile(*inputs, scale=scale, backend=name)
            assert out.isfinite().all()
            assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum() / factor, inputs))


@pytest.mark.parametrize("backend", KERNELS)
def test_only_inputs_are_saved(backend):
    inputs = [torch.randn(*shape, requires_grad=True) for shape in ((2, 2, 8, 6, 6), (2, 2, 3, 8), (2, 2, 3, 8))]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        mvkernels.former_to_mobile(*inputs, backend=backend)
    assert {t.data_ptr() for t in saved} == {t.data_ptr() for t in inputs} and len(saved) == 3


@pytest.mark.parametrize("backend", ["reference", *KERNELS])
def test_invariants(backend):
    """The order of tokens does not matter; equal values come out; the residual is a sum; linear in the value."""
    torch.manual_seed(0)
    x, key, value = (torch.randn(2, 2, *shape).double() for shape in ((6, 5, 7), (5, 6), (5, 6)))

    def f(key, value, residual=True):
        return mvkernels.former_to_mobile(x, key, value, residual=residual, backend=backend)

    out, order = f(key, value), torch.randperm(5)
    torch.testing.assert_close(f(key[:, :, order], value[:, :, order]), out)
    torch.testing.assert_close(f(key, value, residual=False) + x, out)
    torch.testing.assert_close(f(key, 3 * value, residual=False), 3 * f(key, value, residual=False))
    same = value[:, :, :1].expand_as(value)
    torch.testing.assert_close(f(key, same), x + same[:, :, 0, :, None, None])


def test_why_not():
    x, key = torch.zeros(1, 1, 257, 2, 2), torch.zeros(1, 1, 2, 257)
    for backend in ("cpp", "triton"):
        runs, reason = mvkernels.can_run("former_to_mobile", backend, x, key, key)
        assert not runs and reason
        runs, reason = mvkernels.can_run("former_to_mobile", backend, *(t.to("meta") for t in (x, key, key)))
        assert not runs and reason
    assert mvkernels.former_to_mobile(x, key, key).shape == x.shape


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("strides", ["contiguous", "channels_last"])
@pytest.mark.parametrize("count", [17, 128])
def test_a_large_map_is_added_once_to_the_sum_over_all_tokens(backend, strides, count):
    generator = torch.Generator().manual_seed(0)
    x = testing.make_map((1, 2, 16, 5, 7), strides, generator=generator)
    key, value = torch.randn(2, 1, 2, count, 16, generator=generator)
    assert_ok(testing.check(OP, {"x": x.mul_(1e4), "key": key, "value": value, "scale": 1e-4}, backend))
