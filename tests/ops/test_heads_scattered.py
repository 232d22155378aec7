"""Channels-first maps whose groups' pixels lie apart: the C++ kernels copy them into rows, some heads at a time."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

import mvkernels
from mvkernels.dispatch import extension

pytestmark = pytest.mark.skipif(extension.module is None, reason=extension.reason)

# batch, heads, head_dim, height and width, patch, biased: for copies in rounds of all items, of two items (the last
# round has one), of one head of an item, and of pixels that no vector and no patch divides.
SHAPES = [
    (5, 2, 8, (16, 16), 2, False),
    (5, 1, 40, (32, 32), 4, False),
    (2, 3, 40, (48, 48), (4, 6), False),
    (2, 3, 33, (19, 23), (3, 2), False),
    (3, 2, 24, (24, 24), (2, 3), True),
    (2, 3, 40, (48, 48), 8, True),
]


@pytest.fixture(params=extension.module.instruction_sets() if extension.module else [])
def isa(request: Any) -> Any:
    assert extension.module is not None
    before, threads = extension.module.set_instruction_set(request.param), torch.get_num_threads()
    poison = extension.module.set_poison(True)
    torch.set_num_threads(1)
    yield request.param
    torch.set_num_threads(threads)
    extension.module.set_poison(poison)
    extension.module.set_instruction_set(before)


def run(op: Any, maps: list[torch.Tensor], bias: torch.Tensor | None, *sizes: Any) -> list[torch.Tensor]:
    leaves = [m.detach().requires_grad_() for m in maps]
    biases = [] if bias is None else [bias.detach().requires_grad_()]
    out = op(*leaves, *sizes, bias=biases[0] if biases else None, backend="cpp")
    generator = torch.Generator().manual_seed(1)
    cotangent = torch.randn(out.shape, generator=generator).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, [*leaves, *biases], torch.empty_like(out).copy_(cotangent))]


def compare(op: Any, shape: tuple[int, ...], dtype: torch.dtype, bias: torch.Tensor | None, *sizes: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(shape, generator=generator).to(dtype) for _ in range(3)]
    # In the order (B, H, W, heads, head_dim) the kernels read a pixel's dims in place: the same sums in the same order.
    last = [m.permute(0, 3, 4, 1, 2).contiguous().permute(0, 3, 4, 1, 2) for m in maps]
    found = run(op, maps, bias, *sizes)
    for got, want, like in zip(found, run(op, last, bias, *sizes), [maps[0], *maps, bias], strict=False):
        assert torch.equal(got, want)
        if like is not None:
            assert got.stride() == like.stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("batch", "heads", "dim", "size", "patch", "biased"), SHAPES)
def test_copies_give_what_maps_in_rows_give(
    isa: str, batch: int, heads: int, dim: int, size: tuple[int, int], patch: Any, biased: bool, dtype: torch.dtype
) -> None:
    ph, pw = patch if isinstance(patch, tuple) else (patch, patch)
    tokens = size[0] // ph * (size[1] // pw)
    bias = torch.randn(heads, tokens, tokens, generator=torch.Generator().manual_seed(2)).to(dtype) if biased else None
    compare(mvkernels.patch_attention, (batch, heads, dim, *size), dtype, bias, patch)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shift", [(0, 0), (3, 2)])
def test_windows_of_half_types(isa: str, shift: tuple[int, int], dtype: torch.dtype) -> None:
    bias = torch.randn(2, 35, 35, generator=torch.Generator().manual_seed(2)).to(dtype)
    compare(partial(mvkernels.window_attention, shift=shift), (3, 2, 20, 14, 21), dtype, bias, (5, 7))


def test_values_of_other_dims_and_threads(isa: str) -> None:
    torch.manual_seed(0)
    query, key = torch.randn(2, 2, 2, 24, 32, 32)
    value = torch.randn(2, 2, 40, 32, 32)
    want = mvkernels.patch_attention(query, key, value, 2, backend="reference")
    for threads in (1, 3):
        torch.set_num_threads(threads)
        torch.testing.assert_close(mvkernels.patch_attention(query, key, value, 2, backend="cpp"), want)
