"""Patch attention between maps of two sizes, and with keys and values that all heads share."""

import math

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

OP = OPS["patch_attention"]
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
needs_cpp = bridges.needs_cpp("patch_attention")


def by_definition(query, key, value, patch_size=1, bias=None, scale=None):
    scores = torch.einsum("bhdi,bhdj->bhij", query.flatten(3), key.flatten(3)) * (scale or query.shape[2] ** -0.5)
    scores = scores if bias is None else scores + bias
    out = torch.einsum("bhij,bhdj->bhdi", scores.softmax(-1), value.flatten(3))
    return out.unflatten(3, query.shape[3:])


@st.composite
def problems(draw, dtypes=DTYPES, most=12):
    """Arguments: two maps of any sizes, any stride kinds and dtype."""
    dtype = draw(st.sampled_from(dtypes))
    b, h = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    d = draw(st.sampled_from([1, 3, 4, 8, 16, 20, 36, 64, 100]))
    dv = draw(st.sampled_from([d, draw(st.integers(1, 70))]))
    sizes = [(draw(st.integers(1, most)), draw(st.integers(1, most))) for _ in range(2)]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    arguments = {}
    for name, dim, size in (("query", d, sizes[0]), ("key", d, sizes[1]), ("value", dv, sizes[1])):
        kind = draw(st.sampled_from([*testing.STRIDES, "one head"]))
        if kind == "one head":
            arguments[name] = testing.make_map((b, 1, dim, *size), "channels_last", dtype, "cpu", generator)
            arguments[name] = arguments[name].expand(-1, h, -1, -1, -1)
        else:
            arguments[name] = testing.make_map((b, h, dim, *size), kind, dtype, "cpu", generator)
    arguments["patch_size"] = (1, 1)
    if draw(st.booleans()):
        n, m = (math.prod(size) for size in sizes)
        full = torch.randn(h, n, m + 3, generator=generator).to(dtype)
        arguments["bias"] = full[..., 1 : m + 1] if draw(st.booleans()) else full.mT.contiguous().mT[..., :m]
    if draw(st.booleans()):
        arguments["scale"] = draw(st.sampled_from([0.1, 0.3, -0.4]))
    return arguments


@settings(max_examples=60, deadline=None, derandomize=True)
@given(problems(dtypes=(torch.float64,)))
def test_the_reference_is_the_definition(arguments):
    torch.testing.assert_close(OP.reference(**arguments), by_definition(**arguments), rtol=1e-9, atol=1e-9)


@pytest.mark.core
@needs_cpp
@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS, indirect=True)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(arguments=problems())
def test_cpp_on_any_maps(instruction_set, arguments):
    assert_ok(testing.check(OP, arguments, "cpp"))


@needs_cpp
@pytest.mark.parametrize("threads", [1, 5])
@pytest.mark.parametrize(
    "sizes", [((3, 3), (31, 33)), ((31, 33), (3, 3)), ((20, 20), (18, 19))], ids=["few", "many", "blocks"]
)
def test_cpp_on_many_keys_or_queries_over_threads(threads, sizes):
    generator = torch.Generator().manual_seed(0)
    maps = [testing.make_map((1, 2, 16, *size), "channels_last", generator=generator) for size in (*sizes, sizes[1])]
    arguments = {**dict(zip(("query", "key", "value"), maps)), "patch_size": 1}
    bias = torch.randn(2, *(math.prod(size) for size in sizes), generator=generator)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_ok(testing.check(OP, arguments, "cpp"))
        assert_ok(testing.check(OP, {**arguments, "bias": bias}, "cpp"))
    finally:
        torch.set_num_threads(before)


@needs_cpp
@pytest.mark.parametrize("kind", testing.STRIDES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=checks.short)
def test_opcheck(kind, dtype):
    q, k, v = (
        testing.make_map((2, 3, dim, *size), kind, dtype) for dim, size in ((5, (4, 6)), (5, (2, 5)), (7, (2, 5)))
    )
    bias = torch.randn(3, 24, 10).to(dtype)
    operators = torch.ops.mvkernels_cpp.patch_attention_forward, torch.ops.mvkernels_cpp.patch_attention_backward
    torch.library.opcheck(operators[0], (q, k, v, 1, 1, bias, 0.4))
    grad = testing.make_map((2, 3, 7, 4, 6), kind, dtype)
    torch.library.opcheck(operators[1], (grad, q, k, v, 1, 1, bias, 0.4, True))


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpp", marks=needs_cpp)])
def test_gradients_of_keys_that_all_heads_share(backend):
    """As MobileNetV4's multi-query attention has them: autograd sums over the heads."""
    torch.manual_seed(0)
    q = torch.randn(2, 4, 6, 5, 4, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(2, 1, dim, 3, 2, dtype=torch.float64, requires_grad=True) for dim in (6, 3))

    def f(q, k, v):
        shared = (m.expand(-1, 4, -1, -1, -1) for m in (k, v))
        return mvkernels.patch_attention(q, *shared, 1, backend=backend)

    assert torch.autograd.gradcheck(f, (q, k, v), fast_mode=True)
    torch.testing.assert_close(f(q, k, v), by_definition(q, k.expand(-1, 4, -1, -1, -1), v.expand(-1, 4, -1, -1, -1)))


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpp", marks=needs_cpp)])
def test_compile_with_both_sizes_open(backend):
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda q, k, v: mvkernels.patch_attention(q, k, v, 1, backend=backend), dynamic=True, backend="aot_eager"
    )
    for size, other in (((6, 8), (3, 5)), ((10, 4), (5, 7))):
        maps = [torch.randn(2, 3, 12, *s) for s in (size, other, other)]
        ours, plain = ([m.clone().requires_grad_() for m in maps] for _ in range(2))
        out, expected = compiled(*ours), by_definition(*plain)
        torch.testing.assert_close(out, expected)
        out.square().sum().backward()
        expected.square().sum().backward()
        for a, b in zip(ours, plain):
            torch.testing.assert_close(a.grad, b.grad)


def test_an_export_with_both_sizes_open_takes_equal_ones_too():
    class Model(torch.nn.Module):
        def forward(self, q, k):
            return mvkernels.patch_attention(q, k, k, 1)

    q, k = torch.randn(2, 2, 4, 5, 6), torch.randn(2, 2, 4, 3, 4)
    dims = {name: torch.export.Dim(name, min=2, max=99) for name in ("h", "w", "kh", "kw")}
    shapes = {"q": {3: dims["h"], 4: dims["w"]}, "k": {3: dims["kh"], 4: dims["kw"]}}
    exported = torch.export.export(Model(), (q, k), dynamic_shapes=shapes).module()
    for size, other in (((5, 6), (3, 4)), ((3, 4), (3, 4)), ((7, 2), (8, 9))):
        q, k = torch.randn(2, 2, 4, *size), torch.randn(2, 2, 4, *other)
        torch.testing.assert_close(exported(q, k), mvkernels.patch_attention(q, k, k, 1))
