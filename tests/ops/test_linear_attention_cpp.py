"""The C++ kernels of both linear attentions: chunks, threads, instruction sets, every way through the convolutions."""

import pytest
import torch

import mvkernels
from mvkernels import testing
from mvkernels.dispatch import checks
from mvkernels.dispatch.registry import OPS
from tests.ops import bridges
from tests.ops.bridges import INSTRUCTION_SETS, assert_ok

pytestmark = bridges.needs_cpp("multiscale_linear_attention")
SINGLE, MULTISCALE = OPS["relu_linear_attention"], OPS["multiscale_linear_attention"]


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def qkv(heads, dim, size, kernels=(5,), layout=torch.contiguous_format, dtype=torch.float32, batch=1, biases=False):
    """Arguments of multiscale_linear_attention as a model has them; eps keeps the divisors away from 0."""
    generator = torch.Generator().manual_seed(0)
    channels = 3 * heads * dim

    def normal(*shape, scale=1.0):
        return (scale * torch.randn(*shape, generator=generator)).to(dtype)

    arguments = {
        "qkv": normal(batch, channels, *size).contiguous(memory_format=layout),
        "depthwise": [normal(channels, 1, k, k, scale=1 / k) for k in kernels],
        "pointwise": [normal(channels, dim, 1, 1, scale=dim**-0.5) for _ in kernels],
        "head_dim": dim,
        "eps": 1.0,
    }
    if biases:
        arguments |= {name: [normal(channels) for _ in kernels] for name in ("depthwise_bias", "pointwise_bias")}
    return arguments


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS, indirect=True)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=checks.short)
@pytest.mark.parametrize("size", [(7, 7), (14, 14), (33, 17), (5, 40), (64, 9)], ids=str)
def test_bands_rows_and_vectors(instruction_set, layout, size):
    """Maps of one band and of several, narrower and wider than a vector; the head_dims of models and odd ones."""
    for dim in (8, 16, 20, 32):
        assert_ok(testing.check(MULTISCALE, qkv(1, dim, size, layout=layout), "cpp"))


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS, indirect=True)
@pytest.mark.parametrize("kernels", [(3,), (7,), (9,), (1,), (3, 5), (5, 5)], ids=str)
@pytest.mark.parametrize("biases", [False, True])
def test_kernels_scales_and_biases(instruction_set, kernels, biases):
    for size in ((2, 3), (9, 19)):
        assert_ok(testing.check(MULTISCALE, qkv(2, 16, size, kernels, biases=biases, batch=2), "cpp"))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=checks.short)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=checks.short)
def test_chunks_of_a_map(threads, layout, dtype):
    """One head for several threads: sums of chunks of pixels are added up, and stages wait for each other."""
    threads(3)
    arguments = qkv(1, 32, (32, 33), (3,), layout, dtype)
    assert_ok(testing.check(MULTISCALE, arguments, "cpp"))
    maps = arguments["qkv"].unflatten(1, (1, 3, 32)).unbind(2)
    assert_ok(testing.check(SINGLE, dict(zip(("query", "key", "value"), maps)), "cpp"))


@pytest.mark.parametrize("op", [SINGLE, MULTISCALE], ids=lambda op: op.name)
def test_any_number_of_threads_gives_the_same_and_each_always_the_same(threads, op):
    arguments = qkv(1, 32, (32, 33), (5,))
    if op is SINGLE:
        maps = arguments["qkv"].unflatten(1, (1, 3, 32)).unbind(2)
        arguments = dict(zip(("query", "key", "value"), maps))
    wanted = list(testing.tensors_in(arguments))

    def run(count):
        threads(count)
        generator = torch.Generator().manual_seed(2)
        cotangent = torch.randn(op.reference(**arguments).shape, generator=generator)
        return testing.run(lambda **kw: op.function(**kw, backend="cpp"), arguments, wanted, cotangent)

    one, two = run(1), run(2)
    for name, value in run(2).items():
        assert torch.equal(two[name], value), name
    for name, value in run(1).items():
        assert torch.equal(one[name], value), name
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS, indirect=True)
def test_queries_with_little_above_zero(instruction_set):
    """With one dim above 0 the output does not depend on the query: a gradient of 0, whose two terms are large."""
    for dim, kind in ((1, "contiguous"), (1, "channels_last"), (8, "contiguous"), (8, "channels_last")):
        generator = torch.Generator().manual_seed(0)
        query, key, value = (testing.make_map((1, 1, dim, 9, 11), kind, generator=generator) for _ in range(3))
        query = query * 1e-5
        query[:, :, 1:] = -query[:, :, 1:].abs()
        arguments = {"query": query, "key": key, "value": value}
        cotangent = torch.randn(query.shape, generator=generator, dtype=torch.float64)
        exact = {name: tensor.double() for name, tensor in arguments.items()}
        exact = testing.run(SINGLE.reference, exact, ["query"], cotangent)["dquery"]
        found = testing.run(lambda **kw: SINGLE.function(**kw, backend="cpp"), arguments, ["query"], cotangent)[
            "dquery"
        ]
        assert testing.max_error(found, exact) < 1e-4


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS, indirect=True)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=checks.short)
def test_sums_of_keys_are_as_near_as_pytorchs(instruction_set, layout):
    """Where few of a query are above 0, its gradient is a difference in which every rounding of these sums shows."""
    heads, dim = 32, 16
    arguments = qkv(heads, dim, (16, 16), (1,), layout)
    x, same = arguments["qkv"], torch.eye(dim).repeat(3 * heads, 1)[:, :, None, None]
    weights = [torch.ones_like(arguments["depthwise"][0]), same, torch.empty(0), torch.empty(0)]
    rectified = x.unflatten(1, (heads, 3, dim))[:, :, 1].relu().contiguous()
    exact = rectified.sum((-2, -1), dtype=torch.float64)
    allowed = 1.3 * testing.rms_error(rectified.sum((-2, -1)) / exact, torch.ones_like(exact))
    for keys in torch.ops.mvkernels_cpp.multiscale_linear_attention_forward(x, weights, dim, 0.0)[2].split(heads, 1):
        assert testing.rms_error(keys / exact, torch.ones_like(exact)) <= allowed


def test_no_batch_gives_no_output_and_zero_gradients():
    arguments = qkv(2, 8, (5, 6), (3, 5), batch=1, biases=True)
    arguments["qkv"] = arguments["qkv"][:0]
    tensors = [arguments["qkv"], *(w for name, v in arguments.items() if isinstance(v, list) for w in v)]
    for tensor in tensors:
        tensor.requires_grad_()
    out = mvkernels.multiscale_linear_attention(**arguments, backend="cpp")
    assert out.shape == (0, 48, 5, 6)
    assert all((g == 0).all() for g in torch.autograd.grad(out.sum(), tensors))
