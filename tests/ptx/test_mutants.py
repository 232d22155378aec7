"""A hundred faults, planted one at a time in compiled kernels: nearly all are found or make the result wrong."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator

import pytest
import torch

from mvkernels import testing
from mvkernels.dispatch.registry import OPS
from tests.ptx import cases, launches
from tests.ptx.mutants import FAULTS, Mutant, Recording, mutants

PLANTED = 100
CAUGHT = 95
IDLE = 20
"""Of changed values, masks and addresses some reach only lanes that are masked anyway: no access leaves its tensor and
every bit of the results is as it was; some instructions never run at these shapes. That is no fault. No more than these
may be passed over."""
SHAPES = (
    ("patch_attention", "2x36 21x19", "sm_90"),
    ("patch_attention", "2x36 21x19", "sm_80"),
    ("patch_attention", "4x36 9x7", "sm_90"),
    ("former_to_mobile", "2x6 9x7", "sm_90"),
    ("multiscale_linear_attention", "4x16 9x7", "sm_90"),
    ("patch_transformer_layer", "4x16 9x7", "sm_80"),
)
"""Maps that no tile divides, so that masks matter."""


def recordings() -> Iterator[Recording]:
    """Each kernel of these calls once."""
    for name, wanted, arch in SHAPES:
        op = OPS[name]
        make = next(make for shape, _, make in cases.of_op(op) if wanted in shape)
        found: dict[str, Recording] = {}

        def watch(call: launches.Call, memory: launches.Memory, found: dict[str, Recording] = found) -> None:
            if call.kernel not in found:
                found[call.kernel] = Recording.of(call, memory)

        with launches.executed(arch, watch=watch):
            testing.check(op, make(torch.bfloat16, "cpu"), "triton")
        yield from found.values()


def planted() -> Iterator[tuple[Recording, Mutant]]:
    """Kinds of fault in turn, each in places of its own, by a fixed draw."""
    chance = random.Random(0)
    every = [(recording, mutant) for recording in recordings() for mutant in mutants(recording.call.ptx)]
    by_kind = {kind: [each for each in every if each[1].kind == kind] for kind in FAULTS}
    for each in by_kind.values():
        chance.shuffle(each)
    while any(by_kind.values()):
        for each in by_kind.values():
            if each:
                yield each.pop()


@pytest.mark.slow
def test_planted_faults_are_caught(capsys: pytest.CaptureFixture[str]) -> None:
    caught: dict[str, Counter[str]] = {kind: Counter() for kind in FAULTS}
    survived, count, idle = [], 0, 0
    for recording, mutant in planted():
        done, after, effects = recording.run(mutant.ptx)
        if not mutant.planted(recording.effects, effects):
            idle += 1
            continue
        if not done.findings and not mutant.waits and recording.same(after):
            idle += 1
            continue
        how = "reported" if done.findings else "wrong result" if recording.differs(after) else "not caught"
        caught[mutant.kind][how] += 1
        if how == "not caught":
            survived.append(f"{recording.call.kernel}, line {mutant.line + 1}: {mutant.kind}: {mutant.text}")
        count += 1
        if count == PLANTED:
            break
    assert count == PLANTED and idle <= IDLE
    with capsys.disabled():
        print()
        for kind, of in caught.items():
            print(f"{kind:32}", *(f"{of[how]:3} {how}" for how in ("reported", "wrong result", "not caught")))
        print(*survived, f"passed over, without effect: {idle}", sep="\n")
    assert PLANTED - len(survived) >= CAUGHT, survived
    assert all(of for of in caught.values()), "a kind of fault that was planted nowhere"
