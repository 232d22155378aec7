"""What every op keeps to, asked of all that are registered: gradients, compilation, export, autocast, bad input."""

import functools
import re

import pytest
import torch

import mvkernels
from mvkernels import can_run, testing
from mvkernels.dispatch import checks
from mvkernels.dispatch.registry import OPS
from tests.ops.bridges import INTERPRETER

FUNCTIONS = {name.lower(): getattr(mvkernels, name) for name in mvkernels.__all__ if name.endswith("Function")}


def example(name, dtype=torch.float32, batch=2, size=(4, 6), strides="contiguous"):
    """The arguments of the op's first shape, with every map of another size and kind of strides."""
    generator = torch.Generator().manual_seed(0)
    arguments = OPS[name].suite("small")[0].make(batch=batch)
    if name == "multiscale_linear_attention":
        arguments = one_small_head(arguments)
    tensors = tensors_of(arguments)
    for key, value in tensors.items():
        if key in OPS[name].maps:
            tensors[key] = testing.make_map((batch, *value.shape[1:-2], *size), strides, dtype, "cpu", generator)
        else:
            tensors[key] = value.to(dtype)
    return testing.with_tensors(arguments, tensors)


def one_small_head(arguments):
    """Of a scale's many taps and heads, as few as there can be: an interpreter takes each by itself."""
    channels = 3 * arguments["head_dim"]
    wide, mixing = arguments["depthwise"][0], arguments["pointwise"][0]
    weights = {"depthwise": (wide[:channels, :, 1:4, 1:4].clone(),), "pointwise": (mixing[:channels].clone(),)}
    return arguments | {"qkv": arguments["qkv"][:, :channels]} | weights


tensors_of = testing.tensors_in


def needs(name, backend, dtype=torch.float32):
    able, reason = can_run(name, backend, **example(name, dtype))
    return [pytest.mark.skipif(not able, reason=reason or "it runs")]


def native(dtype=torch.float32):
    """Every op on the reference and on C++, where its kernel takes the dtype."""
    found = [pytest.param(name, "reference", id=f"{name}-reference") for name in OPS]
    return found + [pytest.param(name, "cpp", id=f"{name}-cpp", marks=needs(name, "cpp", dtype)) for name in OPS]


def differentiable(params):
    """Those whose op has a backward on their backend."""
    return [param for param in params if OPS[param.values[0]].has_backward(param.values[1])]


NATIVE = native()
ALL = NATIVE + [
    pytest.param(name, "triton", id=f"{name}-triton", marks=INTERPRETER)
    for name in OPS
    if "triton" in OPS[name].why_not
]
KERNELS = [param for param in ALL if "reference" not in param.id]
TRAINED = [name for name in OPS if OPS[name].differentiable]
"""The ops with a backward of their own, and so with a public Function."""


@functools.cache
def function_of(name):
    return FUNCTIONS[name.replace("_", "") + "function"]


def call(name, arguments, tensors, **settings):
    """The public function, with these tensors for those of their names."""
    return OPS[name].function(**testing.with_tensors(arguments, tensors), **settings)


def call_function(name, arguments, backend):
    """The public autograd Function, given the op's checked arguments in order."""
    return function_of(name).apply(*OPS[name].check(**arguments), backend)


@pytest.mark.parametrize(("name", "backend"), differentiable(native(torch.float64)))
def test_gradcheck(name, backend):
    arguments = example(name, torch.float64)
    names = list(tensors_of(arguments))

    def of(call):
        def f(*values):
            return call(testing.with_tensors(arguments, dict(zip(names, values))))

        return f

    inputs = [value.requires_grad_() for value in tensors_of(arguments).values()]
    public = of(lambda given: OPS[name].function(**given, backend=backend))
    assert torch.autograd.gradcheck(public, inputs, fast_mode=True)
    if name in TRAINED:
        assert torch.autograd.gradcheck(of(lambda given: call_function(name, given, backend)), inputs, fast_mode=True)


def test_ops_with_a_backward_have_a_public_function():
    assert {name.replace("_", "") + "function" for name in TRAINED} == set(FUNCTIONS)


