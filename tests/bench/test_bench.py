"""The benchmark: its columns, its gate, its summaries, and the measurements it rests on."""

from __future__ import annotations

import csv
import dataclasses
import functools
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mvkernels import bench, report
from mvkernels.bench import timing
from mvkernels.commands import bench as bench_report
from mvkernels.commands import cli
from mvkernels.dispatch.registry import OPS

NAME = "patch_attention"
QUICK = bench.Options(
    ops=(NAME,), labels=("8x8",), backends=("reference",), against=("eager",), rounds=2, memory=False
)  # fmt: skip

COLUMNS = (
    "date,device,capability,torch,mvkernels,commit,threads,allocator,op,model,label,size_class,batch,dtype,layout,mode,"
    "provider,ok,median_us,min_us,p20_us,p80_us,rounds,speedup_median,speedup_min,best_peer,peak_bytes,"
    "peak_resident_bytes,floor_us,fraction_of_floor,copy_gb_s,matmul_gflop_s,error,note,"
    "median_low_us,median_high_us,gb_s,tflop_s,triton,wall_us,fma_gflop_s,fraction_of_fma"
)


@pytest.fixture(autouse=True)
def _quick_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "measure_rates", lambda device, dtype: timing.Rates(1e10, 1e11))


def change(monkeypatch: pytest.MonkeyPatch, **parts: Any) -> None:
    monkeypatch.setitem(OPS, NAME, dataclasses.replace(OPS[NAME], **parts))


def test_the_columns_are_stable(tmp_path: Path) -> None:
    bench.write_csv(bench.measure(QUICK).rows, tmp_path / "new" / "out.csv")
    with (tmp_path / "new" / "out.csv").open() as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    assert ",".join(reader.fieldnames or ()) == COLUMNS
    assert [row["provider"] for row in rows] == ["reference", "eager"]
    for row in rows:
        assert row["ok"] == "True" and row["rounds"] == "2" and row["threads"] == "1"
        assert float(row["min_us"]) <= float(row["median_us"]) and float(row["floor_us"]) > 0
    assert rows[0]["best_peer"] == "eager" and float(rows[0]["speedup_median"]) > 0
    assert rows[1]["speedup_median"] == ""


@pytest.mark.core
@pytest.mark.parametrize("mode", ["fwd", "bwd", "full"])
def test_every_mode_is_measured(mode: str) -> None:
    rows = bench.measure(dataclasses.replace(QUICK, modes=(mode,), batches=(2,), memory=True)).rows
    assert all(row.ok and row.mode == mode and row.batch == 2 for row in rows)
    for row in rows:
        assert row.median_us and row.median_low_us and row.median_high_us and row.gb_s and row.tflop_s
        assert row.median_low_us <= row.median_us <= row.median_high_us
        cost = OPS[NAME].cost(OPS[NAME].suite("small")[2].make(batch=2), False)
        if mode == "fwd":
            assert row.gb_s == pytest.approx(cost.bytes / row.median_us / 1e3, rel=1e-2)
            assert row.tflop_s == pytest.approx(cost.flops / row.median_us / 1e6, rel=1e-2)
    assert all(row.peak_bytes for row in rows)


def test_a_row_says_how_near_the_peak_it_is_where_that_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    result = bench.measure(QUICK)
    assert all(row.fma_gflop_s is None and row.fraction_of_fma is None for row in result.rows)
    assert "multiply-adds" not in bench_report.text(result)
    monkeypatch.setattr(timing, "measure_rates", lambda device, dtype: timing.Rates(1e10, 1e11, fma=2e11))
    result = bench.measure(QUICK)
    for row in result.rows:
        assert row.tflop_s and row.fma_gflop_s == 200.0 and row.fraction_of_floor is not None
        assert row.fraction_of_fma == pytest.approx(row.tflop_s / 0.2, abs=1e-4)
    assert "matmul 100 GFLOP/s, multiply-adds 200 GFLOP/s" in bench_report.text(result)


