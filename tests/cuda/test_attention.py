"""Softmax attention in CUDA C++: what nvcc makes of it, executed on the CPU, and which calls it takes."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from mvkernels import testing
from mvkernels.cuda.attention import launcher, plan
from mvkernels.cuda.attention.forward_plan import forward_launches
from mvkernels.dispatch.registry import OPS
from mvkernels.triton import configs
from mvkernels.triton.attention.problem import AttentionProblem
from tests.cuda import attention_cases as cases
from tests.cuda.attention_cases import Case
from tests.ptx import launches, nvcc
from tests.ptx.cases import of_op

pytestmark = pytest.mark.skipif(bool(nvcc.why_not()), reason=nvcc.why_not())


@pytest.mark.core
@pytest.mark.parametrize("kind", cases.DTYPES)
@pytest.mark.parametrize("case", cases.FEW, ids=str)
def test_it_is_right_and_without_fault(case: Case, kind: str) -> None:
    """Output and gradients against float64; no race, no access out of bounds, nothing undefined."""
    if kind in ("f32", "tf32") and max(case.d, case.dv) > plan.SINGLE:
        assert "float32 heads" in str(cases.reason(case, kind))
        return
    assert cases.reason(case, kind) is None
    assert not cases.faults(case, kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", cases.DTYPES)
@pytest.mark.parametrize("op", ["patch_attention", "window_attention"])
def test_the_inputs_of_verify(op: str, kind: str) -> None:
    """Those that these kernels take; the batches of suites are of one image."""
    taken = 0
    for shape, strides, make in of_op(OPS[op]):
        arguments = testing.normalised(OPS[op], make(cases.DTYPES[kind], "cpu"))
        query, value, free = arguments["query"], arguments["value"], arguments["bias"] is None
        group, shift = (arguments.get(name) for name in ("patch_size", "shift"))
        if value.shape[3:] != query.shape[3:] or plan.why_not(
            tuple(query.shape), value.shape[2], query.dtype, group or arguments["window_size"], shift, free, "sm_90"
        ):
            continue
        comparisons, log, _ = cases.run_op(op, arguments, kind, strides.removeprefix("qkv "))
        assert not cases.wrong(comparisons, log), f"{shape} {strides}"
        taken += 1
    assert taken > 10


@pytest.mark.parametrize("kind", cases.DTYPES)
@pytest.mark.parametrize("name", cases.ODD)
def test_odd_inputs(name: str, kind: str) -> None:
    """NaN and infinities reach the rows that they reach in the reference, and no other."""
    assert not cases.faults(cases.ODD[name], kind)


@pytest.mark.parametrize("kind", ["bf16", "f32"])
def test_the_worst_that_approximations_may_give_is_allowed(kind: str) -> None:
    for case in cases.FEW[0], cases.FEW[6]:
        assert not cases.faults(case, kind, skewed=True)


@pytest.mark.parametrize("processors", [1, 132])
def test_the_gradient_of_a_bias_is_a_sum_of_parts(processors: int) -> None:
    """With few processors a block has several units in turn, the last of them perhaps none."""
    case = Case(1, 16, (12, 20), (4, 4), (0, 0), bias=True, batch=3)
    assert not cases.faults(case, "bf16", processors=processors)
    large = Case(1, 16, (16, 16), (8, 16), (0, 0), bias=True, batch=3)
    assert not cases.faults(large, "f32", processors=processors)


SMALL = (
    Case(2, 32, (17, 20), (7, 7), (3, 5), bias=True, batch=3),
    Case(1, 32, (19, 13), (8, 8), (0, 2), bias=True, batch=2, strides="channels_last"),
    Case(2, 32, (14, 15), (7, 7), (0, 0), batch=2),
    Case(3, 32, (14, 8), (2, 1), bias=True, batch=2),
    Case(1, 56, (16, 32), (2, 4), dv=64, batch=3, strides="channels_last"),
    Case(2, 24, (16, 16), (2, 2), strides="channels_last"),
    Case(1, 40, (8, 24), (8, 8), (0, 0), strides="channels_last"),
    Case(2, 32, (7, 8), (1, 1), batch=9),
    Case(1, 32, (9, 9), (8, 7), (4, 4), bias=True, strides="channels_last"),
)


LARGE = (
    Case(1, 32, (25, 14), (12, 12), (6, 6), bias=True, batch=2),
    Case(2, 32, (10, 20), (10, 10), (0, 0), bias=True, strides="channels_last"),
    Case(1, 32, (14, 14), (1, 1), bias=True, batch=2),
    Case(1, 32, (16, 17), (16, 16), (0, 3), bias=True),
    Case(1, 32, (12, 24), (12, 12), (0, 0), bias=True, change=cases.peaked),
    Case(1, 32, (11, 15), (11, 15), (0, 0), bias=True, strides="channels_last"),
)
BETWEEN = (
    Case(1, 32, (18, 9), (9, 9), (0, 4), bias=True, batch=2, strides="channels_last"),
    Case(1, 32, (8, 24), (8, 12), (0, 0), bias=True, strides="channels_last"),
    Case(1, 32, (10, 32), (10, 16), (0, 0), bias=True, strides="channels_last"),
    Case(1, 32, (12, 13), (1, 1), bias=True, batch=2, strides="channels_last"),
)
"""Of fewer tokens than blocks of so many warps bring: 81, 96, 160, 156."""


@pytest.mark.parametrize("processors", [1, 132])
@pytest.mark.parametrize("case", (*SMALL, *LARGE), ids=str)
def test_units_one_after_the_other(case: Case, processors: int) -> None:
    """Of one block, which goes on from row to row and from image to image; the last may have fewer."""
    kind = "f16" if case.size in ((9, 9), (14, 14)) else "bf16"
    comparisons, log, _ = cases.run(case, kind, processors=processors)
    assert not cases.wrong(comparisons, log)
    assert ("large" if case in LARGE else "small") in log[0].kernel + log[1].kernel


@pytest.mark.parametrize("processors", [1, 132])
@pytest.mark.parametrize("case", BETWEEN, ids=str)
def test_units_of_fewer_rows_than_warps_bring(case: Case, processors: int) -> None:
    assert not cases.faults(case, "bf16", processors=processors)


def test_a_scale_near_the_largest_of_float32() -> None:
    """Its product with log2(e) has no room there."""

    def tiny(arguments: dict[str, Any]) -> None:
        arguments["query"], arguments["key"] = arguments["query"] * 2**-66, arguments["key"] * 2**-62

    assert not cases.faults(Case(2, 36, (9, 7), (2, 2), scale=3e38, change=tiny), "bf16")


@pytest.mark.parametrize("scale", [1e39, -1e39])
def test_a_scale_beyond_float32(scale: float) -> None:
    """It is infinite, as in PyTorch's own products of float32."""
    case = Case(1, 16, (8, 8), (2, 2), scale=scale)
    _, _, found = cases.run(case, "f32")
    assert torch.equal(found["out"].isnan(), OPS[case.op].reference(**case.arguments(torch.float32)).isnan())