@pytest.mark.parametrize("name", TRAINED)
def test_the_function_checks_chooses_and_takes_defaults(name):
    arguments = example(name)
    values = list(arguments.values())
    with pytest.raises(TypeError, match=f"{name}: "):
        function_of(name).apply([1.0], *values[1:])
    out = function_of(name).apply(*values)
    torch.testing.assert_close(out, OPS[name].function(**arguments))


@pytest.mark.parametrize(("name", "backend"), differentiable(KERNELS))
def test_a_second_derivative_of_the_function_is_refused(name, backend):
    """In one line that names both ways to one: the function's backend, and the swap's."""
    arguments = example(name)
    first = next(iter(tensors_of(arguments)))
    arguments[first].requires_grad_()
    out = call_function(name, arguments, backend)
    (grad,) = torch.autograd.grad(out.square().sum(), arguments[first], create_graph=True)
    ways = f"call mvkernels.{name} with backend='reference', .* mvkernels.swap\\(model, backend='reference'\\)$"
    with pytest.raises(RuntimeError, match=f"^{name}: .* no second derivative, .*{ways}") as caught:
        torch.autograd.grad(grad.sum(), arguments[first])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("size", [(2, 4), (3, 5)])
def test_the_reference_has_second_derivatives(name, size):
    """The function and the autograd Function, by themselves and where one tensor is several of the arguments."""
    arguments = example(name, torch.float64, batch=1, size=size)
    names = list(tensors_of(arguments))
    inputs = [value.requires_grad_() for value in tensors_of(arguments).values()]
    calls = [lambda given: OPS[name].function(**given, backend="reference")]
    if name in TRAINED:
        calls.append(lambda given: call_function(name, given, "reference"))
    for call in calls:

        def f(*values, call=call):
            return call(testing.with_tensors(arguments, dict(zip(names, values))))

        assert torch.autograd.gradgradcheck(f, inputs, fast_mode=True)


@pytest.mark.parametrize("apply", [False, True], ids=["function", "Function"])
def test_second_derivatives_of_one_tensor_as_three_arguments(apply):
    q = torch.randn(1, 2, 3, 5, 3, dtype=torch.float64, requires_grad=True)

    def f(q):
        if apply:
            return mvkernels.PatchAttentionFunction.apply(q, q, q, (2, 2), None, 0.5, "reference")
        return mvkernels.patch_attention(q, q, q, 2, scale=0.5, backend="reference")

    assert torch.autograd.gradcheck(f, q) and torch.autograd.gradgradcheck(f, q, fast_mode=True)


@pytest.mark.parametrize(("name", "backend"), ALL)
def test_an_empty_batch_gives_an_empty_result_and_zero_gradients(name, backend):
    arguments = example(name, batch=0)
    inputs = tensors_of(arguments)
    recorded = OPS[name].has_backward(backend)
    for value in inputs.values():
        value.requires_grad_(recorded)
    out = OPS[name].function(**arguments, backend=backend)
    assert out.shape[0] == 0 and out.shape == OPS[name].reference(**example(name, batch=0)).shape
    if not recorded:
        return
    out.sum().backward()
    for value in inputs.values():
        assert value.grad.shape == value.shape and not value.grad.any()


@pytest.mark.parametrize(("name", "backend"), ALL)
@pytest.mark.parametrize("kind", testing.STRIDES)
@pytest.mark.parametrize("size", [(4, 6), (1, 1)])
def test_a_map_lies_as_the_first_map_and_tokens_are_contiguous(name, backend, kind, size):
    arguments = example(name, size=size, strides=kind)
    out = OPS[name].function(**arguments, backend=backend)
    like = arguments[OPS[name].maps[0]]
    if out.dim() == like.dim():
        sized = like[..., :1, :1].expand(*like.shape[:-2], *out.shape[-2:])  # as the map lies, with the result's sizes
        assert out.stride() == checks.empty_map(sized, out.shape[-3]).stride()
    else:
        assert out.is_contiguous()


