"""Patch attention: the reference against an independent formula, every backend against the reference."""

import itertools
import math
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mvkernels
from mvkernels import testing
from mvkernels.dispatch import checks, extension
from mvkernels.dispatch.registry import OPS

OP = OPS["patch_attention"]
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
DEVICE = os.environ.get("MVKERNELS_TEST_DEVICE", "cpu")
INSTRUCTION_SETS = extension.module.instruction_sets() if extension.module else []

needs_cpp = pytest.mark.skipif(extension.module is None, reason=extension.reason)


def by_definition(query, key, value, patch_size, bias=None, scale=None):
    """One dense attention over all pixels, with -inf between pixels of different groups."""
    d, height, width = query.shape[2:]
    ph, pw = patch_size
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    group = (y % ph * pw + x % pw).flatten()
    scores = torch.einsum("bhdi,bhdj->bhij", query.flatten(3), key.flatten(3)) * (scale or 1 / math.sqrt(d))
    if bias is not None:
        token = ((y // ph) * (width // pw) + x // pw).flatten()
        scores = scores + bias[:, token][:, :, token]
    scores = scores.masked_fill(group[:, None] != group[None, :], -math.inf)
    return torch.einsum("bhij,bhdj->bhdi", scores.softmax(-1), value.flatten(3)).reshape(value.shape)


@st.composite
def problems(draw, dtypes=DTYPES, with_bias=True, device="cpu"):
    """Arguments of patch attention: any shape, patch, stride kinds and dtype."""
    dtype = draw(st.sampled_from(dtypes))
    b, h = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    d, dv = draw(st.sampled_from([1, 3, 4, 8, 13, 16, 20, 30, 36, 48, 60, 100])), draw(st.integers(1, 40))
    dv = draw(st.sampled_from([d, dv]))
    ph, pw = draw(st.sampled_from([(1, 1), (2, 2), (1, 2), (3, 2), (2, 5), (7, 7)]))
    bias = with_bias and draw(st.booleans())
    if bias:
        height, width = ph * draw(st.integers(1, 5)), pw * draw(st.integers(1, 5))
    else:
        height, width = draw(st.integers(1, 14)), draw(st.integers(1, 14))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    arguments = {}
    for name, dim in (("query", d), ("key", d), ("value", dv)):
        kind = draw(st.sampled_from(testing.STRIDES))
        arguments[name] = testing.make_map((b, h, dim, height, width), kind, dtype, device, generator)
    arguments["patch_size"] = (ph, pw)
    if bias:
        n = (height // ph) * (width // pw)
        full = torch.randn(h, n, n + 3, generator=generator).to(device, dtype)
        arguments["bias"] = full[..., 1 : n + 1] if draw(st.booleans()) else full[..., :n].transpose(1, 2)
    if draw(st.booleans()):
        arguments["scale"] = draw(st.sampled_from([0.1, 0.3, -0.4]))
    return arguments


def assert_ok(comparisons):
    wrong = [str(c) for c in comparisons if not c.ok]
    assert not wrong, "; ".join(wrong)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(problems(dtypes=(torch.float64,)))
def test_the_reference_is_the_definition(arguments):
    torch.testing.assert_close(OP.reference(**arguments), by_definition(**arguments), rtol=1e-9, atol=1e-9)


@pytest.mark.core
@needs_cpp
@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS, indirect=True)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(arguments=problems())
def test_cpp_on_any_shape_stride_and_dtype(instruction_set, arguments):
    assert_ok(testing.check(OP, arguments, "cpp"))


@pytest.mark.skipif(DEVICE == "cpu", reason="MVKERNELS_TEST_DEVICE names no other device")
@settings(max_examples=200, deadline=None)
@given(problems(dtypes=(torch.float32, torch.float16, torch.bfloat16), device=DEVICE))
def test_the_device_on_any_shape_stride_and_dtype(arguments):
    assert mvkernels.can_run("patch_attention", "triton", **arguments) == (True, "")
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
        if case.shape["height"] > 16 or (dtype != torch.float32 and case.shape["height"] > 8):
            continue
        for layout in case.layouts:
            assert_ok(testing.check(OP, case.make(batch=2, dtype=dtype, layout=layout), "cpp"))


@needs_cpp
@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS, indirect=True)
@pytest.mark.parametrize("tokens", [255, 257, 300, 600, 1025])
def test_cpp_on_large_groups(instruction_set, tokens):
    """More keys than a block: running maximum, also where the first blocks are wholly masked."""
    generator = torch.Generator().manual_seed(tokens)
    q, k, v = (testing.make_map((1, 2, 12, 1, tokens), "channels_last", generator=generator) for _ in range(3))
    arguments = {"query": 6 * q, "key": k, "value": v, "patch_size": (1, 1)}
    assert_ok(testing.check(OP, arguments, "cpp"))
    bias = torch.randn(2, tokens, tokens, generator=generator)
    bias[:, : tokens // 2, : tokens - 3] = -math.inf
    assert_ok(testing.check(OP, {**arguments, "bias": bias}, "cpp"))


@needs_cpp
@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS, indirect=True)
@pytest.mark.parametrize(("shape", "patch"), [((1, 4, 36, 32, 32), 2), ((1, 4, 32, 14, 14), 1)])
def test_cpp_on_values_with_a_mean(instruction_set, shape, patch):
    """dS is a small difference then: summed in one chain of all keys, what it is taken from was too far off."""
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        query, key, value = (torch.randn(shape, generator=generator) for _ in range(3))
        arguments = {"query": query, "key": key, "value": value + 20, "patch_size": patch}
        assert_ok(testing.check(OP, arguments, "cpp"))


@needs_cpp
@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS, indirect=True)
@pytest.mark.parametrize("seed", range(4))
def test_cpp_on_wide_heads_with_large_scores(instruction_set, seed):
    """Summed in one chain of 256 products, scores of some seeds were too far off."""
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(1, 2, 256, 12, 10, generator=generator) for _ in range(3))
    assert_ok(testing.check(OP, {"query": query, "key": key, "value": value, "scale": 1.0}, "cpp"))


