"""The model of time: each of its limits, on kernels whose counts are known by hand."""

from __future__ import annotations

import collections
import csv
import importlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("scipy")

from tests.ptx import assembly

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
PREDICTION = BENCHMARKS / "results" / "audit" / "prediction.csv"
VALIDATION = BENCHMARKS / "results" / "audit" / "validation.csv"
THREADS, GRID = 128, 264
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter replaces the compiler"
)

LOAD = """
	mul.wide.u32 %rd4, %r1, 512;
	mul.wide.u32 %rd5, %r0, 4;
	add.s64 %rd6, %rd4, %rd5;
	add.s64 %rd7, %rd0, %rd6;
	add.s64 %rd8, %rd1, %rd6;
	ld.global.b32 %r3, [%rd7];
"""
STORE = "\tst.global.b32 [%rd8], %r3;\n"
EXPONENTIAL = "\tex2.approx.ftz.f32 %r3, %r3;\n"
PRODUCT = "\tfma.rn.f32 %r3, %r3, %r3, 0f3F800000;\n"


@pytest.fixture(scope="module")
def model() -> Iterator[SimpleNamespace]:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        names = ("calls", "counts", "devices", "library", "limits", "sass", "units", "validation", "warps", "work")
        yield SimpleNamespace(
            **{name: importlib.import_module(f"_model.{name}") for name in names},
            tool=importlib.import_module("_machine_code").tool,
            predict=importlib.import_module("predict"),
        )
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture
def work_of(model, tmp_path) -> Any:
    """Of a body of PTX: what its launch asks for, with two arrays that have an element for each thread."""

    def work_of(body: str, shared_bytes: int = 0) -> Any:
        source, binary = tmp_path / "kernel.ptx", tmp_path / "kernel.cubin"
        source.write_text(assembly.kernel(body, 2, THREADS))
        line = [model.tool("ptxas"), "-arch", "sm_90a", "-lineinfo", "-o", str(binary), str(source)]
        subprocess.run(line, check=True)
        tensors = [torch.zeros(GRID * THREADS) for _ in range(2)]
        code = binary.read_bytes()
        launch = model.calls.Launch("kernel", source.read_text(), code, GRID, THREADS, shared_bytes, tensors)
        return model.work.of(launch, model.devices.DEVICES["H100"], {})

    return work_of


def looped(turns: int, body: str) -> str:
    return f"""{LOAD}
	mov.u32 %r9, 0;
$again:
{body}
	add.s32 %r9, %r9, 1;
	setp.lt.s32 %p0, %r9, {turns};
	@%p0 bra $again;
{STORE}"""


