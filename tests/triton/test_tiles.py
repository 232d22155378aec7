"""The addressing that Triton kernels share."""

import random

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from mvkernels.ops.multiscale_linear_attention.triton import plan as multiscale  # noqa: E402
from mvkernels.triton import configs, launch  # noqa: E402
from mvkernels.triton.attention import plan  # noqa: E402
from mvkernels.triton.maps import divides  # noqa: E402
from mvkernels.triton.problem import Problem  # noqa: E402
from mvkernels.triton.tiles import divider, pixel_of  # noqa: E402
from tests.ops.bridges import interpreter  # noqa: E402


@triton.jit
def _pixels(y_ptr, x_ptr, first, width, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    n = first + tl.arange(0, BLOCK)
    y, x = pixel_of(n, divider(width), 0, 0, 1, 1, False, WIDE)
    tl.store(y_ptr + tl.arange(0, BLOCK), y)
    tl.store(x_ptr + tl.arange(0, BLOCK), x)


def test_masks_are_left_out_where_every_tile_of_tokens_is_whole():
    device = configs.Device("A Device", "sm_90", 100)

    def found(height, width, patch, shift=None, partners=None):
        strides = tuple((name, (height * width * 64, 32, 1, width * 64, 64)) for name in "qkvg")
        problem = plan.AttentionProblem(
            (100, 2, 32, height, width), strides, torch.float16, "ieee", device, "patch_attention", 32, None, 1,
            (patch, patch), shift, partners,
        )  # fmt: skip
        launches = plan.forward_launches(problem) + plan.backward_launches(problem, False)[0]
        return {(launch.name, launch.meta["WHOLE"], launch.meta["COLUMNS"]) for launch in launches}

    assert found(32, 32, 2) == {("forward_rows", True, 16), ("backward_blocks", True, 16)}
    assert found(32, 48, 2) == {("forward_rows", True, 0), ("backward_blocks", True, 0)}
    assert found(32, 31, 2) == found(20, 20, 2) == {("forward_rows", False, 0), ("backward_blocks", False, 0)}
    assert found(32, 32, 16, (0, 0)) == {("forward_rows", True, 16), ("backward_blocks", True, 16)}
    assert found(32, 32, 16, (4, 4)) == {("forward_rows", False, 0), ("backward_blocks", False, 0)}
    assert found(16, 8, 1, None, (16, 16)) == {("forward_rows", True, 0), ("backward_blocks", True, 0)}
    assert found(16, 8, 1, None, (15, 16)) == {("forward_rows", False, 0), ("backward_blocks", False, 0)}


@interpreter
def test_a_pixel_is_found_by_a_product_as_by_a_division():
    draw = random.Random(0)
    sizes = [(1, 1), (7, 1), (1, 65_535), (1_300, 1_817), (4_000_000, 32), (2**31 - 64, 1)]
    sizes += [(draw.randint(1, 2**14), draw.randint(1, 2**9)) for _ in range(40)]
    for height, width in sizes:
        assert divides(height, width)
        for first in {0, max(0, width - 33), max(0, height * width - 64)}:
            for wide in (False, True):
                y, x = torch.empty(2, 64, dtype=torch.int64)
                _pixels[(1,)](y, x, first, width, BLOCK=64, WIDE=wide)
                n = torch.arange(first, first + 64)
                keep = n < height * width
                assert torch.equal(y[keep], (n // width)[keep]), (height, width, first)
                assert torch.equal(x[keep], (n % width)[keep]), (height, width, first)


def test_where_a_product_would_not_do_it_is_a_division():
    assert not divides(1, 65_536) and not divides(2_000, 2_000)
    device = configs.Device("A Device", "sm_90", 100)
    for side, wide in ((64, False), (2_000, True)):
        strides = (side * side * 96, 16, 1, side * 96, 96)
        problem = plan.AttentionProblem(
            (1, 2, 16, side, side), tuple((name, strides) for name in "qkv"), torch.float16, "ieee", device,
            "patch_attention", 16, None, 1, (2, 2),
        )  # fmt: skip
        assert plan.forward_launches(problem)[0].meta["WIDE"] == wide
        maps = (("g", strides), ("x", strides))
        scale = multiscale.ScaleProblem((1, 6, 16, side, side), maps, torch.float16, "ieee", device, 5, (False, False))
        assert multiscale.weight_launches(scale)[0][0].meta["WIDE"] == wide


@interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("size", [1, 37, 520])
@pytest.mark.parametrize("slices", [2, 7, 128, 300])
def test_slices_are_summed(slices, size, dtype):
    """In one step and in several, the last of them not full; what lies around the buffers is NaN."""
    problem = Problem.of(torch.empty(0, dtype=dtype), (), True)
    of, around = launch.parts(slices, torch.empty(size, dtype=dtype)), 64
    buffers = {}
    for name, buffer in ("a_sums", of), ("b_sums", of), ("a", of.new_empty(size, dtype=dtype)), ("b", of[0].to(dtype)):
        whole = buffer.new_full((buffer.numel() + 2 * around,), float("nan"))
        buffers[name] = whole[around:-around].view(buffer.shape)
    generator = torch.Generator().manual_seed(0)
    for name in ("a_sums", "b_sums"):
        buffers[name].normal_(generator=generator).mul_(64).round_().div_(64)  # sums are exact
    for names in (("a", "b"), ("a",)):
        sources = tuple(name + "_sums" for name in names)
        each = launch.sum_slices(problem, sources, names, size, slices)
        assert each.meta["PARTS"] >= min(slices, 128)
        each(buffers, {})
        for name in names:
            assert torch.equal(buffers[name], buffers[name + "_sums"].double().sum(0).to(dtype))
            buffers[name].fill_(float("nan"))
