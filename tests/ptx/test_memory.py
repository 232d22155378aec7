"""Loads, stores, copies, shuffles, branches and barriers; and that each kind of fault is found, and only there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.ptx import assembly, machine
from tests.ptx.assembly import Array, Result
from tests.ptx.launches import program_of
from tests.ptx.module import Unsupported

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


def test_values_go_through_shared_memory() -> None:
    out, _ = run(shared_exchange("bar.sync 0;"))
    assert (out == np.arange(64) ^ 32).all()
    for width, way in (
        (16, "cp.async.cg.shared.global"),
        (16, "cp.async.ca.shared.global"),
        (8, "cp.async.ca"),
        (4, "cp.async.ca"),
    ):
        body = COPY.replace("16;\n    {}", f"{width};\n    {{}}").replace("cp.async.cg", way[:11])
        out, _ = run(body.format(DONE), DATA)
        assert (out == np.arange(64) % 16 * 4).all()


def test_a_copy_happens_when_it_is_waited_for() -> None:
    """A store to the source in between is what the copy reads, and found: it is as late as it may be."""
    late = COPY.format("@%p1 st.global.b32 [%rd12], 1000; " + DONE)
    out, result = run(late, DATA.copy())
    assert (out == 1000).all() and result.kinds == {"in flight"}


def test_a_copy_of_a_part_may_end_with_the_tensor() -> None:
    """Twelve bytes of sixteen, of which the last four lie beyond the array; aligned as the sixteen are."""
    body = COPY.replace("[%rd12 + 0], 16;", "[%rd12 + 0], 16, 12;").replace("[%r12];", "[%r12+8];").format(DONE)
    given = np.arange(63, dtype=np.uint32)
    out, result = run(body, given)
    assert (out == np.arange(64) % 16 * 4 + 2).all() and not result.findings


def test_a_copy_reads_as_many_bytes_as_it_is_told_and_fills_with_zeros() -> None:
    body = COPY.replace("16;\n    {}", "16, %r14;\n    {}", 1).format(DONE)
    body = "shl.b32 %r14, %r0, 2; and.b32 %r14, %r14, 4;" + body
    out, result = run(body.replace("[%rd12 + 0], 16;", "[%rd12 + 0], 16, %r14;"), DATA + 1)
    assert (out == np.where(np.arange(64) % 2, np.arange(64) % 16 * 4 + 1, 0)).all()
    assert not result.findings


def test_blocks_may_not_touch_what_another_one_writes() -> None:
    place = "mul.lo.s32 %r20, %r1, 256; cvt.u64.u32 %rd20, %r20; add.s64 %rd9, %rd9, %rd20; mov.b32 %r5, 1;"
    assert not run(place, blocks=2)[1].findings
    assert run("mov.b32 %r5, %r1;", blocks=2)[1].kinds == {"race between blocks"}
    other = place + "setp.eq.b32 %p1, %r1, 1; @%p1 ld.global.b32 %r5, [%rd9-256];"
    assert run(other, blocks=2)[1].kinds == {"race between blocks"}
    # One that reads, then another one that writes.
    early = place + "setp.eq.b32 %p1, %r1, 0; @%p1 ld.global.b32 %r5, [%rd9+256];"
    assert run(early, blocks=2)[1].kinds == {"race between blocks"}


def test_warps_may_store_one_value_to_global_memory_but_not_another_after_it() -> None:
    several, data = SEVERAL.replace("shared.b32 [%r8]", "global.b32 [%rd1]"), DATA.copy()
    _, result = run(several.format("mov.b32 %r6, 7;") + "mov.b32 %r5, 0;", data)
    assert result.kinds == set() and data[0] == 7
    other = "mov.b32 %r6, 5; @%p2 st.global.b32 [%rd1], %r6; mov.b32 %r5, 0;"
    _, result = run(several.format("mov.b32 %r6, 7;") + other, data)
    assert result.kinds == {"race"}


def test_a_copy_that_nobody_waits_for_ends_with_its_block() -> None:
    # The second block may read what the first one's copy reads, and not write to it.
    copy = "mov.b32 %r5, 0; mov.u32 %r14, %ctaid.x; mul.wide.u32 %rd13, %r14, 256; add.s64 %rd9, %rd9, %rd13;"
    copy += "setp.eq.u32 %p2, %r14, 0; setp.eq.u32 %p3, %r0, 0; @%p2 bra FIRST; {} bra END; FIRST:"
    copy += COPY.format("cp.async.commit_group;").replace("ld.shared.b32 %r5, [%r12];", "") + "END:"
    for second, kinds in (("ld.global.b32 %r5, [%rd1];", set()),
                          ("@%p3 st.global.b32 [%rd1], %r5;", {"race between blocks"})):  # fmt: skip
        _, result = run(copy.format(second), DATA.copy(), blocks=2)
        assert result.kinds == kinds, [str(each) for each in result.findings]


def test_global_memory_of_one_block_needs_a_barrier_too() -> None:
    exchange = """st.global.b32 [%rd9], %r0; {} xor.b32 %r6, %r7, 128; cvt.u64.u32 %rd20, %r6;
        add.s64 %rd21, %rd0, %rd20; ld.global.b32 %r5, [%rd21]; bar.sync 0;"""
    assert run(exchange.format("bar.sync 0;"))[1].findings == []
    assert run(exchange.format(""))[1].kinds == {"race"}


def test_what_nobody_has_defined_may_be_read_but_not_stored() -> None:
    read = "add.s64 %rd20, %rd1, %rd8; ld.global.b32 %r6, [%rd20];"
    assert run(read + "mov.b32 %r5, 0;", DATA, undefined=[1])[1].findings == []
    assert run(read + "add.s32 %r5, %r6, 1;", DATA, undefined=[1])[1].kinds == {"undefined value"}
    assert run(read + "add.s32 %r5, %r6, 1;", DATA)[1].findings == []


def test_a_fault_says_where() -> None:
    _, result = run("ld.global.b32 %r5, [%rd9+4]; mov.b32 %r5, 0;")
    found = next(each for each in result.findings if each.kind == "out of bounds")
    assert (found.block, found.warp, found.count) == (0, 1, 1)
    assert "ld.global.b32 %r5, [%rd9+4]" in str(found) and f"PTX line {found.line + 1}" in str(found)


SHUFFLES = {
    "shfl.sync.up.b32": (0, lambda lane, b: np.where(lane - b >= 0, lane - b, lane)),
    "shfl.sync.down.b32": (31, lambda lane, b: np.where(lane + b <= 31, lane + b, lane)),
    "shfl.sync.bfly.b32": (31, lambda lane, b: lane ^ b),
    "shfl.sync.idx.b32": (31, np.full_like),
}


@pytest.mark.parametrize("how", SHUFFLES)
@pytest.mark.parametrize("by", [0, 1, 5, 16, 31])
def test_shuffles(how: str, by: int) -> None:
    clamp, source = SHUFFLES[how]
    out, result = run(f"add.s32 %r6, %r0, 100; {how} %r5, %r6, {by}, {clamp}, -1;")
    lane = np.arange(64) % 32
    assert (out == np.arange(64) - lane + source(lane, by) + 100).all()
    assert not result.findings


def test_a_shuffle_within_segments() -> None:
    """Eight lanes each; the predicate says whether the source was in the segment."""
    clamp = (24 << 8) | 7  # 32 - 8 in the upper byte
    out, _ = run(f"shfl.sync.down.b32 %r6|%p1, %r0, 3, {clamp}, -1; selp.b32 %r7, 100, 0, %p1; add.s32 %r5, %r6, %r7;")
    lane = np.arange(64)
    assert (out == np.where(lane % 8 + 3 < 8, lane + 103, lane)).all()


def test_votes() -> None:
    for name, wanted in (("vote.sync.any.pred", 1), ("vote.sync.all.pred", 0)):
        out, _ = run(f"setp.eq.b32 %p1, %r0, 40; {name} %p2, %p1, -1; selp.b32 %r5, 1, 0, %p2;")
        assert (out[:32] == 0).all() and (out[32:] == wanted).all()
    out, _ = run("setp.lt.u32 %p1, %r0, 40; vote.sync.ballot.b32 %r5, %p1, -1;")
    assert (out[:32] == 2**32 - 1).all() and (out[32:] == 255).all()


def test_lanes_go_different_ways_and_meet_again() -> None:
    """A loop of as many rounds as the lane's number, then a shuffle of all."""
    body = """mov.b32 %r5, 0; mov.b32 %r6, 0;
L1:
    setp.ge.u32 %p1, %r6, %r0; @%p1 bra L2; add.s32 %r5, %r5, %r6; add.s32 %r6, %r6, 1; bra L1;
L2:
    shfl.sync.bfly.b32 %r5, %r5, 1, 31, -1;
    setp.eq.b32 %p2, %r0, 3; @%p2 st.global.b32 [%rd9], %r5; @%p2 ret;
"""
    out, result = run(body)
    sums = np.array([sum(range(i)) for i in range(64)])
    assert (out == sums[np.arange(64) ^ 1]).all()
    assert not result.findings