@pytest.mark.core
def test_exponentials_are_the_special_units_limit(model, work_of) -> None:
    some, more = (work_of(LOAD + count * EXPONENTIAL + STORE) for count in (40, 140))
    assert more.instructions["special"] - some.instructions["special"] == pytest.approx(100)
    # Sixteen lanes a cycle: a warp of 32 has one of the four units for eight cycles.
    assert more.pipes["special"] - some.pipes["special"] == pytest.approx(800)
    h100 = model.devices.DEVICES["H100"]
    times = model.limits.times(more, h100)
    fit = model.devices.FITTED
    microseconds = fit.busy * 140 * 8 * (THREADS // 128) * (GRID // 132) / h100.busy_clock * 1e6
    assert times.each["special"] == pytest.approx(microseconds)
    assert max((n for n in times.each if n not in ("launch", "latency")), key=times.each.get) == "special"


def test_a_chain_of_products_waits_four_cycles_for_each(work_of) -> None:
    some, more = (work_of(LOAD + count * PRODUCT + STORE) for count in (50, 150))
    assert more.pipes["fma"] - some.pipes["fma"] == pytest.approx(100)
    assert more.pipes["issue"] - some.pipes["issue"] == pytest.approx(100)
    assert more.alone[0] - some.alone[0] == pytest.approx(400)  # the compiler's own stalls
    assert more.warp_instructions - some.warp_instructions == pytest.approx(100 * 4 * GRID)


@pytest.mark.parametrize("turns", (5, 7, 64, 203))
def test_turns_of_loops_are_counted_however_ptxas_unrolls_them(work_of, turns) -> None:
    found = work_of(looped(turns, EXPONENTIAL))
    assert found.instructions["special"] == pytest.approx(turns, rel=0.01)
    # The loop's own instructions are shared by the copies, and never fewer than none.
    assert turns < sum(found.instructions.values()) < 4 * turns + 40


def test_bytes_are_those_of_the_sectors(work_of) -> None:
    found = work_of(LOAD + STORE)
    once = 2 * 4 * GRID * THREADS
    assert found.once_bytes == once and found.moved_bytes == once
    # The tensors may begin within a sector: one more for each request.
    assert once <= found.cached_bytes <= once * 5 / 4
    scattered = work_of(LOAD + LOAD.replace("%r0, 4", "%r0, 0") + STORE)
    assert scattered.once_bytes <= 2 * once


def test_loads_that_follow_each_other_wait_one_after_the_other(work_of) -> None:
    one = work_of(LOAD + STORE)
    both = work_of(LOAD + "\tld.global.b32 %r5, [%rd8];\n\txor.b32 %r3, %r3, %r5;\n" + STORE)
    chain = """
	and.b32 %r4, %r3, 4;
	cvt.u64.u32 %rd9, %r4;
	add.s64 %rd10, %rd7, %rd9;
	ld.global.b32 %r3, [%rd10];
"""
    two = work_of(LOAD + chain + STORE)
    waits = [each.alone[1] - each.alone[0] for each in (one, both, two)]  # loads of FAR cycles and of none
    assert 900 < waits[0] <= 1000 and 900 < waits[1] <= 1000 and 1900 < waits[2] <= 2000


@pytest.mark.parametrize(("stride", "wavefronts"), ((4, 1), (8, 2), (64, 16), (128, 32)))
def test_conflicts_are_passes_over_shared_memory(work_of, stride, wavefronts) -> None:
    body = f"""{LOAD}
	mul.lo.u32 %r10, %r0, {stride};
	and.b32 %r10, %r10, 4095;
	mov.u32 %r11, global_smem;
	add.s32 %r12, %r10, %r11;
	st.shared.b32 [%r12], %r3;
{STORE}"""
    assert work_of(body, 4096).wavefronts == 4 * wavefronts  # four warps


def test_matrix_instructions_take_the_matrix_unit(model) -> None:
    def cycles(name: str) -> float:
        return model.warps.matrix_cycles(model.sass.Instruction(name, "", "", "", 1, 7, 7, ()))

    # 64 x 64 x 16 products and sums of four warps: 131072 operations at 4096 a cycle.
    assert cycles("HGMMA.64x64x16.F32.BF16") == 32
    assert cycles("HGMMA.64x16x16.F32.BF16") == 16  # a small one is no quicker
    assert cycles("HMMA.16816.F32.BF16") == 2 * cycles("HMMA.1688.F32.BF16") == cycles("HMMA.1688.F32.TF32")


SASS = """
	.section	.text.kernel,"ax",@progbits
.text.kernel:
	//## File "/a/b.py", line 12
        /*0000*/                   LDG.E.128 R4, desc[UR4][R2.64] ;   /* 0x0000000402047981 */
                                                                      /* 0x000ea4000c1e1d00 */
.L_x_0:
	//## File "/a/b.py", line 13
        /*0010*/              @!P0 FFMA R0, R0, R1, R2 ;              /* 0x0000000100007223 */
                                                                      /* 0x004fc80000000002 */
        /*0020*/               @P1 BRA `(.L_x_0) ;                    /* 0xfffffffc00f01947 */
                                                                      /* 0x000fea000383ffff */
        /*0030*/                   EXIT ;                             /* 0x000000000000794d */
                                                                      /* 0x000fea0003800000 */
.L_x_1:
        /*0040*/                   BRA `(.L_x_1);                     /* 0xfffffffc00fc7947 */
                                                                      /* 0x000fc0000383ffff */
	.section	.text.other,"ax",@progbits
        /*0000*/                   EXIT ;                             /* 0x000000000000794d */
                                                                      /* 0x000fea0003800000 */
"""


def test_machine_code_is_taken_apart(model) -> None:
    code = model.sass.parse(SASS, "kernel")
    load, product, branch, *_ = code.instructions
    assert (load.name, load.base, load.source, load.guard) == ("LDG.E.128", "LDG", "b.py:12", "")
    assert (load.written, load.read, load.stall, load.waits) == (2, 7, 2, ())
    assert (product.guard, product.source, product.waits, product.stall) == ("@!P0", "b.py:13", (2,), 4)
    assert branch.base == "BRA" and len(code.instructions) == 5
    assert [(b.begin, b.end, b.next) for b in code.blocks] == [(0, 1, [1]), (1, 3, [1, 2]), (3, 4, []), (4, 5, [3])]
    assert code.loops() == [(1, 1)]


def test_executions_follow_what_is_translated_one_to_one(model) -> None:
    code = model.sass.parse(SASS.replace("FFMA R0, R0, R1, R2", "SHFL.BFLY PT, R0, R1, R2"), "kernel")
    names = ["ld.global.b32", "shfl.sync.bfly.b32", "bra", "ret"]
    sources = ["b.py:12", "b.py:13", "b.py:13", "b.py:13"]
    found = model.counts.executions(code, names, sources, [1, 9, 9, 1])
    assert found.blocks == pytest.approx([1, 9, 1, 0], abs=0.05)
    assert found.total() == pytest.approx(1 + 2 * 9 + 1, abs=0.2)


def test_the_prediction_is_more_than_each_limit_and_the_tail_counts(model) -> None:
    h100 = model.devices.DEVICES["H100"]
    one = model.work.Work("kernel", 132 * 4, 4, 64, 0, 0, 4, "registers", {"alu": 1000.0}, {
        "issue": 1000.0, "fma": 0.0, "heavy": 0.0, "alu": 2000.0, "uniform": 0.0, "double": 0.0, "special": 0.0,
        "matrix": 0.0}, (3000.0, 4000.0), cached_bytes=1e8, moved_bytes=1e8)  # fmt: skip
    times = model.limits.times(one, h100)
    assert times.predicted > max(times.each.values()) and times.decides == "memory"
    assert times.each["memory"] == pytest.approx(1e8 / (3.35e12 * model.devices.FITTED.memory) * 1e6)
    assert model.limits.times(replace(one, moved_bytes=0, cached_bytes=0), h100).decides == "arithmetic"
    # One block more is one more turn for one processor.
    later = model.limits.times(replace(one, grid=132 * 4 + 1), h100)
    assert later.each["latency"] == pytest.approx(2 * times.each["latency"])
    assert later.each["arithmetic"] == pytest.approx(times.each["arithmetic"] * 5 / 4)


@pytest.mark.parametrize(
    ("predicted", "floor", "verdict"), ((12.0, 5.9, "SLOW"), (12.0, 6.1, "ok"), (4.9, 0.1, "ok"), (5.1, 0.1, "SLOW"))
)
def test_what_is_slow(model, predicted, floor, verdict) -> None:
    row = model.predict.judged(predicted, floor)
    assert row["verdict"] == verdict and float(row["ratio"]) == pytest.approx(predicted / floor, rel=1e-2)


def test_a_kernel_of_nvcc_is_counted_too(model, tmp_path) -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc")
    source = tmp_path / "scale.cu"
    source.write_text(
        'extern "C" __global__ void __launch_bounds__(128) scale(const float* a, float* b, int n, float s) {\n'
        "  extern __shared__ __align__(16) float global_smem[];\n"
        "  global_smem[threadIdx.x] = a[blockIdx.x * 128 + threadIdx.x] * s;\n"
        "  __syncthreads();\n"
        "  float sum = 0;\n"
        "  for (int i = 0; i < n; i++) {\n"
        "    float power;\n"
        '    asm volatile("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(global_smem[(threadIdx.x + i) % 128]));\n'
        "    sum += power;\n  }\n"
        "  b[blockIdx.x * 128 + threadIdx.x] = sum;\n}\n"
        # Another one before it in the machine code, of other registers and instructions.
        'extern "C" __global__ void __launch_bounds__(128) another(float* b) { b[threadIdx.x] = 1; }\n'
    )
    made = {}
    for kind in ("ptx", "cubin"):
        target = tmp_path / f"scale.{kind}"
        line = ["nvcc", "-arch=sm_90a", "-lineinfo", f"-{kind}", "-o", str(target), str(source)]
        subprocess.run(line, check=True)
        made[kind] = target.read_bytes()
    a, b = torch.rand(GRID * 128), torch.zeros(GRID * 128)
    launch = model.calls.Launch(
        "scale", made["ptx"].decode(), made["cubin"], GRID, 128, 512, (a, b, 21, 1.0), alone=False
    )
    found = model.work.of(launch, model.devices.DEVICES["H100"], {})
    assert torch.allclose(b[-128:], torch.stack([torch.exp2(a[-128:].roll(-i)) for i in range(21)]).sum(0), rtol=1e-5)
    other = model.work.of(replace(launch, kernel="another", arguments=(b,)), model.devices.DEVICES["H100"], {})
    assert other.registers < found.registers and sum(other.instructions.values()) < 20
    assert found.instructions["special"] == pytest.approx(21, rel=0.02)
    assert found.instructions["shared"] == pytest.approx(22, rel=0.02)


def test_kernels_of_pytorch_are_seen_in_operators_and_take_their_bytes_or_products(model) -> None:
    def kernel(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        product = a.view(256, 64).t() @ b  # a view runs no kernel
        return product.sum(0).expand(2, 32).contiguous()

    seen = []
    library = torch.library.Library("mvkernels_watched", "DEF")
    library.define("product(Tensor a, Tensor b) -> Tensor")
    library.impl("product", kernel, "CompositeExplicitAutograd")
    a, b = torch.randn(64 * 256), torch.randn(256, 32)
    with model.library.Watch(seen.append):
        found = torch.ops.mvkernels_watched.product(a, b)
        found.copy_(a[:32])
    assert torch.equal(found, a[:32].expand(2, 32))
    assert [each.kernel for each in seen] == ["aten::mm", "aten::sum", "aten::clone", "aten::copy_"]
    assert [each.flops for each in seen] == [2 * 64 * 256 * 32, 0, 0, 0]
    assert [each.bytes / 4 for each in seen] == [64 * 256 + 256 * 32 + 64 * 32, 65 * 32, 3 * 32, 3 * 32]
    h100 = model.devices.DEVICES["H100"]
    large, wide = (model.library.Called("aten::mm", bytes_, flops) for bytes_, flops in ((1e6, 1e12), (1e9, 1e6)))
    times = [model.library.times(each, h100, "bfloat16") for each in (large, wide)]
    assert [each.decides for each in times] == ["matrix", "memory"]
    assert times[0].predicted == pytest.approx(1e12 / (0.8 * 989.4e12) * 1e6, rel=0.01)
    assert times[1].predicted == pytest.approx(1e9 / 2.9e12 * 1e6, rel=0.01)


def test_the_committed_prediction_has_the_ops_floors(model) -> None:
    with PREDICTION.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert set(rows[0]) == set(model.predict.COLUMNS)
    calls = [row for row in rows if row["kernel"] == "all"]
    assert {row["batch"] for row in calls} == {"32", "128"}
    devices = collections.Counter(row["device"] for row in calls)
    assert devices["H100"] == devices["H200"] == len(calls) / 2
    of = {(row["device"], row["op"], row["model"], row["label"], row["batch"], row["mode"]): row for row in calls}
    call = ("patch_attention", "mobilevit_s@256", "4x36_32x32_p2", "128", "fwd")
    one, faster = (of[(device, *call)] for device in ("H100", "H200"))
    # q, k, v, out at the peak of the memory; an exponential of every pair, where that is faster
    assert float(one["floor_us"]) == pytest.approx(4 * 128 * 4 * 36 * 1024 * 2 / 3.35e6, rel=1e-3)
    assert float(faster["floor_us"]) == pytest.approx(128 * 4 * 1024 * 256 / (16 * 132 * 1980), rel=1e-3)
    for row in calls:
        mine = [r for r in rows if r["kernel"] != "all" and all(r[k] == row[k] for k in model.predict.CALL)]
        assert mine and float(row["predicted_us"]) == pytest.approx(
            sum(float(r["predicted_us"]) for r in mine), rel=2e-3
        )
        assert row["verdict"] == model.predict.judged(float(row["predicted_us"]), float(row["floor_us"]))["verdict"]


def test_the_committed_validation_is_within_its_margin(model) -> None:
    rows = model.validation.read(VALIDATION)
    ratios = [float(row["ratio"]) for row in rows if row["half"] == "test"]
    assert len(rows) > 500 and len(ratios) > 200
    assert sum(1 / 1.4 < ratio < 1.4 for ratio in ratios) >= 0.95 * len(ratios)
    of_instructions = model.validation.instructions(rows)
    assert len(of_instructions) >= 25
    assert all(abs(ratio - 1) < 0.12 for ratio in of_instructions)


@pytest.mark.parametrize(
    ("arguments", "told"), ((["--op", "nothing"], "no such op: nothing"), (["--shape", "nowhere"], "no call matches"))
)
def test_bad_usage_is_one_line_and_status_2(model, capsys, arguments, told) -> None:
    assert model.predict.main(arguments) == 2
    assert told in capsys.readouterr().err
