"""The static audit: its rows, its verdicts, its command line."""

from __future__ import annotations

import csv
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from mvkernels.dispatch.registry import OPS  # noqa: E402
from mvkernels.triton import repeated  # noqa: E402
from tests.ptx.pipelined import multiplied_and_summed  # noqa: E402

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "benchmarks" / "audit.py"
not_interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter replaces the compiler"
)
pytestmark = not_interpreted


@pytest.fixture(scope="module")
def audit():
    spec = importlib.util.spec_from_file_location("mvkernels_audit", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_quick_audit_finds_nothing_and_writes_its_rows(audit, tmp_path, capsys):
    path = tmp_path / "rows.csv"
    assert audit.main(["--quick", "--csv", str(path)]) == 0
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == audit.QUICK and list(rows[0]) == audit.COLUMNS
    for row in rows:
        assert row["verdict"] == "ok" and int(row["spill_bytes"]) == 0
        assert 0 < int(row["registers"]) <= 512
        assert int(row["shared_bytes"]) <= int(row["shared_limit"])
        assert int(row["blocks_per_processor"]) >= 1 and row["limited_by"]
    assert f"{audit.QUICK} kernels" in capsys.readouterr().out


def test_half_precision_uses_matrix_instructions_and_wide_loads(audit):
    units = audit.plan(["sm_90"], ["bf16"], False, "forward_rows .* 36 36 32x32 .* last", audit.OPS)
    unit, row = next(iter(units.items()))
    row = row | audit.judged(row, audit.compile_unit(unit))
    assert row["verdict"] == "ok" and row["multiplies"] == 1 and row["matrix_instructions"] >= 2
    assert row["limited_by"] in ("registers", "shared", "warps", "blocks") and 0 < row["occupancy"] <= 1
    assert row["matrix"] == "wgmma" and row["widest_load"] == 8  # 36 channels: 72-byte runs, 8-byte aligned


def test_a_product_and_a_sum_are_one_instruction_whatever_tritons_default(audit, monkeypatch):
    def fused(compiled, *_):
        return {"fused": compiled.asm["ptx"].count("fma.rn.f32"), "spill_bytes": 0, "registers": 1}

    unit = next(iter(audit.plan(["sm_90"], ["bf16"], False, "aggregate", audit.OPS)))
    launch = repeated.RepeatedLaunch(None, 1, (), {}, dict(unit.options))
    assert launch.options == audit.OPTIONS | dict(unit.options)
    monkeypatch.setattr(audit, "nvidia", fused)
    with triton.knobs.language.scope():
        triton.knobs.language.default_fp_fusion = False
        assert audit.compile_unit(unit)["fused"] > 0
        monkeypatch.setattr(audit, "OPTIONS", {})
        assert audit.compile_unit(unit)["fused"] == 0


@pytest.mark.parametrize("op", OPS)
def test_committed_results_are_of_this_audit_and_without_a_finding(audit, op):
    path = audit.RESULTS / f"{op}.csv"
    if not path.exists():
        pytest.skip("not audited as a whole yet: run `make audit`")
    with path.open() as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    assert reader.fieldnames == audit.COLUMNS[: len(reader.fieldnames)]  # new columns go to the end
    assert {row["target"] for row in rows} == set(audit.TARGETS)
    assert all(row["verdict"] == "ok" for row in rows)
    units = audit.plan(list(audit.TARGETS), list(audit.DTYPES), False, "", [op])
    told = {(r["op"], r["kernel"], r["target"], r["dtype"], r["head_dim"], r["tokens"], r["config"]) for r in rows}
    now = {
        (r["op"], r["kernel"], r["target"], r["dtype"], str(r["head_dim"]), str(r["tokens"]), r["config"])
        for r in units.values()
    }
    assert told == now, "launch configurations have changed: run `make audit`"


SOUND = {
    "spill_bytes": 0, "shared_bytes": 1024, "shared_limit": 166912, "warps_per_processor": 8, "multiplies": 1,
    "matrix_products": 2, "matrix": "mma.sync", "widest_load": 8, "aligned_bytes": 16, "dtype": "bf16",
    "target": "sm_80",
}  # fmt: skip
FINDINGS = [
    ({}, "ok"),
    ({"spill_bytes": 16}, "SPILLS"),
    ({"stack_bytes": 16}, "ok"),
    ({"shared_bytes": 65 * 1024, "shared_limit": 64 * 1024}, "SHARED"),
    ({"warps_per_processor": 2}, "WARPS"),
    ({"warps_per_processor": 0}, "WARPS"),
    ({"matrix": "-"}, "MATRIX"),
    ({"matrix": "-", "matrix_products": 0}, "ok"),
    ({"widest_load": 4}, "LOADS"),
    ({"widest_load": 4, "aligned_bytes": 4}, "ok"),
    ({"widest_load": 4, "multiplies": 0}, "ok"),
    ({"loop_divisions": 1}, "DIVISION"),
    ({"loop_narrow_loads": 1, "layout": "last"}, "NARROW"),
    ({"loop_narrow_loads": 1, "layout": "first"}, "ok"),
    ({"loop_narrow_loads": 1, "layout": "last", "bias": 1, "tokens": 144}, "NARROW"),
    ({"loop_narrow_loads": 1, "layout": "last", "bias": 1, "tokens": 49}, "ok"),
]


@pytest.mark.parametrize(("change", "wanted"), FINDINGS, ids=[f"{i}-{f[1]}" for i, f in enumerate(FINDINGS)])
def test_what_counts_as_a_finding(audit, change, wanted):
    assert audit.verdict(SOUND | change) == wanted


@triton.jit
def _rows_by_division(x_ptr, out_ptr, width, steps, DIVIDES: tl.constexpr):
    # Sums of some rows; which row a step has is divided out anew, or was known before.
    n = tl.arange(0, 32)
    total = tl.zeros([32], tl.float32)
    row = steps // width
    for step in range(steps):
        if DIVIDES:
            row = (step * steps) // width
        total += tl.load(x_ptr + row * 32 + n)
        row += 1
    tl.store(out_ptr + n, total)


@triton.jit
def _columns(x_ptr, out_ptr, steps, stride, STRIDED: tl.constexpr):
    # Sums of 64 neighbours of a row; with a stride that only the call knows, one element at a time.
    n = tl.arange(0, 64)
    total = tl.zeros([64], tl.float32)
    for step in range(steps):
        total += tl.load(x_ptr + step * 64 + (n * stride if STRIDED else n)).to(tl.float32)
    tl.store(out_ptr + n, total)


def _read(kernel, signature, warps=1, stages=1, **constexprs):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    at = {(kernel.arg_names.index(name),): value for name, value in constexprs.items()}
    source = ASTSource(
        fn=kernel,
        signature=signature | dict.fromkeys(constexprs, "constexpr"),
        constexprs=at,
        attrs={(at,): [["tt.divisibility", 16]] for at, kind in enumerate(signature.values()) if kind[0] == "*"},
    )
    compiled = triton.compile(
        source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps, "num_stages": stages}
    )
    import _audit_code as code

    return code.nvidia(compiled, "sm_90", warps)


