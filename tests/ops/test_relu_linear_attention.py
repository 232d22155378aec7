"""ReLU linear attention: the reference against its definition, every backend against the reference."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import mvkernels
from mvkernels import testing
from mvkernels.dispatch import checks
from mvkernels.dispatch.registry import OPS
from tests.ops import bridges
from tests.ops.bridges import DEVICE, INSTRUCTION_SETS, assert_ok, interpreter, needs_device

OP = OPS["relu_linear_attention"]
NAMES = ("query", "key", "value")
needs_cpp = bridges.needs_cpp(OP.name)
KERNELS = [pytest.param("cpp", marks=needs_cpp), pytest.param("triton", marks=bridges.INTERPRETER)]
EVERY = ["reference", *KERNELS]


@st.composite
def problems(draw, dtypes=bridges.DTYPES, device="cpu", most=14, heads=3):
    """Any shape, strides of each map, dtype and eps."""
    dtype = draw(st.sampled_from(dtypes))
    dims = [1, 3, 8, 16, 24, 32] + ([48, 64] if dtype != torch.float64 else [])
    shape = (draw(st.integers(1, 2)), draw(st.integers(1, heads)), draw(st.sampled_from(dims)))
    shape += (draw(st.integers(1, most)), draw(st.integers(1, most)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    kinds = [draw(st.sampled_from(testing.STRIDES)) for _ in NAMES]
    arguments = {n: testing.make_map(shape, kind, dtype, device, generator) for n, kind in zip(NAMES, kinds)}
    return arguments | ({"eps": draw(st.sampled_from([1e-5, 1.0]))} if draw(st.booleans()) else {})


def by_definition(query, key, value, eps=1e-15):
    """All pairs of pixels, weighed one by one."""
    q, k, v = (m.flatten(3).transpose(-2, -1) for m in (query.clamp(min=0), key.clamp(min=0), value))
    weights = (q[:, :, :, None] * k[:, :, None]).sum(-1)
    out = (weights[..., None] * v[:, :, None]).sum(3) / (weights.sum(-1, keepdim=True) + eps)
    return out.transpose(-2, -1).reshape(query.shape)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(problems(dtypes=(torch.float64,), most=7))
def test_the_reference_is_the_definition(arguments):
    torch.testing.assert_close(OP.reference(**arguments), by_definition(**arguments), rtol=1e-9, atol=1e-9)


@pytest.mark.core
@needs_cpp
@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS, indirect=True)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(arguments=problems())
def test_cpp_on_any_shape_stride_and_dtype(instruction_set, arguments):
    assert_ok(testing.check(OP, arguments, "cpp"))


@needs_device
@settings(max_examples=200, deadline=None)
@given(problems(device=DEVICE, most=40))
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
@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(problems(dtypes=(torch.float32, torch.float16, torch.float64), most=9, heads=2))
def test_triton_on_any_shape_stride_and_dtype(arguments):
    assert_ok(testing.check(OP, arguments, "triton"))


@interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=checks.short)
def test_triton_sums_slices_of_pixels(dtype):
    from mvkernels.ops.relu_linear_attention.triton import launcher, plan

    maps = [testing.make_map((1, 1, 24, 19, 23), "contiguous", dtype) for _ in range(7)]
    for launches_of, names in (
        (plan.forward_launches, ("q", "k", "v", "o")),
        (plan.backward_launches, ("g", "q", "k", "v", "dq", "dk", "dv")),
    ):
        launches, slices = launches_of(launcher.problem_of(list(zip(names, maps))))
        assert slices > 1 and [one.meta.get("STAGE") for one in launches] == [1, None, 2]
    assert_ok(testing.check(OP, dict(zip(NAMES, maps)), "triton"))


@interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=checks.short)
def test_triton_with_the_sums_as_left_operand(monkeypatch, dtype):
    from mvkernels.ops.relu_linear_attention.triton import launcher, plan
    from mvkernels.triton import configs

    maps = [testing.make_map((1, 2, 48, 5, 7), "contiguous", dtype) for _ in range(7)]
    problem = launcher.problem_of(list(zip(("g", "q", "k", "v", "dq", "dk", "dv"), maps)))
    assert not plan.turned(problem)
    monkeypatch.setattr(plan, "turned", lambda problem: True)
    configs.forget()
    try:
        assert plan.backward_launches(problem)[0][0].meta["TURN"]
        assert_ok(testing.check(OP, dict(zip(NAMES, maps)), "triton"))
    finally:
        configs.forget()


def test_the_sums_are_the_left_operand_where_warps_share_rows():
    from mvkernels.triton.configs import Device
    from mvkernels.triton.problem import Problem

    plan = pytest.importorskip("mvkernels.ops.relu_linear_attention.triton.plan")
    found = {}
    for arch in ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942"):
        for d, side, dtype in (
            (64, 8, torch.bfloat16),
            (32, 8, torch.bfloat16),
            (64, 4, torch.half),
            (64, 8, torch.float),
        ):
            shape = (1, 1, d, side, side)
            problem = Problem(shape, (), dtype, "ieee", Device("test", arch, 1))
            found[arch, d, side, dtype] = plan.turned(problem)
    assert {key for key, turned in found.items() if turned} == {
        (arch, 64, 8, torch.bfloat16) for arch in ("sm_80", "sm_89", "sm_120")
    }


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("kind", ["contiguous", "packed", "sliced", "expanded"])
def test_opcheck(backend, kind):
    namespace = getattr(torch.ops, f"mvkernels_{backend}")
    query, key, value, grad = (testing.make_map((2, 3, 5, 4, 6), kind) for _ in range(4))
    torch.library.opcheck(namespace.relu_linear_attention_forward, (query, key, value, 1e-5))
    _, *sums = namespace.relu_linear_attention_forward(query, key, value, 1e-5)
    torch.library.opcheck(namespace.relu_linear_attention_backward, (grad, query, key, value, *sums, 1e-5))


@pytest.mark.parametrize("backend", EVERY)
def test_float16_of_magnitude_50_is_finite_and_accurate(backend):
    """The sums are past what float16 holds, by far; nothing else may be."""
    side = 36 if backend == "triton" else 128
    generator = torch.Generator().manual_seed(0)
    maps = [50 * testing.make_map((1, 1, 16, side, side), "contiguous", generator=generator) for _ in NAMES]
    arguments = {n: m.clamp(-50, 50).half() for n, m in zip(NAMES, maps)}
    assert_ok(testing.check(OP, arguments, backend))
    wide = {n: m.float().requires_grad_() for n, m in arguments.items()}
    with torch.autocast("cpu", dtype=torch.float16):
        out = mvkernels.relu_linear_attention(**wide, backend=backend)
    exact = OP.reference(**{n: m.double() for n, m in arguments.items()})
    assert out.dtype == torch.float16 and (out - exact).abs().max() <= 2**-10 * exact.abs().max()
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.float().sum(), list(wide.values())))


@pytest.mark.parametrize("backend", EVERY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=checks.short)
@pytest.mark.parametrize("which", ["query", "key"])
def test_nothing_above_zero_gives_zero(backend, dtype, which):
    arguments = {n: testing.make_map((1, 2, 8, 5, 6), "channels_last", dtype) for n in NAMES}
    arguments[which] = -arguments[which].abs()
    leaves = {n: m.clone().requires_grad_() for n, m in arguments.items()}
    out = mvkernels.relu_linear_attention(**leaves, backend=backend)
    assert not out.any()
    grads = torch.autograd.grad(out.sum(), list(leaves.values()))
    assert all(g.isfinite().all() for g in grads) and not grads[NAMES.index(which)].any()


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", NAMES)
def test_nan_and_infinity_stay_in_their_rows(backend, bad, which):
    generator = torch.Generator().manual_seed(0)
    arguments = {n: testing.make_map((1, 2, 5, 10, 13), "contiguous", generator=generator) for n in NAMES}
    arguments[which][0, 1, 2, 2, 1] = bad
    with testing.poisoned():
        out = mvkernels.relu_linear_attention(**arguments, backend=backend)
    exact = OP.reference(**{n: m.double() for n, m in arguments.items()})
    assert torch.equal(out.isfinite(), exact.isfinite())
    assert testing.max_error(out.nan_to_num(7, 8, 9), exact.nan_to_num(7, 8, 9)) < 1e-5


@pytest.mark.parametrize("backend", EVERY)
def test_invariants(backend):
    """The order of pixels does not matter; the size of a query does not; no value is exceeded."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (testing.make_map((2, 2, 6, 7, 9), "contiguous", torch.float64, generator=generator) for _ in NAMES)
    out = mvkernels.relu_linear_attention(q, k, v, backend=backend)
    order = torch.randperm(63, generator=generator)
    shuffled = [m.flatten(3)[..., order].unflatten(3, (7, 9)) for m in (q, k, v)]
    expected = out.flatten(3)[..., order].unflatten(3, (7, 9))
    torch.testing.assert_close(mvkernels.relu_linear_attention(*shuffled, backend=backend), expected)
    torch.testing.assert_close(mvkernels.relu_linear_attention(3 * q, k, v, backend=backend), out)
    assert (out.abs() <= v.abs().amax((-2, -1), keepdim=True) + 1e-12).all()