LARGE_SCORES = {"f16": 12000.0, "bf16": 1e6, "f32": 1e6}


@pytest.mark.parametrize("kind", LARGE_SCORES)
@pytest.mark.parametrize("size", [(8, 8), (12, 12), (4, 8)], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_scores_of_any_size(kind: str, size: tuple[int, int], bias: bool) -> None:
    """Nothing of a score's rounding is left in an exponent; a bias may mask a row as a whole by a large number."""

    def large(arguments: dict[str, Any]) -> None:
        for name in ("query", "key"):
            arguments[name] = arguments[name] * LARGE_SCORES[kind]

    def masked(arguments: dict[str, Any]) -> None:
        arguments["bias"][0, 2] = torch.finfo(arguments["bias"].dtype).min

    for strides in ("channels_last", "contiguous"):
        case = Case(1, 32, size, size, (0, 0), strides, bias)
        _, _, found = cases.run(replace(case, change=large), kind)
        assert found["out"].isfinite().all()
        if bias:
            comparisons, log, found = cases.run(replace(case, change=masked), kind)
            assert found["out"].isfinite().all()
            assert not cases.wrong(comparisons, log)


def test_units_that_do_not_fit_a_smaller_shared_memory() -> None:
    """Of compute capability 8.9: the general kernels need a third of it."""
    map_, bias = torch.zeros(1, 1, 32, 14, 14, dtype=torch.bfloat16), torch.zeros(1, 196, 196, dtype=torch.bfloat16)
    named = [(name, map_.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)) for name in "qkvo"]
    problem = AttentionProblem.of_call("patch_attention", named, bias, (1, 1), None, False)
    for arch, word in (("sm_90", "large"), ("sm_89", "bf16_32")):
        device = replace(problem.device, arch=arch)
        launches_of, shapes = forward_launches(replace(problem, device=device), True)
        assert word in launches_of[-1].kernel
        assert launches_of[-1].shared_bytes <= configs.shared_memory_of(arch)
        assert shapes["ordered"][2] == launches_of[0].ints[2]


@pytest.mark.parametrize("change", ["offset", "channels", "scale"])
def test_what_small_kernels_leave_to_others(change: str) -> None:
    def offset(arguments: dict[str, Any]) -> None:
        query = arguments["query"]
        place = torch.empty_strided((query.numel() + 4,), (1,), dtype=query.dtype)[4:]
        arguments["query"] = torch.as_strided(place, query.shape, query.stride()).copy_(query)

    case = Case(1, 20 if change == "channels" else 16, (8, 8), (1, 1), strides="channels_last")
    case = replace(case, scale=-0.2 if change == "scale" else None, change=offset if change == "offset" else None)
    comparisons, log, _ = cases.run(case, "bf16")
    assert not cases.wrong(comparisons, log)
    assert "small" not in log[0].kernel