@pytest.mark.parametrize("width", ["i32", "i64"])
@pytest.mark.parametrize("divides", [False, True])
def test_integer_divisions_in_loops_are_found(audit, width, divides):
    signature = {"x_ptr": "*fp32", "out_ptr": "*fp32", "width": width, "steps": "i32"}
    found = _read(_rows_by_division, signature, DIVIDES=divides)
    assert (found["loop_divisions"] > 0) == divides and found["loop_narrow_loads"] == 0
    assert audit.verdict(SOUND | {"loop_divisions": found["loop_divisions"]}) == ("DIVISION" if divides else "ok")


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("stages", [1, 2, 3])
def test_tiles_that_are_overwritten_while_a_product_reads_them_are_found(audit, stages, turned):
    signature = {"a_ptr": "*bf16", "w_ptr": "*bf16", "out_ptr": "*fp32", "sums_ptr": "*fp32"}
    found = _read(multiplied_and_summed, signature, 4, stages, K=256, N=64, BLOCK_M=64, BLOCK_K=32, TURNED=turned)
    assert found["overwritten"] == (stages > 1)
    row = SOUND | {"overwritten": found["overwritten"]}
    assert audit.verdict(row) == ("OVERWRITES" if stages > 1 else "ok")


@pytest.mark.parametrize("strided", [False, True])
def test_narrow_loads_in_loops_are_found(audit, strided):
    signature = {"x_ptr": "*bf16", "out_ptr": "*fp32", "steps": "i32", "stride": "i32"}
    found = _read(_columns, signature, STRIDED=strided)
    assert (found["loop_narrow_loads"] > 0) == strided and found["loop_divisions"] == 0
    row = SOUND | {"layout": "last", "loop_narrow_loads": found["loop_narrow_loads"]}
    assert audit.verdict(row) == ("NARROW" if strided else "ok")