@needs_cpp
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("shape", [(1, 1, 20, 31, 33), (1, 1, 8, 9, 9), (2, 3, 4, 12, 5)])
def test_cpp_splits_few_groups_over_threads(threads, shape):
    generator = torch.Generator().manual_seed(0)
    arguments = dict(zip(("query", "key", "value"), (testing.make_map(shape, generator=generator) for _ in range(3))))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_ok(testing.check(OP, {**arguments, "patch_size": (1, 1)}, "cpp"))
        n = shape[3] * shape[4]
        if n < 200:
            bias = torch.randn(shape[1], n, n, generator=generator)
            assert_ok(testing.check(OP, {**arguments, "patch_size": (1, 1), "bias": bias}, "cpp"))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpp", marks=needs_cpp)])
@pytest.mark.parametrize(
    ("size", "patch", "with_bias"), [((5, 7), (2, 2), False), ((4, 6), (2, 3), True), ((3, 3), 1, True)]
)
def test_gradcheck(backend, size, patch, with_bias):
    q, k, v = (torch.randn(2, 2, 3, *size, dtype=torch.float64, requires_grad=True) for _ in range(3))
    ph, pw = (patch, patch) if isinstance(patch, int) else patch
    n = size[0] // ph * (size[1] // pw)
    bias = torch.randn(2, n, n, dtype=torch.float64, requires_grad=True) if with_bias else None
    for call in (mvkernels.patch_attention, None):

        def f(q, k, v, bias, call=call):
            if call is None:
                return mvkernels.PatchAttentionFunction.apply(q, k, v, patch, bias, None, backend)
            return call(q, k, v, patch, bias=bias, backend=backend)

        assert torch.autograd.gradcheck(f, (q, k, v, bias), fast_mode=True)


