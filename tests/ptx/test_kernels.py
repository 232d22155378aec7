"""The library's Triton kernels, compiled for sm_90 and sm_80 and executed: right results, and no fault of any kind."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from mvkernels.triton import configs
from tests.ptx import cases

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
AUDIT_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "tf32": "tf32"}
SELECTION = list(cases.selection())


@pytest.mark.slow
@pytest.mark.parametrize("op", cases.FEW)
def test_kernels_are_right_and_without_fault(op: str) -> None:
    """Each Triton kernel of an op in each dtype in which `make audit` compiles or `make ptx` executes it. Those in CUDA
    C++ have tests of their own, in tests/cuda."""
    executed = set()
    for case in SELECTION:
        if case.op == op:
            outcome = cases.run(case)
            assert not outcome.faults, f"{case}: " + "\n".join(outcome.faults)
            executed |= {(launch.kernel, case.dtype) for launch in outcome.launches if case.arch == "sm_90"}
    with (RESULTS / "audit" / f"{op}.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["backend"] == "triton"]
        there = [(row["kernel"], AUDIT_DTYPES.get(row["dtype"])) for row in rows]
    with (RESULTS / "ptx" / f"{op}.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["backend"] == "triton"]
        there += [(row["kernel"], row["dtype"]) for row in rows if row["arch"] == "sm_90"]
    assert {(kernel, dtype) for kernel, dtype in there if dtype} <= executed


@pytest.mark.core
def test_one_kernel() -> None:
    """What a case reports: a quick one for `make check`."""
    case = next(each for each in SELECTION if each.op == "relu_linear_attention")
    outcome = cases.run(case)
    assert not outcome.faults
    rows = list(cases.rows(outcome))
    assert {row["kernel"] for row in rows} >= {"forward_slices", "backward_slices"}
    for row in rows:
        assert row["ok"] and row["races"] == 0 and row["findings"] == 0
        assert row["instructions"] > 1000
        assert 0 < row["global_sectors"] <= 32 * row["global_requests"]


@pytest.mark.slow
def test_the_worst_that_approximations_may_give_is_allowed() -> None:
    """exp2 and division as wrong as their documentation lets them be."""
    for case in SELECTION:
        if case.op in ("patch_attention", "former_to_mobile") and "9x7" in case.shape and case.dtype != "tf32":
            assert not cases.run(case, skewed=True).faults


@pytest.mark.slow
def test_a_pipeline_that_overwrites_what_a_product_reads_is_found() -> None:
    """triton-lang/triton#6691: of a tile that registers and products of warp groups both read there is one buffer.

    The configurations leave that pipeline out on sm_90; asked for, it gives the fault, and wrong gradients where the
    copy comes early.
    """
    case = next(each for each in cases.cases() if each.op == "patch_transformer_layer" and each.dtype == "bfloat16"
                and (each.arch, each.processors) == ("sm_90", 2))  # fmt: skip
    with configs.recording() as asked:
        assert not cases.run(case).faults
    (key,) = [text for _, kernel, text in asked if kernel == "qkv_backward"]
    with configs.trying(case.op, "qkv_backward", key, {"num_stages": 2}):
        outcome = cases.run(case)
    assert "in flight" in {found.kind for found in outcome.findings}
    assert {launch.kernel for launch in outcome.launches if launch.findings} == {"qkv_backward"}
