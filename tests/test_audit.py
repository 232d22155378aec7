"""The static audit: its rows, its verdicts, its command line."""

from __future__ import annotations

import csv
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

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
        assert int(row["blocks_per_processor"]) >= 1
    assert f"{audit.QUICK} kernels" in capsys.readouterr().out


def test_half_precision_uses_matrix_instructions_and_wide_loads(audit):
    units = audit.plan(["sm_90"], ["bf16"], False, "forward_rows .* 36 36 32x32 .* last", audit.OPS)
    unit, row = next(iter(units.items()))
    row = row | audit.compile_unit(unit)
    assert row["matrix"] == "wgmma" and row["widest_load"] == 8  # 36 channels: 72-byte runs, 8-byte aligned


def test_committed_results_are_of_this_audit_and_without_a_finding(audit):
    rows = []
    for op in audit.OPS:
        with (audit.RESULTS / f"{op}.csv").open() as file:
            reader = csv.DictReader(file)
            rows += list(reader)
        assert reader.fieldnames == audit.COLUMNS
    assert {row["target"] for row in rows} == set(audit.TARGETS)
    assert {row["dtype"] for row in rows} == set(audit.DTYPES)
    assert all(row["verdict"] == "ok" for row in rows)
    units = audit.plan(list(audit.TARGETS), list(audit.DTYPES), False, "", audit.OPS)
    told = {(r["op"], r["kernel"], r["target"], r["dtype"], r["head_dim"], r["tokens"], r["config"]) for r in rows}
    now = {
        (r["op"], r["kernel"], r["target"], r["dtype"], str(r["head_dim"]), str(r["tokens"]), r["config"])
        for r in units.values()
    }
    assert told == now, "launch configurations have changed: run `make audit`"


def test_a_spill_and_too_much_shared_memory_are_findings(audit):
    row = audit._row(255, 16, 0, 1024, "sm_80", 2, 4, "mma.sync", 16)
    assert row["verdict"] == "SPILLS"
    row = audit._row(255, 0, 16, 1024, "sm_80", 2, 4, "mma.sync", 16)
    assert row["verdict"] == "ok"
    row = audit._row(255, 0, 0, 65 * 1024, "gfx942", 2, 4, "mfma", 16)
    assert row["verdict"] == "SHARED"


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
