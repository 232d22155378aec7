"""What only a real device can show, or shows best: graphs, determinism, many groups, long offsets.

Run with MVKERNELS_TEST_DEVICE=cuda; what does not need a GPU runs on the CPU's kernels everywhere.
"""

import pytest
import torch

from mvkernels import can_run, testing
from mvkernels.dispatch.registry import OPS
from tests.ops.bridges import DEVICE, INTERPRETER, assert_ok, needs_device
from tests.ops.test_contract_all import example, tensors_of

CUDA = pytest.mark.skipif(DEVICE != "cuda", reason="MVKERNELS_TEST_DEVICE is not cuda")
PLACES = [pytest.param("triton", DEVICE, id="device", marks=needs_device)]
PLACES += [pytest.param("cpp", "cpu", id="cpp"), pytest.param("triton", "cpu", id="interpreter", marks=INTERPRETER)]
LARGEST = 2**31
BATCHED = [name for name in OPS if all(len(value) == 3 for value in tensors_of(example(name, batch=3)).values())]
"""Of these every tensor has a batch: none is a weight."""
ON_GPUS = [name for name, op in OPS.items() if "triton" in op.why_not]


def on(device, name, backend="triton", **settings):
    """The arguments of the op's example there, all wanting gradients if the backend's kernels have them."""
    arguments = example(name, **settings)
    recorded = OPS[name].has_backward(backend)
    tensors = {key: value.to(device).requires_grad_(recorded) for key, value in tensors_of(arguments).items()}
    return testing.with_tensors(arguments, tensors)


def results(name, arguments, backend):
    """Output and gradients."""
    out = OPS[name].function(**arguments, backend=backend)
    if not out.requires_grad:
        return [out]
    return [out.detach(), *torch.autograd.grad(out.square().sum(), tensors_of(arguments).values())]


def needs(name, backend, arguments):
    able, reason = can_run(name, backend, **arguments)
    if not able:
        pytest.skip(reason)


@pytest.mark.parametrize(("backend", "device"), PLACES)
@pytest.mark.parametrize("name", OPS)
def test_the_same_call_gives_the_same_bits(name, backend, device):
    arguments = on(device, name, backend, size=(9, 7))
    needs(name, backend, arguments)
    first = results(name, arguments, backend)
    for _ in range(2):
        for again, before in zip(results(name, arguments, backend), first, strict=True):
            assert torch.equal(again, before)


@needs_device
@pytest.mark.parametrize("name", ON_GPUS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_one_shape(name, dtype):
    """Small enough for compute-sanitizer, ragged enough for every mask."""
    arguments = OPS[name].suite("small")[-1].make(batch=1, device=DEVICE, dtype=dtype)
    assert_ok(testing.check(OPS[name], arguments, "triton"))


@pytest.mark.parametrize(("backend", "device"), PLACES)
def test_more_groups_than_a_grid_has_rows(backend, device):
    """65,535 is the most that the second and third dimension of a CUDA grid take."""
    if device == "cpu" and backend == "triton":
        pytest.skip("hours in the interpreter")
    q, k, v = (torch.randn(70_000, 1, 4, 1, 2, device=device) for _ in range(3))
    arguments = {"query": q, "key": k, "value": v, "patch_size": 1}
    needs("patch_attention", backend, arguments)
    assert_ok(testing.check(OPS["patch_attention"], arguments, backend))


@pytest.mark.parametrize(("backend", "device"), PLACES)
@pytest.mark.parametrize("name", BATCHED)
def test_a_batch_larger_than_a_grid_has_rows(name, backend, device):
    if device == "cpu" and backend == "triton":
        pytest.skip("hours in the interpreter")
    arguments = example(name, batch=1, size=(2, 2))
    many = {
        key: value[:, :1, :4].repeat(66_000, *([1] * (value.dim() - 1))).to(device)
        for key, value in tensors_of(arguments).items()
    }
    arguments = testing.with_tensors(arguments, many)
    needs(name, backend, arguments)
    assert_ok(testing.check(OPS[name], arguments, backend))


@CUDA
@pytest.mark.parametrize("name", ON_GPUS)
def test_a_graph_of_a_call_replays(name):
    """No synchronisation and no allocation that depends on values: captured once, right on new values."""
    arguments = on("cuda", name, size=(8, 8))
    inputs = tensors_of(arguments)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            results(name, arguments, "triton")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results(name, arguments, "triton")
    with torch.no_grad():
        for value in inputs.values():
            value.copy_(torch.randn_like(value))
    graph.replay()
    for replayed, expected in zip(captured, results(name, arguments, "triton"), strict=True):
        assert torch.equal(replayed, expected)


@CUDA
@pytest.mark.parametrize("name", ON_GPUS)
def test_reduce_overhead(name):
    torch._dynamo.reset()
    arguments = on("cuda", name, size=(8, 8))
    compiled = torch.compile(OPS[name].function, mode="reduce-overhead", fullgraph=True)
    for _ in range(3):
        torch.compiler.cudagraph_mark_step_begin()
        out = compiled(**arguments, backend="triton")
        recorded = out.requires_grad
        found = torch.autograd.grad(out.square().sum(), tensors_of(arguments).values()) if recorded else ()
        expected = results(name, arguments, "triton")
        for one, other in zip((out, *found), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@CUDA
@pytest.mark.parametrize("name", ["patch_attention", "mobile_to_former", "former_to_mobile", "relu_linear_attention"])
def test_maps_past_two_to_the_31_elements(name):
    """Offsets of 64 bits: the last images of a batch that is too large for 32, against the same images alone."""
    side, heads, dim = 64, 4, 32
    batch = LARGEST // (heads * dim * side * side) + 2
    if torch.cuda.mem_get_info()[0] < 6 * 2 * batch * heads * dim * side * side:
        pytest.skip("not enough memory")
    few, many = {}, {}
    for key in tensors_of(example(name)):
        shape = (heads, dim, side, side) if key in OPS[name].maps else (heads, 4, dim)
        last = torch.randn(2, *shape, device="cuda", dtype=torch.bfloat16)
        few[key], many[key] = last, torch.zeros(batch, *shape, device="cuda", dtype=torch.bfloat16)
        many[key][-2:] = last
    with torch.no_grad():
        found = OPS[name].function(**many, backend="triton")[-2:]
        expected = OPS[name].function(**few, backend="triton")
    assert torch.equal(found, expected)


@CUDA
def test_a_layer_of_maps_past_two_to_the_31_elements():
    arguments = example("patch_transformer_layer", torch.bfloat16, batch=2, size=(64, 64), strides="channels_last")
    arguments = {key: v.to("cuda") if isinstance(v, torch.Tensor) else v for key, v in arguments.items()}
    few = arguments["x"]
    batch = LARGEST // few[0].numel() + 2
    if torch.cuda.mem_get_info()[0] < 8 * 2 * batch * few[0].numel():
        pytest.skip("not enough memory")
    many = few.new_zeros(batch, 64, 64, few.shape[1]).permute(0, 3, 1, 2)
    many[-2:] = few
    function = OPS["patch_transformer_layer"].function
    with torch.no_grad():
        found = function(**arguments | {"x": many}, backend="triton")[-2:]
        torch.testing.assert_close(found, function(**arguments, backend="triton"), rtol=2e-2, atol=2e-2)