@pytest.mark.parametrize("backend", KERNELS)
def test_only_inputs_and_their_sums_are_saved(backend):
    maps = [torch.randn(2, 2, 8, 6, 6, requires_grad=True) for _ in NAMES]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        mvkernels.relu_linear_attention(*maps, backend=backend)
    assert {m.data_ptr() for m in maps} <= {t.data_ptr() for t in saved}
    assert sum(t.numel() for t in saved) == 3 * maps[0].numel() + 2 * 2 * 9 * 8


MAP = (1, 2, 4, 6, 5)
BAD = {
    "query rank": (ValueError, "query has 4 axes", lambda: ((torch.zeros(MAP[1:]), *[torch.zeros(MAP)] * 2), {})),
    "key": (ValueError, "axis 2", lambda: ((torch.zeros(MAP), torch.zeros(1, 2, 3, 6, 5), torch.zeros(MAP)), {})),
    "value": (ValueError, "axis 4", lambda: ((torch.zeros(MAP), torch.zeros(MAP), torch.zeros(1, 2, 4, 6, 4)), {})),
    "H = 0": (ValueError, "H is 0", lambda: ([torch.zeros(1, 2, 4, 0, 5)] * 3, {})),
    "heads = 0": (ValueError, "heads is 0", lambda: ([torch.zeros(1, 0, 4, 6, 5)] * 3, {})),
    "eps": (TypeError, "eps is '1'", lambda: ([torch.zeros(MAP)] * 3, {"eps": "1"})),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    error, message, make = BAD[name]
    args, kwargs = make()
    with pytest.raises(error, match=message) as caught:
        mvkernels.relu_linear_attention(*args, **kwargs)
    assert "\n" not in str(caught.value) and str(caught.value).startswith("relu_linear_attention: ")
    assert not mvkernels.can_run("relu_linear_attention", "reference", *args, **kwargs)[0]


def test_why_not():
    maps = [torch.zeros(1, 1, 257, 2, 2)] * 3
    for backend in ("cpp", "triton", "cuda"):
        runs, reason = mvkernels.can_run("relu_linear_attention", backend, *maps)
        assert not runs and reason
    assert mvkernels.relu_linear_attention(*maps).shape == maps[0].shape


@interpreter
@pytest.mark.parametrize(("dtype", "most"), [("float16", 64), ("float32", 64), ("float64", 32)])
def test_triton_says_the_widest_head_that_it_takes(dtype, most):
    for d, wanted in ((most, (True, "")), (most + 1, (False, f"head_dim {most + 1}: want at most {most} in {dtype}"))):
        maps = [torch.zeros(1, 1, d, 2, 2, dtype=getattr(torch, dtype))] * 3
        assert mvkernels.can_run("relu_linear_attention", "triton", *maps) == wanted
        qkv, deep, wide = (
            maps[0].new_zeros(1, 3 * d, 2, 2),
            maps[0].new_zeros(3 * d, 1, 3, 3),
            maps[0].new_zeros(3 * d, d, 1, 1),
        )
        assert mvkernels.can_run("multiscale_linear_attention", "triton", qkv, [deep], [wide], head_dim=d) == wanted