@pytest.mark.parametrize(("name", "backend"), NATIVE)
def test_compile_without_graph_breaks_or_recompilation(name, backend):
    torch._dynamo.reset()
    compiles = 0

    def count(graph, inputs):
        nonlocal compiles
        compiles += 1
        return graph

    given = example(name)
    names = list(tensors_of(given))

    def block(*values):
        return call(name, given, dict(zip(names, values)), backend=backend).sin()

    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
    counted = torch.compile(block, fullgraph=True, dynamic=True, backend=count)
    # No two sizes of the first call are alike: they would be taken for one.
    for batch, size in ((5, (10, 22)), (3, (12, 18))):
        values = list(tensors_of(example(name, batch=batch, size=size)).values())
        recorded = OPS[name].has_backward(backend)
        ours, plain = ([v.clone().requires_grad_(recorded) for v in values] for _ in range(2))
        out, expected = compiled(*ours), block(*plain)
        torch.testing.assert_close(out, expected)
        if not recorded:
            counted(*values)
            continue
        out.square().sum().backward()
        expected.square().sum().backward()
        for a, b in zip(ours, plain):
            torch.testing.assert_close(a.grad, b.grad)
        counted(*values)
    assert compiles == 1


@pytest.mark.parametrize("name", OPS)
def test_the_export_is_the_reference(name):
    arguments = example(name)
    names = list(tensors_of(arguments))
    backend = "cpp" if can_run(name, "cpp", **arguments)[0] else None

    class Model(torch.nn.Module):
        def forward(self, *values):
            return call(name, arguments, dict(zip(names, values)), backend=backend)

    values = tuple(tensors_of(arguments).values())
    exported = torch.export.export(Model(), values)
    assert not [n for n in exported.graph.nodes if "mvkernels" in str(n.target)]
    torch.testing.assert_close(exported.module()(*values), OPS[name].function(**arguments))


@pytest.mark.parametrize(("name", "backend"), native(torch.bfloat16))
def test_autocast_casts_as_sdpa_does(name, backend):
    arguments = example(name)
    inputs = tensors_of(arguments)
    first, *others = inputs
    inputs[first].requires_grad_(OPS[name].has_backward(backend))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = call(name, arguments, {n: inputs[n].bfloat16() for n in others}, backend=backend)
        kept = call(name, arguments, {n: v.detach().double() for n, v in inputs.items()}, backend=backend)
    assert out.dtype == torch.bfloat16 and kept.dtype == torch.float64
    if not out.requires_grad:
        return
    out.float().sum().backward()
    assert inputs[first].grad.dtype == torch.float32 and inputs[first].grad.isfinite().all()


@pytest.mark.parametrize("name", OPS)
def test_forward_mode_and_transforms_take_the_reference(name):
    arguments = example(name, torch.float64)
    first = next(iter(tensors_of(arguments)))

    def f(value, backend=None):
        return call(name, arguments, {first: value}, backend=backend)

    value, tangent = arguments[first], torch.randn_like(arguments[first])
    wanted = torch.func.jvp(lambda v: f(v, "reference"), (value,), (tangent,))[1]
    assert torch.equal(torch.func.jvp(f, (value,), (tangent,))[1], wanted)
    assert torch.func.grad(lambda v: f(v).sum())(value).isfinite().all()


@pytest.mark.parametrize(("name", "backend"), differentiable(KERNELS))
def test_some_gradients_only_and_an_expanded_cotangent(name, backend):
    arguments = example(name)
    for wanted, value in tensors_of(arguments).items():
        grads = []
        for which in (backend, "reference"):
            leaf = value.detach().clone().requires_grad_()
            out = call(name, arguments, {wanted: leaf}, backend=which)
            grads += torch.autograd.grad(out.sum(), leaf)
        torch.testing.assert_close(*grads, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("name", "backend"), KERNELS)
def test_the_same_bits_in_every_run(name, backend):
    arguments = example(name, batch=1, size=(9, 10) if backend == "triton" else (40, 41))
    recorded = OPS[name].has_backward(backend)
    inputs = [v.requires_grad_(recorded) for v in tensors_of(arguments).values()]

    def once():
        out = OPS[name].function(**arguments, backend=backend)
        return out, *(torch.autograd.grad(out.square().sum(), inputs) if recorded else ())

    first = once()
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(first, once()))