@pytest.mark.parametrize("kind", ["bf16", "f16", "f32"])
def test_the_order_of_a_bias(kind: str) -> None:
    """Lane by lane as the sums of a product; the second copy has keys as rows; -inf beyond the last key."""
    heads, tokens, tiles = 2, 21, 2
    bias = torch.randn(tokens, heads, tokens).to(cases.DTYPES[kind]).permute(1, 2, 0)
    map_ = torch.zeros(1, heads, 16, 3, 7, dtype=bias.dtype)
    named = [(name, map_) for name in "qkv"]
    problem = AttentionProblem.of_call("patch_attention", named, bias, (1, 1), None, False)
    with launches.executed() as log:
        ordered = bias.new_empty(plan.ordered_size(heads, 2, tiles))
        for each in plan.order_launches(problem, problem.geometry, 2, tiles):
            each({"bias": bias, "ordered": ordered}, {})
    assert not log[0].findings
    padded = torch.zeros(2, heads, 16 * tiles, 16 * tiles)
    padded[0, :, :, tokens:] = padded[1, :, tokens:] = -math.inf
    padded[0, :, :tokens, :tokens], padded[1, :, :tokens, :tokens] = bias.float(), bias.float().mT
    # (copies, heads, tiles, a row's upper bit, its lower ones, tiles, a column's upper bit, two bits, its lowest)
    bits = padded.reshape(2, heads, tiles, 2, 8, tiles, 2, 4, 2)
    # In float32 half of all lanes' numbers, then the other half.
    order = (0, 1, 2, 5, 6, 4, 7, 3, 8) if kind == "f32" else (0, 1, 2, 5, 4, 7, 6, 3, 8)
    assert torch.equal(ordered.float(), bits.permute(order).reshape(ordered.shape))


def test_few_bank_conflicts_where_a_row_is_an_odd_number_of_16_bytes() -> None:
    """None of what products read: of neighbouring rows the copies may meet."""
    for d, dv in (36, 40), (24, 24), (60, 64):
        _, log, _ = cases.run(Case(2, d, (16, 16), (2, 2), dv=dv, strides="channels_last"), "bf16")
        for launch in log:
            assert launch.counters.conflicts <= 0.05 * launch.counters.shared_phases


def test_a_single_weight_has_no_gradient() -> None:
    """Where a row has one key alone, dS is 0 in every bit, whatever the other operands."""
    case = Case(2, 16, (2, 2), (2, 2), change=lambda arguments: arguments["query"].mul_(1e4))
    for kind in cases.DTYPES:
        _, _, found = cases.run(case, kind)
        assert not found["dquery"].any()
        assert not found["dkey"].any()


def test_an_empty_batch() -> None:
    maps = (torch.zeros(0, 2, 16, 4, 4),) * 3
    bias = torch.zeros(2, 4, 4)
    out = launcher.forward("patch_attention", maps[0], maps[1], maps[2], (2, 2), None, bias, 1.0)
    grads = launcher.backward("patch_attention", out, maps[0], maps[1], maps[2], (2, 2), None, bias, 1.0, True)
    assert [tuple(each.shape) for each in grads] == [(0, 2, 16, 4, 4)] * 3 + [(2, 4, 4)]
    assert not grads[3].any()


def test_what_is_declined() -> None:
    case = Case(2, 36, (32, 32), (2, 2))
    declined: tuple[tuple[dict[str, Any], str, str, str | None], ...] = (
        ({}, "bf16", "sm_80", None),
        ({"d": 12}, "bf16", "sm_80", "head_dim 12"),
        ({"d": 68}, "bf16", "sm_80", "head_dim 68"),
        ({"d": 34}, "bf16", "sm_80", "head_dim 34"),
        ({"dv": 48}, "bf16", "sm_80", "value_dim 48"),
        ({"size": (34, 34)}, "bf16", "sm_80", "groups of 289 pixels"),
        ({"group": (17, 17), "shift": (0, 0)}, "bf16", "sm_80", "groups of 289 pixels"),
        ({"size": (40000, 8), "group": (4000, 4)}, "bf16", "sm_80", "wider than 32767"),
        ({"batch": 1 << 21}, "bf16", "sm_80", "2**31"),
        ({"d": 52}, "f32", "sm_90", "float32 heads of 52 channels"),
        ({"d": 48}, "f32", "sm_80", "shared memory"),
    )
    for changes, kind, arch, words in declined:
        reason = cases.reason(replace(case, **changes), kind, arch)
        assert reason is None if words is None else words in str(reason)
    query, key, value = (torch.zeros(1, 2, 36, 4, 4),) * 3
    assert "tensors are on cpu" in str(launcher.why_not(query, key, value, (2, 2), None, None))
    assert plan.spans_too_far((1, 1, 16, 4, 4), (0, 0, 1 << 28, 1, 1))
    assert not plan.spans_too_far((1, 1, 16, 4, 4), (1 << 40, 0, 16, 4, 1))