@needs_cpp
@pytest.mark.parametrize("kind", testing.STRIDES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=checks.short)
@pytest.mark.parametrize("with_bias", [False, True])
def test_opcheck(kind, dtype, with_bias):
    q, k, v = (testing.make_map((2, 3, dim, 4, 6), kind, dtype) for dim in (5, 5, 7))
    bias = torch.randn(3, 6, 6).to(dtype) if with_bias else None
    forward, backward = (
        torch.ops.mvkernels_cpp.patch_attention_forward,
        torch.ops.mvkernels_cpp.patch_attention_backward,
    )
    torch.library.opcheck(forward, (q, k, v, 2, 2, bias, 0.4))
    grad = testing.make_map(v.shape, kind, dtype)
    torch.library.opcheck(backward, (grad, q, k, v, 2, 2, bias, 0.4, with_bias))


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpp", marks=needs_cpp)])
@pytest.mark.parametrize("kind", testing.STRIDES)
@pytest.mark.parametrize("size", [(4, 6), (5, 7), (1, 1)])
def test_the_output_lies_as_the_query(backend, kind, size):
    q = testing.make_map((2, 3, 5, *size), kind)
    out = mvkernels.patch_attention(q, q, q[:, :, :4], 2, backend=backend)
    assert out.stride() == checks.empty_map(q, 4).stride()


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpp", marks=needs_cpp)])
def test_compile_without_graph_breaks_or_recompilation(backend):
    torch._dynamo.reset()
    compiles = 0

    def count(graph, inputs):
        nonlocal compiles
        compiles += 1
        return graph

    def block(x, heads=2):
        q, k, v = x.unflatten(-1, (3, heads, -1)).permute(3, 0, 4, 5, 1, 2).unbind()
        return mvkernels.patch_attention(q, k, v, 2, backend=backend).sin()

    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
    counted = torch.compile(block, fullgraph=True, dynamic=True, backend=count)
    for size in ((2, 6, 8), (3, 10, 4), (5, 12, 14)):
        x = torch.randn(*size, 24, requires_grad=True)
        y = x.detach().clone().requires_grad_()
        out, expected = compiled(x), block(y)
        torch.testing.assert_close(out, expected)
        out.square().sum().backward()
        expected.square().sum().backward()
        torch.testing.assert_close(x.grad, y.grad)
        counted(x.detach())
    assert compiles == 1


@needs_cpp
def test_inductor():
    torch._dynamo.reset()
    x = torch.randn(2, 4, 6, 3, 2, 8)

    def f(x):
        q, k, v = (m.permute(0, 3, 4, 1, 2) for m in x.unbind(3))
        return mvkernels.patch_attention(q * 2, k, v).relu()

    torch.testing.assert_close(torch.compile(f, fullgraph=True)(x), f(x))


def test_the_export_is_the_reference():
    class Model(torch.nn.Module):
        def forward(self, q):
            return mvkernels.patch_attention(q, q, q, 2, backend="cpp" if extension.module else None)

    q = torch.randn(2, 2, 4, 6, 6)
    exported = torch.export.export(Model(), (q,), dynamic_shapes={"q": {0: torch.export.Dim("batch", min=2)}})
    assert not [n for n in exported.graph.nodes if "mvkernels" in str(n.target)]
    other = torch.randn(5, 2, 4, 6, 6)
    torch.testing.assert_close(exported.module()(other), mvkernels.patch_attention(other, other, other, 2))


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpp", marks=needs_cpp)])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", ["query", "key", "value"])
def test_nan_and_infinity_stay_in_their_rows(backend, bad, which):
    torch.manual_seed(0)
    maps = {name: torch.randn(2, 2, 5, 6, 7) for name in ("query", "key", "value")}
    maps[which][0, 1, 2, 3, 4] = bad
    with testing.poisoned():
        out = mvkernels.patch_attention(**maps, patch_size=2, backend=backend)
    exact = OP.reference(**{n: m.double() for n, m in maps.items()})
    assert torch.equal(out.isfinite(), exact.isfinite())
    assert testing.max_error(out.nan_to_num(7, 8, 9), exact.nan_to_num(7, 8, 9)) < 1e-5


