"""multiscale_linear_attention's kernels in CUDA C++, compiled by nvcc and executed: right results, and no fault."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d

from mvkernels import testing
from mvkernels.dispatch.registry import OPS
from mvkernels.ops.multiscale_linear_attention.cuda import launcher, plan
from mvkernels.ops.multiscale_linear_attention.triton import launcher as triton
from mvkernels.triton import configs
from tests.ptx import nvcc
from tests.ptx.launches import Executed, executed

pytestmark = pytest.mark.skipif(bool(nvcc.why_not()), reason=nvcc.why_not())

OP = OPS["multiscale_linear_attention"]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _map(kind: str, shape: Sequence[int], strides: str, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    found = testing.make_map(tuple(shape), strides, dtype, "cpu", generator)
    if kind == "constant":
        found.fill_(1.5)
    elif kind == "peaked":
        found.mul_(torch.where(torch.rand(found.shape, generator=generator) < 0.05, 64.0, 0.01))
    return found.flatten(1, 2)


def _weights(channels: int, dim: int, side: int, biases: tuple[bool, bool], dtype: torch.dtype,
             generator: torch.Generator) -> tuple[Tensor, Tensor, tuple[Tensor | None, Tensor | None]]:  # fmt: skip
    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    first, second = (drawn(channels) if given else None for given in biases)
    return drawn(channels, 1, side, side) / side, drawn(channels, dim, 1, 1) * dim**-0.5, (first, second)


def _held(name: str, results: dict[str, Tensor], held: testing.Yardstick, log: list[Executed]) -> None:
    wrong = [str(each) for each in held.compare(results) if not each.ok]
    wrong += [f"{launch.kernel}: {found}" for launch in log for found in launch.findings]
    assert not wrong, f"{name}\n" + "\n".join(wrong)


# Heads' channels, head_dim, side of the kernel, H, W, strides, biases, processors, kind of input.
CONVOLUTIONS = [
    (6, 16, 5, 9, 5, "contiguous", (True, True), 132, "normal"),
    (3, 32, 5, 1, 1, "channels_last", (False, True), 132, "normal"),
    (8, 16, 5, 17, 33, "channels_last", (False, False), 1, "normal"),
    (2, 32, 5, 16, 16, "sliced", (True, False), 2, "peaked"),
    (3, 32, 3, 14, 14, "packed", (True, True), 2, "constant"),
    (6, 16, 3, 7, 7, "channels_last", (False, False), 132, "normal"),
    (3, 32, 5, 7, 7, "channels_last", (False, False), 132, "peaked"),
    (5, 16, 3, 10, 19, "offset", (True, True), 132, "normal"),
]


def _parameters(cases: Sequence[Any], side: Callable[[Any], int]) -> list[Any]:
    # Of float16 the kernels of one side are compiled by default: the others differ from bfloat16's in their products.
    return [
        pytest.param(case, dtype, marks=[pytest.mark.slow] if dtype == torch.float16 and side(case) != 5 else [])
        for case in cases
        for dtype in DTYPES
    ]


@pytest.mark.parametrize(("case", "dtype"), _parameters(CONVOLUTIONS, lambda case: case[2]), ids=str)
def test_convolutions_and_their_gradients(case: tuple[Any, ...], dtype: torch.dtype) -> None:
    groups, dim, side, height, width, strides, biases, processors, kind = case
    generator = torch.Generator().manual_seed(0)
    x = _map(kind, (2, groups, dim, height, width), strides, dtype, generator)
    channels = groups * dim
    wide, mixing, both = _weights(channels, dim, side, biases, dtype, generator)
    grad = _map("normal", (2, groups, dim, height, width), "channels_last", dtype, generator)
    before = _map("normal", (2, groups, dim, height, width), "channels_last", dtype, generator)
    inputs = [x, wide, mixing, *(b for b in both if b is not None)]

    def formula(computed: torch.dtype) -> dict[str, Tensor]:
        leaves = [each.detach().to(computed).requires_grad_() for each in inputs]
        given = iter(leaves[3:])
        first, second = (None if b is None else next(given) for b in both)
        each = conv2d(leaves[0], leaves[1], first, padding=side // 2, groups=channels)
        out = conv2d(each, leaves[2], second, groups=groups)
        found = torch.autograd.grad(out, leaves, grad.to(computed))
        return {"out": out.detach(), "dx": before.to(computed) + found[0]} | {
            f"dw{i}": gradient for i, gradient in enumerate(found[1:])
        }

    held = testing.Yardstick(formula, dtype)
    with executed(processors=processors) as log:
        convolutions = launcher.Convolutions(dim, wide, mixing, both)
        read = launcher.readable(x)
        out = torch.empty_like(read)
        convolutions.aggregate(read, out)
        gradients = [each for each in convolutions.weight_gradients(grad, read) if each.numel()]
        again = [each for each in convolutions.weight_gradients(grad, read) if each.numel()]
        to = before.clone(memory_format=torch.preserve_format)
        convolutions.add_map_gradient(grad, to)
    assert all(torch.equal(*pair) for pair in zip(gradients, again, strict=True))
    results = {"out": out, "dx": to} | {f"dw{i}": each for i, each in enumerate(gradients)}
    _held(str(case), results, held, log)


def _by_taps(x: Tensor, wide: Tensor, mixing: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Both convolutions, tap by tap: what lies beyond the border is no term, not even as a zero."""
    (height, width), (groups, dim) = x.shape[2:], (x.shape[1] // mixing.shape[1], mixing.shape[1])
    each = first[:, None, None].expand(x.shape).clone()
    reach = wide.shape[-1] // 2

    def cut(size: int, step: int) -> tuple[slice, slice]:
        return slice(max(0, -step), size - max(0, step)), slice(max(0, step), size + min(0, step))

    for dy, dx in itertools.product(range(-reach, reach + 1), repeat=2):
        if abs(dy) < height and abs(dx) < width:
            (y, to_y), (x_, to_x) = cut(height, dy), cut(width, dx)
            each[..., y, x_] += x[..., to_y, to_x] * wide[:, 0, dy + reach, dx + reach, None, None]
    mixed = torch.einsum("goi,bgihw->bgohw", mixing.view(groups, dim, dim), each.unflatten(1, (groups, dim)))
    return mixed.flatten(1, 2) + second[:, None, None]


# Side of the kernel, H, W, processors; a pixel of the border is then in a whole square, or in one that the map cuts.
BORDERS = [(3, 4, 5, 132), (5, 8, 8, 132), (5, 7, 14, 1), (3, 1, 2, 132), (5, 9, 17, 1)]


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("border", BORDERS, ids=str)
def test_nan_and_infinity_reach_only_what_they_are_a_term_of(
    border: tuple[int, ...], dtype: torch.dtype, backend: str
) -> None:
    """One pixel of the map or of the gradient: all gradients, and the scale, of any channel, pixel and tap."""
    side, height, width, processors = border
    groups, dim = 5, 16
    generator = torch.Generator().manual_seed(1)
    shape = (2, groups, dim, height, width)
    x, grad, before = (_map("normal", shape, "channels_last", dtype, generator) for _ in range(3))
    wide, mixing, (first, second) = _weights(groups * dim, dim, side, (True, True), dtype, generator)
    module: Any = launcher if backend == "cuda" else triton
    places = [(0, 0), (height - 1, width - 1), (height // 2, 0)]
    bad = [(which, place, torch.nan) for which in (0, 1) for place in places]
    bad += [(1, (0, 0), torch.inf), (0, (height - 1, width - 1), -torch.inf)]

    def results(x: Tensor, grad: Tensor) -> dict[str, Tensor]:
        convolutions = module.Convolutions(dim, wide, mixing, (first, second))
        out, found = torch.empty_like(x), convolutions.weight_gradients(grad, x)
        convolutions.aggregate(x, out)
        to = before.clone(memory_format=torch.preserve_format)
        convolutions.add_map_gradient(grad.clone(memory_format=torch.preserve_format), to)
        return {"out": out, "dx": to, **{f"dw{i}": each for i, each in enumerate(found)}}

    with executed(processors=processors) as log:
        clean = results(x, grad)
        for which, (y, x_), value in bad:
            maps = [x.clone(memory_format=torch.preserve_format), grad.clone(memory_format=torch.preserve_format)]
            maps[which][1, 19, y, x_] = value
            leaves = [each.double().requires_grad_() for each in (maps[0], wide, mixing, first, second)]
            out = _by_taps(*leaves)
            wanted = [out.detach(), *torch.autograd.grad(out, leaves, maps[1].double())]
            wanted[1] = wanted[1] + before.double()
            for (name, found), exact in zip(results(*maps).items(), wanted, strict=True):
                told = f"{name} of {value} at {y, x_} in {'gradient' if which else 'map'}"
                assert torch.equal(found.isfinite(), exact.isfinite()), told
                # Triton's kernels sum over taps and channels last, where infinities of both signs make NaN.
                if backend == "cuda" or (name, which) not in {("dw0", 0), ("dw1", 0), ("dw1", 1)}:
                    assert torch.equal(found.isnan(), exact.isnan()), told
                rest, same = found[exact.isfinite()], clean[name][exact.isfinite()]
                torch.testing.assert_close(rest, same, msg=lambda text, told=told: f"{told}: {text}")
    assert not [found for launch in log for found in launch.findings]


def test_a_depthwise_sum_beyond_the_border_may_pass_the_largest_float16() -> None:
    """It is made beside those of the map's pixels, is of no use to anyone, and must not turn a gradient into NaN."""
    dim, width = 16, 5
    x = (torch.arange(width) * 15000.0).expand(1, dim, width, width).half()
    x = x.contiguous(memory_format=torch.channels_last)
    wide = torch.zeros(dim, 1, 5, 5, dtype=torch.float16)
    wide[:, 0, 2, 1], wide[:, 0, 2, 2] = 2.0, -2.0  # -30000 at each pixel, and twice 60000 on the right of the last
    mixing = torch.eye(dim, dtype=torch.float16)[:, :, None, None].contiguous()
    grad = torch.full_like(x, 2.0**-7)
    with executed():
        found = launcher.Convolutions(dim, wide, mixing, (None, None)).weight_gradients(grad, x)[1]
    torch.testing.assert_close(found, torch.full_like(found, -30000.0 * 2.0**-7 * (width - 1) * width))


def test_a_block_takes_several_tiles() -> None:
    """The cases above are few tiles on many processors; here the launches of one case are seen to loop."""
    groups, dim, side, height, width, strides, *_ = CONVOLUTIONS[2]
    x = torch.empty(2, groups * dim, height, width, dtype=torch.bfloat16, memory_format=torch.channels_last)
    named = [(name, x.unflatten(1, (-1, dim))) for name in "xog"]
    with executed(processors=1):
        problem = plan.ScaleProblem.of(named[0][1], named, False, kernel=side, biases=(False, False))
    (aggregate,), (gradient,) = plan.aggregate_launches(problem), plan.map_launches(problem)
    (sums, _), (slices, _) = plan.weight_launches(problem)
    slabs = -(-groups * dim // plan.slab(dim))
    assert strides == "channels_last"
    assert aggregate.grid == gradient.grid < 2 * 3 * 3 * slabs
    assert [launch.ints[6:8] for launch in (aggregate, gradient)] == [(aggregate.ints[6], 2)] * 2, "steps, buffers"
    assert sums.grid == slabs * slices < 2 * 3 * 5 * slabs


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90", "sm_120"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_blocks_fit(arch: str, dtype: torch.dtype) -> None:
    """No block wants more shared memory than one may have, with one buffer or with two; some have two."""
    device = configs.Device("", arch, 2)
    seen = set()
    for dim, side, width in itertools.product(plan.HEAD_DIMS, plan.KERNELS, (7, 40)):
        assert plan.why_not(dtype, dim, [side], arch) is None
        x = torch.empty(4, 6, dim, 40, width, dtype=dtype)
        with mock.patch.object(configs, "device_of", lambda *_: device):
            problem = plan.ScaleProblem.of(x, [(name, x) for name in "xog"], False, kernel=side, biases=(False, False))
        launches = [*plan.aggregate_launches(problem), *plan.map_launches(problem), plan.weight_launches(problem)[0][0]]
        for launch in launches:
            assert launch.shared_bytes <= configs.shared_memory_of(arch)
            seen.add(launch.ints[7])
    assert 2 in seen


@pytest.mark.parametrize("kernel", ["aggregate", "map_gradient", "weight_sums"])
def test_each_barrier_is_needed(kernel: str) -> None:
    """Without one of a kernel's barriers a race is reported, or a value that nobody has written: in blocks of several
    tiles with two buffers, of one tile, or of several with one buffer."""
    groups, dim = 5, 16
    generator = torch.Generator().manual_seed(0)
    x, grad = (_map("normal", (2, groups, dim, 12, 18), "channels_last", torch.bfloat16, generator) for _ in range(2))
    wide, mixing, both = _weights(groups * dim, dim, 5, (True, True), torch.bfloat16, generator)
    convolutions = launcher.Convolutions(dim, wide, mixing, both)
    calls: dict[str, Callable[[], Any]] = {
        "aggregate": lambda: convolutions.aggregate(x, torch.empty_like(x)),
        "map_gradient": lambda: convolutions.add_map_gradient(grad, torch.zeros_like(x)),
        "weight_sums": lambda: convolutions.weight_gradients(grad, x),
    }

    def one_buffer(_: Any, kernel: str, by_registers: int, buffers: int) -> int:
        return 2 - buffers

    ptx = nvcc.ptx_of("multiscale_linear_attention/half_5")
    begin = ptx.index(f".entry multiscale_{kernel}_bf16_5_{dim}{'' if kernel == 'weight_sums' else '_16'}(")
    end = ptx.find(".visible .entry", begin)
    barriers = [each for each in re.finditer(r"bar\.sync\s+0;", ptx) if begin < each.start() < end]
    for barrier in barriers:
        without = ptx[: barrier.start()] + ptx[barrier.end() :]
        found = []
        for processors, resident in ((1, None), (132, None), (1, one_buffer)):
            with ExitStack() as stack:
                log = stack.enter_context(executed(processors=processors))
                stack.enter_context(mock.patch.object(nvcc, "ptx_of", lambda file: without))  # noqa: B023
                if resident:
                    stack.enter_context(mock.patch.object(plan._Plan, "resident", resident))
                configs.forget()
                calls[kernel]()
            configs.forget()
            found += [each for launch in log for each in launch.findings]
        assert found
    assert len(barriers) == {"aggregate": 3, "map_gradient": 4, "weight_sums": 7}[kernel]


OPS_CASES = [
    ((2, 2, 16, 9, 5), 5, "contiguous", True, False),
    ((1, 2, 32, 7, 7), 3, "channels_last", False, False),
    ((1, 3, 16, 6, 18), 5, "sliced", True, True),
]


@pytest.mark.parametrize(("case", "dtype"), _parameters(OPS_CASES, lambda case: case[1]), ids=str)
def test_the_op(case: tuple[Any, ...], dtype: torch.dtype) -> None:
    """Forward and backward of the whole op, the attention on Triton's kernels."""
    (batch, heads, dim, height, width), side, strides, bias, tf32 = case
    generator = torch.Generator().manual_seed(0)
    arguments: dict[str, Any] = {
        "qkv": _map("normal", (batch, 3 * heads, dim, height, width), strides, dtype, generator),
        "head_dim": dim,
    }
    wide, mixing, both = _weights(3 * heads * dim, dim, side, (bias, bias), dtype, generator)
    arguments |= {"depthwise": (wide,), "pointwise": (mixing,)}
    if bias:
        arguments |= {"depthwise_bias": both[:1], "pointwise_bias": both[1:]}
    with executed(tf32=tf32) as log:
        found = testing.check(OP, arguments, "cuda")
    wrong = [str(each) for each in found if not each.ok]
    wrong += [f"{launch.kernel}: {fault}" for launch in log for fault in launch.findings]
    assert not wrong, "\n".join(wrong)
    names = {launch.kernel.split("_")[1] for launch in log if launch.kernel.startswith("multiscale")}
    assert names == {"aggregate", "weight", "map"}


def test_reasons() -> None:
    """What the kernels cannot run, each said in one line."""
    x = torch.empty(1, 96, 7, 7)
    wide, mixing = torch.empty(96, 1, 5, 5), torch.empty(96, 16, 1, 1)
    assert "tensors are on cpu" in str(launcher.why_not(x, [wide], [mixing], 16))
    with executed():
        fake = mock.Mock(wraps=x, device=torch.device("cuda"), dtype=torch.float64, shape=x.shape)
        assert "float64" in str(launcher.why_not(fake, [wide], [mixing], 16))
        fake.dtype = torch.bfloat16
        assert "no convolutions" in str(launcher.why_not(fake, [], [], 16))
        assert "head_dim 24" in str(launcher.why_not(fake, [wide], [mixing], 24))
        assert "kernel of 9" in str(launcher.why_not(fake, [torch.empty(96, 1, 9, 9)], [mixing], 16))
        assert launcher.why_not(fake, [wide], [mixing], 16) is None
        fake.dtype = torch.float32
        with mock.patch.object(plan.configs, "shared_memory_of", lambda arch: 64 << 10):
            assert "shared memory" in str(launcher.why_not(fake, [wide], [mixing], 16))
