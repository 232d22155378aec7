"""Small kernels in PTX for the tests of the machine: their beginnings and ends, and how they are run."""

from __future__ import annotations

import numpy as np

from tests.ptx import assembly
from tests.ptx.assembly import Array, Result

# %rd9: the thread's four bytes of the array out; %r9: those of shared memory, at whose beginning is %r8.
PLACES = """
    mul.wide.u32 %rd8, %r0, 4;
    add.s64 %rd9, %rd0, %rd8;
    mov.b32 %r8, global_smem;
    shl.b32 %r7, %r0, 2;
    add.s32 %r9, %r8, %r7;
"""


def run(body: str, *inputs: Array, threads: int = 64, blocks: int = 1, **how: object) -> tuple[Array, Result]:
    """(what the threads stored, what was found); the body ends with the thread's result in %r5."""
    out = np.zeros(threads * blocks, np.uint32)
    ptx = assembly.kernel(PLACES + body + "st.global.b32 [%rd9], %r5;", 1 + len(inputs), threads)
    return out, assembly.execute(ptx, [out, *inputs], blocks, 4 * threads + 256, **how)  # type: ignore[arg-type]


def shared_exchange(between: str) -> str:
    """Each thread stores its number and reads that of the thread 32 further on."""
    return (
        f"st.shared.b32 [%r9], %r0; {between} xor.b32 %r6, %r7, 128; add.s32 %r6, %r8, %r6; ld.shared.b32 %r5, [%r6];"
    )


NEIGHBOUR = "st.shared.b32 [%r9], %r0; {} xor.b32 %r6, %r7, 4; add.s32 %r6, %r8, %r6; ld.shared.b32 %r5, [%r6];"
# Sixteen bytes a thread from the first input to shared memory, and what another thread's first four of them are.
COPY = """
    shl.b32 %r11, %r0, 4;
    cvt.u64.u32 %rd11, %r11;
    add.s64 %rd12, %rd1, %rd11;
    rem.u32 %r13, %r0, 16;
    shl.b32 %r13, %r13, 4;
    add.s32 %r12, %r8, %r13;
    setp.lt.u32 %p1, %r0, 16;
    @%p1 cp.async.cg.shared.global [%r12 + 0], [%rd12 + 0], 16;
    {}
    ld.shared.b32 %r5, [%r12];
"""
DONE = "cp.async.commit_group; cp.async.wait_group 0; bar.sync 0;"
# A lane of each warp stores to one place; %p2 is of the second warp.
SEVERAL = """
    and.b32 %r20, %r0, 31; setp.eq.u32 %p1, %r20, 0; setp.eq.u32 %p2, %r0, 32; {} @%p1 st.shared.b32 [%r8], %r6;
"""
READ = "ld.shared.b32 %r5, [%r8];"
DONE_WRITING = "bar.sync 0;" + READ
DATA = np.arange(256, dtype=np.uint32)