def test_a_finding_is_status_1(audit, monkeypatch, capsys):
    monkeypatch.setattr(audit, "compile_unit", lambda unit: SOUND | {"spill_bytes": 4, "registers": 255})
    for name in ("dtype", "target", "aligned_bytes"):
        monkeypatch.delitem(SOUND, name)
    assert audit.main(["--quick"]) == 1
    assert "SPILLS" in capsys.readouterr().out


def test_occupancy_says_what_it_is_limited_by(audit):
    import _machine_code as code

    assert code.occupancy(255, 0, 8, "sm_80") == (1, "registers")  # 256 * 32 * 8 = all there are
    assert code.occupancy(32, 100 << 10, 4, "sm_90") == (2, "shared")
    assert code.occupancy(32, 0, 8, "sm_90") == (8, "registers") and code.occupancy(24, 0, 8, "sm_90") == (8, "warps")
    assert code.occupancy(16, 0, 1, "sm_80") == (32, "blocks")
    assert code.occupancy(128, 0, 4, "gfx942") == (4, "registers")


def test_instructions_are_counted_in_ptx(audit):
    import _audit_code as code

    ptx = """
        ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
        ld.global.b16 { %rs1 }, [ %rd2 + 0 ];
        cp.async.cg.shared.global [ %r9 + 0 ], [ %rd3 + 0 ], 0x10, %r7;
        mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 { %r1 };
        mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 { %r1 };
        wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%f1};
    """
    assert code.global_loads(ptx) == [16, 2, 16]
    ttir = """
        %1 = tt.dot %a, %b, %c : tensor<16x16xbf16> * tensor<16x16xbf16> -> tensor<16x16xf32>
        %2 = tt.dot %a, %b, %c, inputPrecision = tf32x3 : tensor<16x16xf32> * tensor<16x16xf32> -> tensor<16x16xf32>
        %3 = tt.dot %a, %b, %c : tensor<16x16xf32> * tensor<16x16xf32> -> tensor<16x16xf32>
    """
    assert code.matrix_products(ttir) == 2
    assert code.matrix_instructions(ptx) == ("wgmma+mma.sync", 3)


@pytest.mark.parametrize(
    ("arguments", "environment", "told"),
    [
        (["--filter", "no such row"], {}, "no row matches"),
        (["--filter", "("], {}, "--filter"),
        (["--target", "sm_1"], {}, "sm_1"),
        (["--processes", "0"], {}, "--processes"),
        ([], {"TRITON_INTERPRET": "1"}, "TRITON_INTERPRET"),
    ],
)
def test_bad_usage_is_one_line_and_status_2(arguments, environment, told):
    command = [sys.executable, str(SCRIPT), *arguments]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and told in done.stderr and "Traceback" not in done.stderr
