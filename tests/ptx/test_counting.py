"""Blocks of a sample, executed to count: how often each instruction is, and what is asked of the memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.ptx import assembly, counting

LOOP = """
	mov.u32 %r2, 0;
$again:
	add.s32 %r2, %r2, 1;
	setp.lt.s32 %p0, %r2, 7;
	@%p0 bra $again;
	mul.wide.u32 %rd2, %r0, 4;
	add.s64 %rd3, %rd0, %rd2;
	ld.global.b32 %r3, [%rd3];
	ld.global.b32 %r4, [%rd3];
	add.s64 %rd4, %rd1, %rd2;
	st.global.b32 [%rd4], %r3;
"""


def counted(body: str, *tensors: torch.Tensor, threads: int = 64, blocks: tuple[int, ...] = (0,), cache: int = 1 << 16):
    return counting.count(assembly.kernel(body, len(tensors), threads), "", tensors, 0, blocks, cache)


def test_instructions_are_counted_by_warps() -> None:
    x, y = torch.arange(64, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    found = counted(LOOP, x, y, blocks=(0, 5, 9))
    names = [each.name for each in found.program.module.statements]
    assert found.blocks == 3
    assert found.executed[names.index("add.s32")] == 3 * 2 * 7  # blocks, warps, turns
    assert found.executed[names.index("ld.global.b32")] == 3 * 2
    assert found.executed.sum() == sum(found.counters.issued)
    assert torch.equal(x, y)  # it is executed, not only counted


def test_sectors_passes_and_what_the_cache_has() -> None:
    x, y = torch.arange(64, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    found = counted(LOOP, x, y)
    # 128 bytes a request: four sectors and one pass, if the tensor begins with one; else a sector more.
    sectors = [5 if tensor.data_ptr() % 32 else 4 for tensor in (x, y)]
    assert found.traffic[0].tolist() == [4 * sectors[0], found.traffic[0][1], 0, 4]
    assert found.traffic[0][1] in (8, 9)  # read twice, and the second time it is there
    assert found.traffic[1].tolist() == [0, 0, 2 * sectors[1], 2]


def test_a_small_cache_forgets() -> None:
    strided = """
	mul.wide.u32 %rd2, %r0, 128;
	add.s64 %rd3, %rd0, %rd2;
	ld.global.b32 %r3, [%rd3];
	ld.global.b32 %r4, [%rd3];
"""
    x = torch.zeros(32 * 32, dtype=torch.int32)
    large, small = (counted(strided, x, threads=32, cache=size).traffic[0] for size in (1 << 16, 16 * 128))
    assert large.tolist() == [64, 32, 0, 64]
    assert small.tolist() == [64, 64, 0, 64]  # sixteen lines, and thirty-two are read in turn


@pytest.mark.parametrize(("stride", "passes"), ((4, 1), (8, 2), (128, 32), (132, 8)))
def test_passes_are_of_banks_or_of_four_lines(stride: int, passes: int) -> None:
    strided = f"""
	mul.wide.u32 %rd2, %r0, {stride};
	add.s64 %rd3, %rd0, %rd2;
	ld.global.b32 %r3, [%rd3];
"""
    x = torch.zeros(32 * 33, dtype=torch.int32)
    begin = -x.data_ptr() % 128 // 4
    found = counted(strided, x[begin:], threads=32)
    assert found.traffic[0][3] == passes


def test_samples_have_the_first_block_and_the_last() -> None:
    assert counting.sample_of(3, 4) == [0, 1, 2]
    assert counting.sample_of(100, 4) == [0, 33, 66, 99]


def test_nothing_is_checked_and_nothing_is_traced() -> None:
    x = torch.empty(32, dtype=torch.int32)  # undefined, and no trace says so
    found = counted(LOOP, x, torch.empty(32, dtype=torch.int32), threads=32)
    assert np.all(found.executed[-1:] == 1)
