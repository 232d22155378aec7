"""Loads, stores, copies, shuffles, branches and barriers; and that each kind of fault is found, and only there."""

from __future__ import annotations

import numpy as np
import pytest

from tests.ptx import assembly, machine
from tests.ptx.bodies import COPY, DATA, DONE, PLACES, SEVERAL, run, shared_exchange
from tests.ptx.loading import program_of
from tests.ptx.module import Unsupported


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


HALVES = {
    "parts": "mov.b32 {%rs1, %rs2}, %r7;",
    "a pair of them": "mov.b32 {%rs1, %rs2}, %r7; mov.b32 %r8, {%rs1, %rs2}; mov.b32 {%rs1, %rs2}, %r8;",
    "a copy, of which memory takes the lower": (
        "mov.b32 %r8, %r7; st.shared.b16 [%r9], %r8; ld.shared.b16 %rs1, [%r9]; mov.b32 {%rs3, %rs2}, %r8;"
    ),
    "a product": "mul.bf16x2 %r8, %r7, %r7; mov.b32 {%rs1, %rs2}, %r8;",
    "a narrower number": "cvt.u16.u32 %rs1, %r7; mov.b32 {%rs3, %rs2}, %r7;",
    "a wider register of one": "cvt.u32.u16 %r8, %r7; cvt.u16.u32 %rs1, %r8; mov.b32 {%rs3, %rs2}, %r7;",
    "a choice": "setp.lt.u32 %p1, %r0, 99; selp.b32 %r8, %r7, %r0, %p1; mov.b32 {%rs1, %rs2}, %r8;",
    "a comparison": "setp.lt.bf16x2 %p1|%p2, %r7, %r7; selp.b16 %rs1, 1, 2, %p1; selp.b16 %rs2, 1, 2, %p2;",
}
"""%rs1 of the lower half of %r7, and %rs2 of the upper half."""


@pytest.mark.parametrize("name", HALVES)
def test_each_half_of_32_bits_is_defined_by_itself(name: str) -> None:
    body = "mov.b32 %r6, 0x3f800000; cvt.rn.bf16x2.f32 %r7, %r77, %r6;" + HALVES[name]
    assert run(body + "cvt.u32.u16 %r5, %rs1;")[1].findings == []
    assert run(body + "cvt.u32.u16 %r5, %rs2;")[1].kinds == {"undefined value"}


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
