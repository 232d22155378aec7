"""The library's Triton kernels, compiled for sm_90 and sm_80 and executed: right results, and no fault of any kind."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from mvkernels.dispatch.launches import run
from mvkernels.triton.launch import Launch
from tests.ptx import cases, launches
from tests.ptx.pipelined import multiplied_and_summed

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


@pytest.mark.parametrize("stages", [1, 2])
def test_a_pipeline_that_overwrites_what_a_product_reads_is_found(stages: int) -> None:
    """triton-lang/triton#6691: of a tile that registers and products of warp groups both read there is one buffer.

    With two stages the next tile is copied to it while the product may still read: no kernel of the library may do so.
    """
    generator = torch.Generator().manual_seed(0)
    tensors = {"a": torch.randn(64, 256, generator=generator).bfloat16()}
    tensors |= {"w": torch.randn(256, 64, generator=generator).bfloat16()}
    tensors |= {"out": torch.zeros(64, 64), "sums": torch.zeros(256)}
    meta = {"K": 256, "N": 64, "BLOCK_M": 64, "BLOCK_K": 32, "TURNED": False}
    launch = Launch(multiplied_and_summed, "multiplied_and_summed", 1, tuple(tensors), (), (), meta,
                    {"num_warps": 4, "num_stages": stages})  # fmt: skip
    with launches.executed("sm_90") as log:
        run([launch], tensors, {})
    right = torch.allclose(tensors["out"], tensors["a"].float() @ tensors["w"].float(), atol=1e-3)
    found = {found.kind for each in log for found in each.findings}
    assert right == (stages == 1)
    assert "in flight" in found if stages == 2 else not found