@pytest.mark.parametrize("exit_", ["ret", "exit"])
@pytest.mark.parametrize("barrier", ["bar.sync 0", "barrier.sync 0"])
def test_names_of_the_same_thing(exit_: str, barrier: str) -> None:
    out, result = run(f"mov.b32 %r5, 1; {barrier}; st.global.b32 [%rd9], %r5; {exit_}; mov.b32 %r5, 2;")
    assert (out == 1).all() and not result.findings


@pytest.mark.parametrize("width", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("space", ["global", "shared"])
def test_every_width(width: int, space: str) -> None:
    """Bytes come through a load, a store and a load, in vectors and in registers wider than they are."""
    kinds = {1: ["b8"], 2: ["b16", "v2.b8"], 4: ["b32", "v2.b16", "f32"], 8: ["b64", "v2.b32", "v4.b16"],
             16: ["v2.b64", "v4.b32"]}[width]  # fmt: skip
    for kind in kinds:
        count, bits = int(kind[1]) if kind[0] == "v" else 1, int(kind.split(".")[-1][1:])
        prefix = {8: "%rs", 16: "%rs", 32: "%r", 64: "%rd"}[bits]
        registers = ", ".join(f"{prefix}{50 + i}" for i in range(count))
        registers = f"{{{registers}}}" if count > 1 else registers
        through = ""
        if space == "shared":
            through = f"mul.lo.s32 %r20, %r0, {width}; add.s32 %r20, %r8, %r20;"
            through += f"st.shared.{kind} [%r20], {registers}; ld.shared.{kind} {registers}, [%r20];"
        body = f"""{PLACES} mul.wide.u32 %rd20, %r0, {width}; add.s64 %rd21, %rd0, %rd20; add.s64 %rd22, %rd1, %rd20;
            ld.global.{kind} {registers}, [%rd22]; {through} st.global.{kind} [%rd21], {registers};"""
        given = np.random.default_rng(0).integers(0, 256, 32 * width, dtype=np.uint8)
        out = np.zeros_like(given)
        result = assembly.execute(assembly.kernel(body, 2), [out, given], shared_bytes=32 * width)
        assert (out == given).all()
        assert result.counters.accesses_of("global", True) == {1: 0, 2: 0, 4: 0, 8: 0, 16: 0} | {width: 32}
        assert result.counters.global_bytes == 64 * width and result.counters.global_sectors == 2 * max(width, 1)
        assert not result.findings


def test_a_conversion_takes_the_low_part_of_a_wider_register() -> None:
    """In the machine: cvt with .of32 or .of64 after it."""
    body = "mul.wide.u32 %rd20, %r0, -1; cvt.s64.s32 %rd21, %rd20; cvt.u32.u16 %r6, %r0; cvt.u32.u64 %r5, %rd21;"
    out, result = run(body + "sub.s32 %r5, %r6, %r5;")
    assert (out == 2 * np.arange(64)).all() and not result.findings


def test_registers_are_taken_apart_and_put_together() -> None:
    """By mov with a list of registers: mov.b32.pack, mov.b32.unpack, mov.b64.pack, mov.b64.unpack of the machine."""
    body = """add.s32 %r6, %r0, 3; mov.b64 %rd20, {%r0, %r6}; mov.b64 {%r7, _}, %rd20; mov.b64 {_, %r8}, %rd20;
        shl.b32 %r8, %r8, 16; or.b32 %r8, %r7, %r8; mov.b32 {%rs1, %rs2}, %r8; mov.b32 %r5, {%rs2, %rs1};"""
    out, result = run(body)
    assert (out == np.arange(64) * 65536 + np.arange(64) + 3).all() and not result.findings


def test_a_register_may_be_wider_than_what_is_stored_and_loaded() -> None:
    out, _ = run("mul.lo.s32 %r6, %r0, 65537; st.shared.b16 [%r9], %r6; ld.shared.b16 %r5, [%r9];")
    assert (out == np.arange(64)).all()


@pytest.mark.parametrize("stride,passes", [(4, 1), (8, 2), (128, 32), (132, 1), (0, 1)])
def test_conflicts_of_banks(stride: int, passes: int) -> None:
    body = f"{PLACES} mul.lo.s32 %r20, %r0, {stride}; add.s32 %r20, %r8, %r20; ld.shared.b32 %r5, [%r20];"
    result = assembly.execute(assembly.kernel(body, 1), [DATA], shared_bytes=32 * 132 + 4)
    assert (result.counters.shared_requests, result.counters.shared_wavefronts) == (1, passes)
    assert result.counters.conflicts == passes - 1


@pytest.mark.parametrize("stride,sectors", [(4, 4), (8, 8), (32, 32), (0, 1)])
def test_sectors_of_a_request(stride: int, sectors: int) -> None:
    given = np.zeros(32 * 32, np.uint8)
    body = f"mul.wide.u32 %rd20, %r0, {stride}; add.s64 %rd21, %rd0, %rd20; ld.global.b32 %r5, [%rd21];"
    result = assembly.execute(assembly.kernel(body, 1), [given])
    assert (result.counters.global_requests, result.counters.global_sectors) == (1, sectors)


def test_instructions_are_counted_by_class() -> None:
    body = (
        "add.s32 %r5, %r0, 1; cvt.rn.f32.u32 %r6, %r5; mul.f32 %r6, %r6, %r6; ex2.approx.ftz.f32 %r6, %r6; bar.sync 0;"
    )
    result = assembly.execute(assembly.kernel(body, 1, threads=96), [DATA])
    issued = dict(zip(machine.CLASSES, result.counters.issued))
    assert {name: issued[name] for name in ("integer", "convert", "float", "special", "shuffle")} == {
        "integer": 3, "convert": 3, "float": 3, "special": 3, "shuffle": 0
    }  # fmt: skip


@pytest.mark.parametrize("text", ["atom.global.add.u32 %r5, [%rd9], 1;", "red.global.add.u32 [%rd9], 1;"])
def test_atomics_are_refused(text: str) -> None:
    """No kernel here may have one: sums would not be the same in every run."""
    with pytest.raises(RuntimeError, match=r"no (atom|red)\.global\.add\.u32"):
        program_of(assembly.kernel(PLACES + text, 1))


@pytest.mark.parametrize("text", ["bar.sync 1;", "bar.sync 0, 64;", "mov.u32 %r5, %clock;", "add.s32 %r5, %r0, %rd1;",
                                  "ld.shared.b32 %r5, [%rd1];", "ld.global.b32 %r5, [%r8];"])  # fmt: skip
def test_what_it_does_not_know_is_refused(text: str) -> None:
    with pytest.raises(Unsupported):
        program_of(assembly.kernel(PLACES + text, 1))