@needs_cpp
def test_a_wholly_masked_row_is_nan_and_a_masked_key_has_no_weight():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, 4, 3, 3) for _ in range(3))
    bias = torch.zeros(1, 9, 9)
    bias[0, 2] = -math.inf
    bias[0, :, 5] = -math.inf
    v[..., 1, 2] = 1e30
    assert_ok(
        testing.check(OP, {"query": q, "key": k, "value": v, "patch_size": (1, 1), "bias": bias}, "cpp", backward=False)
    )


@needs_cpp
def test_cpp_is_deterministic():
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, 2, 20, 9, 14, requires_grad=True) for _ in range(3))
    bias = torch.randn(2, 126, 126, requires_grad=True)

    def once():
        out = mvkernels.patch_attention(q, k, v, 1, bias=bias, backend="cpp")
        return out, *torch.autograd.grad(out.square().sum(), (q, k, v, bias))

    first = once()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, once()))


@needs_cpp
def test_only_inputs_are_saved():
    q, k, v = (torch.randn(2, 2, 8, 6, 6, requires_grad=True) for _ in range(3))
    saved = []

    def keep(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        mvkernels.patch_attention(q, k, v, 2, backend="cpp")
    assert [t.data_ptr() for t in saved] == [t.data_ptr() for t in (q, k, v)]


@needs_cpp
def test_some_gradients_only_and_an_expanded_cotangent():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, 6, 4, 5) for _ in range(3))
    for wanted in itertools.product([False, True], repeat=3):
        if not any(wanted):
            continue
        inputs = [m.clone().requires_grad_(w) for m, w in zip((q, k, v), wanted)]
        leaves = [m for m in inputs if m.requires_grad]
        outs = [mvkernels.patch_attention(*inputs, 2, backend=b) for b in ("cpp", "reference")]
        grads = [torch.autograd.grad(o.sum(), leaves) for o in outs]
        for a, b in zip(*grads):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpp", marks=needs_cpp)])
def test_autocast_casts_as_sdpa_does(backend):
    q = torch.randn(1, 2, 8, 6, 6, requires_grad=True)
    k = torch.randn(1, 2, 8, 6, 6, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = mvkernels.patch_attention(q, k, k, 2, backend=backend)
        kept = mvkernels.patch_attention(*(m.double() for m in (q, k, k)), 2, backend=backend)
    assert out.dtype == torch.bfloat16 and kept.dtype == torch.float64
    out.float().sum().backward()
    assert q.grad.dtype == torch.float32 and q.grad.isfinite().all()


@needs_cpp
@settings(max_examples=25, deadline=None, derandomize=True)
@given(problems(dtypes=(torch.float64,), with_bias=False), st.integers(0, 2**31))
def test_invariants(arguments, seed):
    """Linear in the value; permuting patches permutes the output; a batch is its items."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v, patch = (arguments[n] for n in ("query", "key", "value", "patch_size"))

    def f(q, k, v):
        return mvkernels.patch_attention(q, k, v, patch, scale=arguments.get("scale"), backend="cpp")

    out = f(q, k, v)
    other = torch.randn(v.shape, generator=generator, dtype=v.dtype)
    torch.testing.assert_close(f(q, k, v + 2 * other), out + 2 * f(q, k, other))
    torch.testing.assert_close(torch.cat([f(*(m[i : i + 1] for m in (q, k, v))) for i in range(len(q))]), out)
    rows = q.shape[3] // patch[0]
    if rows and q.shape[3] % patch[0] == 0:
        order = torch.randperm(rows, generator=generator)
        index = (order[:, None] * patch[0] + torch.arange(patch[0])).flatten()
        torch.testing.assert_close(f(*(m[:, :, :, index] for m in (q, k, v))), out[:, :, :, index])
