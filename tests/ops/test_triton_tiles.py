"""The addressing that Triton kernels share."""

import random

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from mvkernels import launch  # noqa: E402
from mvkernels.ops.multiscale_linear_attention import triton_plan as multiscale  # noqa: E402
from mvkernels.ops.patch_attention import triton_plan  # noqa: E402
from mvkernels.ops.patch_attention.triton_tiles import divider, pixel_of  # noqa: E402
from mvkernels.ops.relu_linear_attention import triton_plan as single  # noqa: E402
from tests.ops.bridges import interpreter  # noqa: E402


@triton.jit
def _pixels(y_ptr, x_ptr, first, width, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    n = first + tl.arange(0, BLOCK)
    y, x = pixel_of(n, divider(width), 0, 0, 1, 1, False, WIDE)
    tl.store(y_ptr + tl.arange(0, BLOCK), y)
    tl.store(x_ptr + tl.arange(0, BLOCK), x)


@interpreter
def test_a_pixel_is_found_by_a_product_as_by_a_division():
    draw = random.Random(0)
    sizes = [(1, 1), (7, 1), (1, 65_535), (1_300, 1_817), (4_000_000, 32), (2**31 - 64, 1)]
    sizes += [(draw.randint(1, 2**14), draw.randint(1, 2**9)) for _ in range(40)]
    for height, width in sizes:
        assert triton_plan.divides(height, width)
        for first in {0, max(0, width - 33), max(0, height * width - 64)}:
            for wide in (False, True):
                y, x = torch.empty(2, 64, dtype=torch.int64)
                _pixels[(1,)](y, x, first, width, BLOCK=64, WIDE=wide)
                n = torch.arange(first, first + 64)
                keep = n < height * width
                assert torch.equal(y[keep], (n // width)[keep]), (height, width, first)
                assert torch.equal(x[keep], (n % width)[keep]), (height, width, first)


def test_where_a_product_would_not_do_it_is_a_division():
    assert not triton_plan.divides(1, 65_536) and not triton_plan.divides(2_000, 2_000)
    device = launch.Device("A Device", "sm_90", 100)
    for side, wide in ((64, False), (2_000, True)):
        strides = (side * side * 96, 16, 1, side * 96, 96)
        problem = triton_plan.Problem(
            (1, 2, 16, side, side), 16, tuple((name, strides) for name in "qkv"), None, 1, (2, 2), torch.float16,
            "ieee", device,
        )  # fmt: skip
        assert triton_plan.forward_launches(problem)[0].meta["WIDE"] == wide
        maps = single.Problem((1, 6, 16, side, side), (("g", strides), ("x", strides)), torch.float16, "ieee", device)
        assert multiscale.weight_launches(multiscale.Problem(maps, 5, (False, False)))[0][0].meta["WIDE"] == wide