def test_of_kernels_without_a_backward_the_forward_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    change(monkeypatch, forward_only=frozenset({"cpp"}), why_not={"cpp": lambda *_: None})
    reference = OPS[NAME].reference
    change(monkeypatch, function=lambda backend, **kw: reference(**kw))
    without = f"{NAME} full"
    found = bench.measure(dataclasses.replace(QUICK, modes=("fwd", "full"), backends=()))
    assert {(row.mode, row.provider) for row in found.rows} == {("fwd", "cpp"), ("fwd", "eager")}
    assert found.not_run == {without: "its kernels have no backward"}
    assert f"not run: {without}: its kernels have no backward" in bench_report.text(found)
    for backends in ((), ("cpp",)):
        with pytest.raises(report.UsageError, match=f"{NAME}: its kernels have no backward, want --mode fwd"):
            bench.measure(dataclasses.replace(QUICK, modes=("bwd", "full"), backends=backends))
    found = bench.measure(dataclasses.replace(QUICK, modes=("full",), backends=("cpp", "reference")))
    assert {row.provider for row in found.rows} == {"reference", "eager"} and all(row.ok for row in found.rows)
    assert found.not_run == {"cpp": f"{NAME}: its kernels have no backward"}
    item = next(bench.work(dataclasses.replace(QUICK, modes=("full",), backends=("cpp", "reference"))))
    assert bench.candidates(item, dataclasses.replace(QUICK, backends=("cpp", "reference"))) == ["reference"]


def test_a_kernel_without_a_backward_beside_one_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    both = {"cpp": lambda *_: None, "triton": lambda *_: "not here"}
    change(monkeypatch, forward_only=frozenset({"cpp"}), why_not=both)
    options = dataclasses.replace(QUICK, modes=("fwd", "full"), backends=())
    of_modes = {item[-1]: bench.candidates(item, options) for item in bench.work(options)}
    assert of_modes == {"fwd": ["cpp"], "full": ["reference"]}
    found = bench.measure(dataclasses.replace(options, modes=("full",)))
    assert {row.provider for row in found.rows} == {"reference", "eager"} and all(row.ok for row in found.rows)
    assert found.not_run == {"cpp": f"{NAME}: its kernels have no backward", "triton": "not here"}


def test_ops_that_are_not_named_are_those_with_the_kernel() -> None:
    every = {op.name for op, *_ in bench.work(bench.Options(backends=("triton",)))}
    assert every == {name for name, op in OPS.items() if "triton" in op.why_not} and len(every) < len(OPS)
    assert {op.name for op, *_ in bench.work(bench.Options(backends=("reference",)))} == set(OPS)
    modes = {mode for op, *_, mode in bench.work(bench.Options(modes=bench.MODES)) if not op.differentiable}
    assert modes == {"fwd"}