OPTIONAL = ("qkv_bias", "bias", "expand[1]", "depthwise[1]", "project[1]", "norm[0]", "norm[1]")
WRONG = {
    "list": (TypeError, "{0} is a list", lambda t: [1.0]),
    "none": (TypeError, "{0} is a NoneType", lambda t: None),
    "integer": (TypeError, "{0} has dtype int64", lambda t: torch.ones(t.shape, dtype=torch.int64)),
    "complex": (TypeError, "{0} has dtype complex64", lambda t: torch.zeros(t.shape, dtype=torch.complex64)),
    "sparse": (TypeError, "{0} has layout sparse_coo", lambda t: t.to_sparse()),
    "sparse rows": (TypeError, "{0} has layout sparse_csr", lambda t: t.reshape(len(t), -1).to_sparse_csr()),
    "mkldnn": (TypeError, "{0} has layout _mkldnn", lambda t: t.to_mkldnn()),
    "quantized": (TypeError, "{0} has dtype quint8", lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.quint8)),
    "nested": (TypeError, "{0} is a nested tensor", lambda t: torch.nested.nested_tensor([*t, t[0]])),
    "nested with a gradient": (
        TypeError,
        "{0} is a nested tensor",
        lambda t: torch.nested.nested_tensor([*t, t[0]]).requires_grad_(),
    ),
    "jagged": (
        TypeError,
        "{0} has layout jagged",
        lambda t: torch.nested.nested_tensor([t.flatten()[:3], t.flatten()[:1]], layout=torch.jagged),
    ),
    "masked": (TypeError, "{0} is a MaskedTensor", lambda t: torch.masked.masked_tensor(t, t > 0)),
    "without values": (TypeError, "{0} is a UninitializedParameter", lambda t: torch.nn.UninitializedParameter()),
    "a buffer without values": (
        TypeError,
        "{0} is a UninitializedBuffer",
        lambda t: torch.nn.UninitializedBuffer(),
    ),
    "dtypes": (ValueError, "want one dtype", lambda t: t.double()),
    "devices": (ValueError, "want one device", lambda t: t.to("meta")),
    "rank": (ValueError, "{0} has .* axes", lambda t: t[0]),
}


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.filterwarnings("ignore:.*(prototype stage|beta state|quantized tensor)")
def test_bad_tensors(name, kind):
    error, message, wrong = WRONG[kind]
    for which, value in tensors_of(example(name)).items():
        if kind == "rank" and which not in OPS[name].maps and "[" in which:
            continue  # a weight's shape is told whole
        if kind == "none" and which in OPTIONAL:
            continue
        arguments = testing.with_tensors(example(name), {which: wrong(value)})
        with pytest.raises(error, match=message.format(re.escape(which))) as caught:
            OPS[name].function(**arguments)
        assert "\n" not in str(caught.value) and str(caught.value).startswith(f"{name}: ")
        runs, reason = can_run(name, "reference", **arguments)
        assert not runs and reason


@pytest.mark.parametrize("name", OPS)
def test_bad_backends(name):
    with pytest.raises(ValueError, match="want one of auto"):
        OPS[name].function(**example(name), backend="cud")
    missing = next(b for b in ("cuda", "triton", "cpp") if not can_run(name, b, **example(name))[0])
    with pytest.raises(mvkernels.BackendUnavailable, match=f"{name}: backend {missing} cannot run this: "):
        OPS[name].function(**example(name), backend=missing)


@pytest.mark.parametrize("layout", ["channels_last", "channels_first"])
@pytest.mark.parametrize("name", ["patch_attention", "window_attention", "patch_transformer_layer"])
def test_peers_answer_in_the_layout_of_their_input(name, layout):
    """As the ops do: else a peer would be charged with a copy that its user need not make, or spared one."""
    arguments = OPS[name].suite("small")[0].make(batch=2, layout=layout)
    expected = OPS[name].reference(**arguments).stride()
    for peer in OPS[name].peers.values():
        assert peer(**arguments).stride() == expected
