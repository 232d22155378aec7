"""Each fault that the machine looks for, in a kernel that has it and in one that has not."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ptx import assembly
from tests.ptx.bodies import COPY, DATA, DONE, DONE_WRITING, NEIGHBOUR, PLACES, READ, SEVERAL, run, shared_exchange

FAULTY = {
    # name: (kind of fault or None, body)
    "exchange": (None, shared_exchange("bar.sync 0;")),
    "exchange without a barrier": ("race, undefined value", shared_exchange("")),
    "one value of several warps": (None, SEVERAL.format("mov.b32 %r6, 7;") + DONE_WRITING),
    "one value of several warps, and another after it": (
        "race", SEVERAL.format("mov.b32 %r6, 7;") + "mov.b32 %r6, 5; @%p2 st.shared.b32 [%r8], %r6;" + DONE_WRITING
    ),
    "numbers of several warps that differ by little": (
        "race", SEVERAL.format("shr.u32 %r6, %r0, 5; add.s32 %r6, %r6, 16777216;") + DONE_WRITING
    ),
    "one value of several lanes, and another of the last": (
        "race between lanes", "mov.b32 %r6, 7; setp.lt.u32 %p1, %r0, 32; @%p1 st.shared.b32 [%r8], %r6;"
        "mov.b32 %r6, 900;"
        "setp.eq.u32 %p2, %r0, 31; @%p2 st.shared.b32 [%r8], %r6;" + DONE_WRITING
    ),
    "one value of several warps, read before a barrier": (
        "race", SEVERAL.format("mov.b32 %r6, 7;") + "mov.b32 %r5, 0; @%p1 " + READ
    ),
    "an undefined value, and the same bits of another warp": (
        "race, undefined value", SEVERAL.format("mov.b32 %r6, 0; @%p2 mov.b32 %r6, %r40;") + DONE_WRITING
    ),
    "one value of several lanes, read before a barrier": (
        "race between lanes", "mov.b32 %r6, 7; mov.b32 %r5, 0; setp.lt.u32 %p1, %r0, 2; @%p1 st.shared.b32 [%r8], %r6;"
        "@%p1 ld.shared.b32 %r5, [%r8];"
    ),
    "a wider store of another warp with the same part": (
        None, "mov.b32 %r5, 0; setp.eq.u32 %p1, %r0, 0; setp.eq.u32 %p2, %r0, 32; mov.b32 %r6, 3; mov.b32 %r7, 9;"
        "@%p1 st.shared.b32 [%r8], %r6; @%p2 st.shared.v2.b32 [%r8], {%r6, %r7};"
    ),
    "lanes whose sums drift apart": (
        "race between lanes", "setp.lt.u32 %p1, %r0, 32; shl.b32 %r6, %r0, 1; add.s32 %r6, %r6, 1065353216;"
        "@%p1 st.shared.b32 [%r8], %r6; mov.b32 %r5, 0;"
    ),
    "written again before it is read": (
        "race", shared_exchange("bar.sync 0;") + "st.shared.b32 [%r9], %r5;"
    ),
    "written again after it is read": (None, shared_exchange("bar.sync 0;") + "bar.sync 0; st.shared.b32 [%r9], %r5;"),
    "two warps to one place": (
        "race", "shr.u32 %r6, %r0, 5; mul.lo.s32 %r6, %r6, 100; st.shared.b32 [%r8], %r6; mov.b32 %r5, 0;"
    ),
    "two warps with one value": (None, "st.shared.b32 [%r8], 7; mov.b32 %r5, 0;"),
    "two lanes to one place": (
        "race between lanes", "shr.u32 %r6, %r7, 3; shl.b32 %r6, %r6, 2; add.s32 %r6, %r8, %r6;"
        "mul.lo.s32 %r4, %r0, 99; st.shared.b32 [%r6], %r4; mov.b32 %r5, 0;"
    ),
    "two warps, small numbers": ("race", "shr.u32 %r6, %r0, 5; st.shared.b32 [%r8], %r6; mov.b32 %r5, 0;"),
    "two lanes, a sum rounded in two ways": (
        None, "setp.lt.u32 %p1, %r0, 32; and.b32 %r6, %r0, 1; add.s32 %r6, %r6, 1065353216;"
        "@%p1 st.shared.b32 [%r8], %r6; mov.b32 %r5, 0;"
    ),
    "two warps, a sum rounded in two ways": (
        "race", "shr.u32 %r6, %r0, 5; add.s32 %r6, %r6, 1065353216; st.shared.b32 [%r8], %r6; mov.b32 %r5, 0;"
    ),
    "two warps, 128 and 129": (
        "race",
        "shr.u32 %r6, %r0, 5; shl.b32 %r6, %r6, 16; add.s32 %r6, %r6, 1124073472;"
        "st.shared.b32 [%r8], %r6; mov.b32 %r5, 0;",
    ),
    "read by all lanes and written by the last": (
        "race between lanes",
        "setp.lt.u32 %p1, %r0, 32; @%p1 st.shared.b32 [%r8], 5; bar.sync 0; mov.b32 %r5, 0;"
        "@%p1 ld.shared.b32 %r5, [%r8]; setp.eq.b32 %p2, %r0, 31; @%p2 st.shared.b32 [%r8], %r5;",
    ),
    "copied over by a neighbour": (
        "race between lanes",
        "mov.b32 %r5, 0; mul.wide.u32 %rd12, %r0, 4; add.s64 %rd12, %rd1, %rd12; st.shared.b32 [%r9], %r0;"
        "xor.b32 %r6, %r7, 4; add.s32 %r6, %r8, %r6; cp.async.ca.shared.global [%r6], [%rd12], 4;" + DONE,
    ),
    "read and written by another lane": (
        "race between lanes",
        NEIGHBOUR.format("bar.warp.sync -1;") + "st.shared.b32 [%r9], %r5;",
    ),
    "read and, after a barrier, written by another lane": (
        None, NEIGHBOUR.format("bar.warp.sync -1;") + "bar.warp.sync -1; st.shared.b32 [%r9], %r5;"
    ),
    "written by one lane after the other": (
        "race between lanes",
        "st.shared.b32 [%r9], 1; xor.b32 %r6, %r7, 4; add.s32 %r6, %r8, %r6; st.shared.b32 [%r6], 99; mov.b32 %r5, 0;",
    ),
    "half of a warp synchronised": (
        "race between lanes",
        NEIGHBOUR.format("and.b32 %r4, %r0, 31; setp.lt.u32 %p1, %r4, 16; @%p1 bar.warp.sync 65535;"),
    ),
    "a barrier that nobody wants": (
        None, "mov.b32 %r5, 0; setp.gt.u32 %p1, %r0, 999; @%p1 bar.sync 0;"
    ),
    "shuffle after some lanes have left": (
        None, "mov.b32 %r5, 0; and.b32 %r6, %r0, 1; setp.eq.b32 %p1, %r6, 0; @%p1 ret;"
        "shfl.sync.bfly.b32 %r5, %r0, 2, 31, -1;"
    ),
    "neighbours in a warp": (None, NEIGHBOUR.format("bar.warp.sync -1;")),
    "neighbours in a warp, not synchronised": ("race between lanes", NEIGHBOUR.format("")),
    "shared memory not written": ("undefined value", "ld.shared.b32 %r5, [%r9];"),
    "not written and not used": (None, "ld.shared.b32 %r6, [%r9]; mov.b32 %r5, 1;"),
    "hidden by a select": (
        None, "ld.shared.b32 %r6, [%r9]; setp.lt.u32 %p1, %r0, 99; selp.b32 %r5, 3, %r6, %p1;"
    ),
    "decides a branch": (
        "undefined value", "ld.shared.b32 %r6, [%r9]; setp.eq.b32 %p1, %r6, 0; mov.b32 %r5, 1; @%p1 bra L;"
        "mov.b32 %r5, 2;\nL:\n"
    ),
    "is an address": ("undefined value", "ld.shared.b32 %r6, [%r9]; ld.shared.b32 %r5, [%r6];"),
    "register not written": ("undefined value", "add.s32 %r5, %r77, 1;"),
    "beyond the array": ("out of bounds, race, race between lanes", "ld.global.b32 %r5, [%rd9+4]; mov.b32 %r5, 0;"),
    "before the array": ("out of bounds, race, race between lanes", "ld.global.b32 %r5, [%rd9+-4]; mov.b32 %r5, 0;"),
    "beyond shared memory": ("out of bounds", "st.shared.b32 [%r9+512], %r0; mov.b32 %r5, 0;"),
    "eight bytes at four": (
        "misaligned", "setp.eq.b32 %p1, %r0, 7; @%p1 ld.global.b64 %rd20, [%rd9]; bar.sync 0; mov.b32 %r5, 0;"
    ),
    "in a loop without end": ("endless", "mov.b32 %r5, 0;\nL:\nadd.s32 %r5, %r5, 1; bra L;\n"),
    "barrier of some lanes": (
        "divergent", "mov.b32 %r5, 0; setp.lt.u32 %p1, %r0, 7; @%p1 bra L; bar.sync 0;\nL:\n"
    ),
    "barrier of some warps": (
        "divergent", "mov.b32 %r5, 0; setp.lt.u32 %p1, %r0, 32; @%p1 bra L; bar.sync 0;\nL:\n"
    ),
    "shuffle of some lanes": (
        "divergent", "mov.b32 %r5, 0; and.b32 %r6, %r0, 1; setp.eq.b32 %p1, %r6, 0; @%p1 bra L;"
        "shfl.sync.bfly.b32 %r5, %r0, 2, 31, -1;\nL:\n"
    ),
    "copy": (None, COPY.format(DONE)),
    "copy not waited for": ("in flight, undefined value", COPY.format("cp.async.commit_group; bar.sync 0;")),
    "copy not committed": ("in flight, undefined value", COPY.format("cp.async.wait_group 0; bar.sync 0;")),
    "waited for all but one": (
        "in flight, undefined value", COPY.format("cp.async.commit_group; cp.async.wait_group 1; bar.sync 0;")
    ),
    "copy without a barrier": (
        "race, race between lanes", COPY.format("cp.async.commit_group; cp.async.wait_group 0;")
    ),
    "committed by one lane": (
        "divergent",
        COPY.format("setp.eq.b32 %p2, %r0, 0; @%p2 cp.async.commit_group; cp.async.wait_group 0; bar.sync 0;"),
    ),
    "waited for by one lane": (
        "divergent",
        COPY.format("cp.async.commit_group; setp.eq.b32 %p2, %r0, 0; @%p2 cp.async.wait_group 0; bar.sync 0;"),
    ),
    "its source overwritten": (
        "in flight",
        COPY.format("cp.async.commit_group; @%p1 st.global.b32 [%rd12], 5; cp.async.wait_group 0; bar.sync 0;"),
    ),
    "copied onto what is read": (
        "in flight", "mov.b32 %r5, 0;" + COPY.format("st.shared.b32 [%r9], %r0; " + DONE)
    ),
}  # fmt: skip


@pytest.mark.core
@pytest.mark.parametrize("name", FAULTY)
def test_each_fault_is_found(name: str) -> None:
    kind, body = FAULTY[name]
    _, result = run(body, *([DATA.copy()] if "%rd1," in body else []), limit=100_000)
    wanted = set(kind.split(", ") if kind else ())
    # A lane that alone waits leaves others without: that is found too.
    assert result.kinds == wanted or (wanted == {"divergent"} < result.kinds), [str(each) for each in result.findings]


def test_these_tests_are_of_ptx(tmp_path: Path) -> None:
    for name, (_, body) in FAULTY.items():
        ptx = assembly.kernel(PLACES + body + "st.global.b32 [%rd9], %r5;", 2, 64)
        assert not assembly.assembles(ptx, tmp_path), name
