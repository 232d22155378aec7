"""relu_linear_attention of a map divided among processes: the values and gradients of the whole map."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

import mvkernels
from mvkernels import BackendUnavailable, can_run, testing
from tests.distributed.processes import LINUX, run

pytestmark = LINUX


def part(rank, inputs, cotangent, rows, compiled):
    """This rank's rows of the output and of the gradients."""
    function = mvkernels.relu_linear_attention
    if compiled:
        function = torch.compile(function, backend="aot_eager", fullgraph=True)
    mine = [m.split(rows, dim=3)[rank].detach().requires_grad_() for m in inputs]
    out = function(*mine, eps=1e-6, process_group=dist.group.WORLD)
    out.backward(cotangent.split(rows, dim=3)[rank])
    return [out.detach(), *(m.grad for m in mine)], out.stride(2) == 1


@pytest.mark.parametrize(
    ("rows", "dtype", "strides", "compiled"),
    [
        ([5, 4], torch.float64, "contiguous", False),
        ([1, 8], torch.float32, "packed", False),
        ([4, 5], torch.float64, "contiguous", True),
        ([1, 2, 3, 3], torch.float64, "channels_last", False),
    ],
    ids=["2-float64", "2-float32", "2-compiled", "4-float64"],
)
def test_the_parts_are_those_of_the_whole_map(rows, dtype, strides, compiled, tmp_path):
    generator = torch.Generator().manual_seed(0)
    inputs = [testing.make_map((2, 3, 8, 9, 7), strides, dtype, "cpu", generator) for _ in range(3)]
    cotangent = torch.randn(2, 3, 8, 9, 7, generator=generator).to(dtype)
    whole = [m.double().requires_grad_() for m in inputs]
    expected = mvkernels.relu_linear_attention(*whole, eps=1e-6, backend="reference")
    expected.backward(cotangent.double())
    results = run(len(rows), tmp_path, part, inputs, cotangent, rows, compiled)
    tolerance = {"rtol": 1e-9, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-4}
    for position, exact in enumerate((expected.detach(), *(m.grad for m in whole))):
        joined = torch.cat([values[position] for values, _ in results], dim=3)
        torch.testing.assert_close(joined.double(), exact, **tolerance)
    assert all(channels_last == (strides != "contiguous") for _, channels_last in results)


def transforms(op, inputs, tangents):
    """What torch.func makes of the op, for maps with one axis more in front."""

    def loss(*maps):
        return op(*maps).square().sum()

    first, every = [m[0] for m in inputs], (0, 1, 2)
    return [
        torch.func.vmap(op)(*inputs),
        torch.func.vmap(op, in_dims=(0, None, None))(inputs[0], *first[1:]),
        torch.func.vmap(op, in_dims=(None, 1, None))(first[0], inputs[1].transpose(0, 1), first[2]),
        *torch.func.grad(loss, argnums=every)(*first),
        *torch.func.vmap(torch.func.grad(loss, argnums=every))(*inputs),
        torch.func.jvp(op, tuple(first), tuple(t[0] for t in tangents))[1],
        torch.func.grad(lambda q: torch.func.grad(loss)(q, *first[1:]).square().sum())(first[0]),
    ]


def transformed_part(rank, inputs, tangents):
    def op(*maps):
        return mvkernels.relu_linear_attention(*maps, eps=1e-6, process_group=dist.group.WORLD)

    return transforms(op, *([m.split([4, 1], dim=-2)[rank] for m in maps] for maps in (inputs, tangents)))


def test_transforms_of_the_parts_are_those_of_the_whole_map(tmp_path):
    generator = torch.Generator().manual_seed(0)
    inputs, tangents = (
        [torch.randn(3, 1, 2, 4, 5, 3, generator=generator, dtype=torch.float64) for _ in range(3)] for _ in range(2)
    )

    def op(*maps):
        return mvkernels.relu_linear_attention(*maps, eps=1e-6, backend="reference")

    results = run(2, tmp_path, transformed_part, inputs, tangents)
    for *parts, exact in zip(*results, transforms(op, inputs, tangents)):
        torch.testing.assert_close(torch.cat(parts, -2), exact, rtol=1e-9, atol=1e-9)


def wrong(rank, x):
    with pytest.raises(BackendUnavailable, match="only backend 'reference' can"):
        mvkernels.relu_linear_attention(x, x, x, process_group=dist.group.WORLD, backend="cpp")
    with pytest.raises(TypeError, match="process_group is a str"):
        mvkernels.relu_linear_attention(x, x, x, process_group="all")
    runs, reason = can_run("relu_linear_attention", "cpp", x, x, x, process_group=dist.group.WORLD)
    assert not runs and "only backend 'reference' can" in reason
    assert can_run("relu_linear_attention", "reference", x, x, x, process_group=dist.group.WORLD)[0]
    alone = mvkernels.relu_linear_attention(x, x, x, backend="reference")
    return torch.equal(mvkernels.relu_linear_attention(x, x, x, process_group=dist.new_group([rank])), alone)


def test_what_it_refuses(tmp_path):
    x = torch.randn(1, 2, 4, 3, 3, dtype=torch.float64)
    run(1, tmp_path, wrong, x)