def test_the_threads_are_put_back() -> None:
    before = torch.get_num_threads()
    bench.measure(QUICK)
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("mode", ["fwd", "bwd", "full"])
def test_a_wrong_kernel_has_no_time(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = OPS[NAME].function
    change(monkeypatch, function=functools.wraps(right)(lambda *a, **kw: right(*a, **kw) * 1.001))
    result = bench.measure(dataclasses.replace(QUICK, modes=(mode,)))
    wrong, peer = result.rows
    assert not wrong.ok and wrong.median_us is None and wrong.rounds == 0 and "WRONG" in wrong.note
    assert wrong.error is not None and wrong.error > 0
    assert peer.ok and peer.median_us is not None
    assert result.wrong == [wrong]


def test_a_wrong_gradient_has_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    right = OPS[NAME].function

    class Skewed(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
            return x.clone()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
            return g * 1.001

    change(monkeypatch, function=lambda query, **kw: right(query=Skewed.apply(query), **kw))
    row = bench.measure(dataclasses.replace(QUICK, modes=("full",))).rows[0]
    assert not row.ok and row.median_us is None and "dquery" in row.note


def test_a_wrong_peer_sets_no_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    peers = {"eager": OPS[NAME].reference, "sdpa": lambda query, **kw: torch.zeros_like(query)}
    change(monkeypatch, peers=peers)
    result = bench.measure(dataclasses.replace(QUICK, against=("eager", "sdpa")))
    by_name = {row.provider: row for row in result.rows}
    assert by_name["sdpa"].median_us is None and "WRONG" in by_name["sdpa"].note
    assert by_name["reference"].best_peer == "eager"
    assert not result.wrong


def test_a_peer_that_fails_is_a_row_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(**_: Any) -> Tensor:
        raise RuntimeError("does not\ncompile")

    change(monkeypatch, peers={"eager": broken})
    row = bench.measure(QUICK).rows[1]
    assert not row.ok and row.note == "fails: RuntimeError: does not compile"


def test_a_wrong_kernel_is_status_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    right = OPS[NAME].function
    change(monkeypatch, function=functools.wraps(right)(lambda *a, **kw: right(*a, **kw) + 1))
    arguments = ["bench", "--shape", "8x8", "--backend", "reference", "--against", "eager", "--rounds", "1"]
    assert cli.main([*arguments, "--no-memory", "--allocator", "default"]) == 1
    out, err = capsys.readouterr()
    assert "WRONG" in err and "eager" in out


def test_json_and_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    arguments = ["bench", "--shape", "8x8", "--backend", "reference", "--against", "eager", "--rounds", "1", "--json"]
    plot = tmp_path / "plot.png"
    assert cli.main([*arguments, "--allocator", "default", "--plot", str(plot)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"machine", "rates", "rows", "summary", "not_run"}
    assert list(found["rows"][0]) == COLUMNS.split(",")
    assert found["summary"][0]["shapes"] == 1
    assert plot.read_bytes()[:4] == b"\x89PNG"


def test_summaries_are_geometric_and_name_the_worst() -> None:
    row = bench.measure(QUICK).rows[0]
    rows = [
        dataclasses.replace(row, size_class="N<=16", speedup_median=4.0, speedup_min=2.0),
        dataclasses.replace(row, size_class="N<=64", speedup_median=1.0, speedup_min=0.5),
    ]
    by_class = {s["size_class"]: s for s in bench.geomeans(rows)}
    assert list(by_class) == ["N<=16", "N<=64", "all"]
    assert by_class["all"]["geomean_of_medians"] == 2.0 and by_class["all"]["geomean_of_minima"] == 1.0
    assert by_class["all"]["worst"] == 1.0 and by_class["all"]["shapes"] == 2


def test_classes_of_the_suite() -> None:
    found = {bench.size_class(case) for case in OPS[NAME].suite("full")}
    assert found == {"N<=16", "N<=64", "N<=255", "N>=256"}


def test_backends_that_cannot_run_are_named_once(monkeypatch: pytest.MonkeyPatch) -> None:
    change(monkeypatch, why_not={"cpp": lambda *_: "no compiler"})
    result = bench.measure(dataclasses.replace(QUICK, backends=()))
    assert [row.provider for row in result.rows] == ["reference", "eager"]
    assert result.not_run == {"cpp": "no compiler"}
    assert "not run: cpp: no compiler" in bench_report.text(result)


def test_calls_are_interleaved_after_a_warm_up() -> None:
    calls: list[str] = []

    def call(name: str) -> Any:
        def slow() -> None:
            calls.append(name)
            time.sleep(2e-4)

        return slow

    times = timing.interleave({"a": call("a"), "b": call("b")}, rounds=6)
    assert {name: len(t.samples) for name, t in times.items()} == {"a": 6, "b": 6}
    rounds = calls[-12:]
    assert all({rounds[i], rounds[i + 1]} == {"a", "b"} for i in range(0, 12, 2))
    assert all(t.min <= t.quantile(0.2) <= t.median <= t.quantile(0.8) for t in times.values())
    assert times["a"].min >= 2e-4


def test_peak_memory_counts_what_is_held_at_once() -> None:
    size = 1 << 20
    x = torch.ones(size)

    def two_then_one() -> Tensor:
        y = x * 2
        z = y * 3
        del y
        return z

    peak = timing.peak_bytes(two_then_one)
    assert peak is not None and 8 * size <= peak < 8.1 * size


def test_times_keep_three_figures() -> None:
    assert [report.microseconds(s) for s in (1.2345e-6, 98.76e-6, 0.0123456, None)] == ["1.23", "98.8", "12346", "-"]


def test_what_is_named_twice_is_measured_once() -> None:
    once = bench.Options(ops=("former_to_mobile",), batches=(1, 2), modes=("bwd",), dtypes=("float64",))
    twice = dataclasses.replace(
        once, ops=once.ops * 2, batches=(1, 2, 1), modes=once.modes * 2, dtypes=once.dtypes * 2, backends=("cpp",) * 2
    )
    first, second = ([(op.name, case.label, *rest) for op, case, *rest in bench.work(o)] for o in (once, twice))
    assert first == second and {rest[3] for rest in first} == {1, 2}
    assert bench.candidates(next(bench.work(twice)), twice) == ["cpp"]
