"""What stands around the benchmark: intervals, staged calls, third-party peers, comparisons, A/B and the page."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import re
import shutil
import subprocess
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mvkernels import bench, report, testing
from mvkernels.bench import ab as bench_ab
from mvkernels.bench import compare as bench_compare
from mvkernels.bench import plots as bench_plots
from mvkernels.bench import timing
from mvkernels.bench.rows import Row
from mvkernels.commands import cli
from mvkernels.dispatch import extension
from mvkernels.dispatch.registry import OPS, NotOffered
from mvkernels.ops.common.peers import flex_attention

ROOT = Path(__file__).resolve().parents[2]


def row(**changes: Any) -> Row:
    known: dict[str, Any] = {
        "date": "2026-01-01", "device": "cpu", "capability": "avx2", "torch": "2.13", "mvkernels": "0.1", "commit": "a",
        "threads": 1, "allocator": "kept", "op": "patch_attention", "model": "m", "label": "s", "size_class": "N<=16",
        "batch": 1, "dtype": "float32", "layout": "channels_last", "mode": "fwd", "provider": "cpp", "ok": True,
        "median_us": 100.0, "median_low_us": 98.0, "median_high_us": 102.0, "gb_s": 4.0, "tflop_s": 0.02,
        "copy_gb_s": 10.0, "matmul_gflop_s": 100.0, "speedup_median": 2.0, "speedup_min": 2.0, "best_peer": "eager",
    }  # fmt: skip
    return Row(**(known | changes))


@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=60))
@settings(max_examples=40, deadline=None)
def test_the_interval_holds_the_median_and_is_of_samples(samples: list[float]) -> None:
    low, high = timing.median_interval(samples)
    assert low <= timing.Times(tuple(samples)).median <= high
    assert low in samples and high in samples


def test_the_interval_covers_as_often_as_it_says() -> None:
    draw = random.Random(0)
    for count in (9, 40):
        found = 0
        for _ in range(2000):
            low, high = timing.median_interval([draw.lognormvariate(0, 1) for _ in range(count)])
            found += low <= 1 <= high  # the median of this distribution
        assert 0.94 <= found / 2000 <= 0.99
    assert timing.median_interval(list(range(2000)), 0.95) == (955, 1044)  # n/2 -+ 1.96 sqrt(n)/2


def test_only_the_second_stage_is_timed() -> None:
    made: list[int] = []

    def prepare() -> Any:
        time.sleep(0.05)
        made.append(1)
        return made.pop

    times = timing.interleave({"staged": timing.Staged(prepare)}, rounds=3)["staged"]
    assert min(times.samples) < 0.05
    assert not made  # each that was prepared ran once


needs_extension = pytest.mark.skipif(extension.module is None, reason=extension.reason)


@needs_extension
@pytest.mark.parametrize(
    ("name", "more", "what", "mean_of_many"),
    [
        ("multiply_adds", (False,), "multiply-adds", 1),
        ("multiply_adds", (True,), "multiply-adds", 1),
        ("exponentials", (), "exponentials", -0.6411857),
    ],
)
def test_what_a_processor_does_is_counted_and_stays_numbers(
    name: str, more: tuple[bool, ...], what: str, mean_of_many: float
) -> None:
    module, before = extension.module, torch.get_num_threads()
    assert module is not None
    measured = getattr(module, name)
    used = module.instruction_set()
    try:
        for isa in module.instruction_sets():
            module.set_instruction_set(isa)
            torch.set_num_threads(1)
            of_one = measured(1, *more)[0]
            for threads in (1, 2):
                torch.set_num_threads(threads)
                count, mean = measured(100_000, *more)
                assert count == 100_000 * threads * of_one > 0 and mean == pytest.approx(mean_of_many, rel=1e-6)
    finally:
        module.set_instruction_set(used)
        torch.set_num_threads(before)
    assert measured(0, *more)[0] == 0
    for rounds in (-1, 10**9 + 1, 2**62):
        with pytest.raises(ValueError, match=f"{rounds} rounds of {what}, want 0 to 1000000000"):
            measured(rounds, *more)
    for wrong in (2**70, 1.5):
        with pytest.raises((OverflowError, TypeError)):
            measured(wrong, *more)


def test_rates_have_the_peak_of_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    def once(calls: Any, *_: Any, **__: Any) -> Any:
        for call in calls.values():
            call()
        return {name: timing.Times((2.0,)) for name in calls}  # seconds

    seen: set[tuple[int, bool]] = set()

    class Counted:
        def multiply_adds(self, rounds: int, doubles: bool) -> tuple[int, float]:
            seen.add((rounds, doubles))
            return 100 * rounds, 1.0

    monkeypatch.setattr(timing, "interleave", once)
    monkeypatch.setattr(extension, "module", Counted())
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        rates = timing.measure_rates(dtype=dtype)
        assert rates.fma == 50 * timing._ROUNDS and rates.matmul == 2 * 1024**3 / 2
        assert seen == {(1, dtype == torch.float64), (timing._ROUNDS, dtype == torch.float64)}
        seen.clear()
    monkeypatch.setattr(extension, "module", None)
    assert timing.measure_rates().fma is None


@pytest.mark.parametrize("op", sorted(OPS))
def test_third_party_peers_do_what_the_op_does(op: str) -> None:
    ran = []
    for name, peer in OPS[op].third_party.items():
        if name == "flex":  # compiles for a long time; its own tests are PyTorch's
            continue
        case = next(c for c in OPS[op].suite("small") if op != "patch_attention" or c.label.endswith("8x8_p2"))
        arguments = case.make(batch=2, layout=case.layouts[-1])
        wanted = list(testing.tensors_in(arguments))
        out = OPS[op].reference(**arguments)
        cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
        expected = testing.run(OPS[op].reference, arguments, wanted, cotangent)
        try:
            for _ in range(2):  # a module is made once, and must not keep the first call's weights
                found = testing.run(peer, arguments, wanted, cotangent)
        except ImportError as error:
            pytest.skip(str(error))
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-4, msg=f"{name} {key}")
        ran.append(name)
        with pytest.raises(NotOffered):
            peer(**_not_offered(op, arguments))
    assert ran or set(OPS[op].third_party) <= {"flex"}


def _not_offered(op: str, arguments: dict[str, Any]) -> dict[str, Any]:
    if op == "patch_attention":
        return arguments | {"scale": 1.0}
    return testing.with_tensors(arguments, {n: v.double() for n, v in testing.tensors_in(arguments).items()})


def test_flex_attention_has_no_backward_on_a_cpu() -> None:
    q = torch.randn(1, 1, 4, 16, requires_grad=True)
    with pytest.raises(NotOffered, match="no backward"):
        flex_attention(q, q, q, 1.0)


def test_a_peer_that_is_not_there_is_skipped_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(**_: Any) -> torch.Tensor:
        raise ImportError("timm is not installed")

    monkeypatch.setattr(timing, "measure_rates", lambda device, dtype: timing.Rates(1e10, 1e11))
    monkeypatch.setitem(
        OPS, "patch_attention", dataclasses.replace(OPS["patch_attention"], third_party={"timm": missing})
    )
    options = bench.Options(ops=("patch_attention",), labels=("8x8",), backends=("reference",),
                            against=("thirdparty",), rounds=1, memory=False)  # fmt: skip
    ours, peer = bench.measure(options).rows
    assert ours.ok and peer.provider == "timm" and not peer.ok and peer.note == "skipped: timm is not installed"


def test_files_come_back_as_they_were_and_old_ones_lack_the_new_columns(tmp_path: Path) -> None:
    rows = [
        row(),
        row(provider="eager", ok=False, median_us=None, note="fails, in a word"),
        row(peak_bytes=7, error=1e-7),
    ]
    bench.write_csv(rows, tmp_path / "a.csv")
    assert bench.read_csv(tmp_path / "a.csv") == rows
    text = (tmp_path / "a.csv").read_text().splitlines()
    at = text[0].split(",").index("fma_gflop_s")
    (tmp_path / "old.csv").write_text("\n".join(",".join(line.split(",")[:at]) for line in text[:2]) + "\n")
    assert bench.read_csv(tmp_path / "old.csv") == [rows[0]]
    at = text[0].split(",").index("median_low_us")
    (tmp_path / "old.csv").write_text("\n".join(",".join(line.split(",")[:at]) for line in (text[0], text[1])) + "\n")
    assert bench.read_csv(tmp_path / "old.csv")[0].median_low_us is None
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(report.UsageError, match="no column 'date'"):
        bench.read_csv(tmp_path / "other.csv")


VERDICTS = [
    (row(), row(median_us=140.0, median_low_us=120.0, median_high_us=150.0), "slower"),
    (row(), row(median_us=140.0, median_low_us=101.0, median_high_us=150.0), "same"),  # the intervals meet
    (row(), row(median_us=104.0, median_low_us=103.0, median_high_us=105.0), "same"),  # within the tolerance
    (row(), row(median_us=50.0, median_low_us=49.0, median_high_us=51.0), "faster"),
    (row(), row(ok=False, median_us=None), "wrong"),
    (row(median_low_us=None, median_high_us=None, p20_us=80.0, p80_us=130.0), row(median_us=120.0), "same"),
]


@pytest.mark.parametrize(("old", "new", "verdict"), VERDICTS, ids=[f"{i}-{v[2]}" for i, v in enumerate(VERDICTS)])
def test_a_row_has_regressed_beyond_the_intervals_only(old: Row, new: Row, verdict: str) -> None:
    (change,) = bench_compare.compare([old], [row(label="another"), new])
    assert change.verdict == verdict and change.regressed == (verdict in ("slower", "wrong"))


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(report.UsageError, match="the old rows are of gpu"):
        bench_compare.compare([row(device="gpu")], [row()])
    peers = [row(provider="eager", median_us=100.0)], [row(provider="eager", median_us=121.0)]
    assert bench_compare.drift(*peers) == pytest.approx(1.21)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = cli.main(["bench", *arguments, "--allocator", "default"])
    out, err = capsys.readouterr()
    return status, out, err


@pytest.mark.core
def test_compare_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = str(tmp_path / "old.csv"), str(tmp_path / "new.csv")
    bench.write_csv([row()], old)
    bench.write_csv([row(median_us=200.0, median_low_us=190.0, median_high_us=210.0)], new)
    assert run(capsys, "--read", old, "--compare", old)[0] == 0
    status, out, err = run(capsys, "--read", new, "--compare", old)
    assert status == 1 and "2.000x" in out and "slower" in out and "1 rows have regressed" in err
    assert run(capsys, "--read", new, "--compare", old, "--tolerance", "1.5")[0] == 0
    status, out, _ = run(capsys, "--read", new, "--compare", old, "--json")
    assert status == 1 and json.loads(out)["changes"][0]["verdict"] == "slower"
    status, _, err = run(capsys, "--read", new, "--compare", str(tmp_path / "no.csv"))
    assert status == 2 and "no.csv cannot be read" in err and err.count("\n") == 1


def test_plots_of_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    bench.write_csv([row(), row(provider="eager", speedup_median=None)], tmp_path / "a.csv")
    plots = [tmp_path / "bars.png", tmp_path / "roof.png"]
    read = ("--read", str(tmp_path / "a.csv"), "--plot", str(plots[0]), "--roofline", str(plots[1]))
    assert run(capsys, *read)[0] == 0
    assert all(plot.read_bytes()[:4] == b"\x89PNG" for plot in plots)
    assert bench_plots.point(row()) == pytest.approx((5.0, 20.0))
    assert bench_plots.roof(row(), 5.0) == 50.0 and bench_plots.roof(row(), 50.0) == 100.0


@pytest.mark.parametrize("time", ["0.0", "nan", "inf", "-1.0"])
def test_a_file_with_times_that_are_none_is_refused(
    time: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, bad = str(tmp_path / "a.csv"), str(tmp_path / "bad.csv")
    bench.write_csv([row(error=math.inf)], path)  # of a wrong result
    bench.write_csv([row(median_us=float(time))], bad)
    for files in (("--read", bad), ("--read", path, "--compare", bad)):
        status, _, err = run(capsys, *files)
        assert status == 2 and f"bad.csv cannot be read: median_us is {time}" in err and err.count("\n") == 1
    bench.write_csv([], bad)
    assert run(capsys, "--read", path, "--compare", bad)[::2] == (2, f"mvkernels bench: {bad} has no rows\n")
    assert run(capsys, "--read", path)[0] == 0
    (tmp_path / "bad.csv").write_bytes(bytes(range(256)))
    status, _, err = run(capsys, "--html", str(tmp_path))
    assert status == 2 and "bad.csv cannot be read" in err and err.count("\n") == 1


def test_the_page_opens_with_pictures_and_means(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench.write_csv([row(speedup_median=2.0), row(speedup_median=8.0, batch=2)], tmp_path / "a.csv")
    lines = [
        "device,model,mode,provider,median_us,speedup_median",
        "cpu,m,fwd,original,3000,1",
        "cpu,m,fwd,swapped,2000,1.5",
    ]
    (tmp_path / "swapped.csv").write_text("\n".join(lines) + "\n")
    assert run(capsys, "--html", str(tmp_path))[0] == 0
    opening, files = (tmp_path / "index.html").read_text().split("<h2>Files</h2>")
    assert ">4.00×</text>" in opening and ">1.50×</text>" in opening
    assert "<td>2</td><td>4.00</td><td>2.00</td>" in opening and "<td>1</td><td>1.50</td><td>1.50</td>" in opening
    assert '<td data-v="3000.0">3 ms</td>' in files and "<th>median</th>" in files
    assert files.count("<details><summary>all 2 rows</summary>") == 2  # closed until somebody asks
    (tmp_path / "swapped.csv").write_text("\n".join([*lines, "cpu,m,fwd,swapped,1,x"]) + "\n")
    status, _, err = run(capsys, "--html", str(tmp_path))
    assert status == 2 and "a speed-up is not a number" in err and err.count("\n") == 1


def test_the_page_needs_nothing_but_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench.write_csv([row(note="<script>bad</script>"), row(provider="eager", speedup_median=None)], tmp_path / "a.csv")
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "models.csv").write_text("model,median_us\nmobilevit,1.5\n")
    status, out, _ = run(capsys, "--html", str(tmp_path))
    page = (tmp_path / "index.html").read_text()
    assert status == 0 and "index.html" in out
    assert not re.search(r"https?://|src=|<link", page)
    assert "<script>bad" not in page and "&lt;script&gt;bad" in page
    assert page.rindex("<circle") < page.index("<h2>Files</h2>")
    assert page.count("<circle") == 2 and "2.00× of eager" in page and "mobilevit" in page
    status, _, err = run(capsys, "--html", str(tmp_path / "nowhere"))
    assert status == 2 and "no such folder" in err
    (tmp_path / "empty").mkdir()
    assert run(capsys, "--html", str(tmp_path / "empty"))[0] == 2


needs_git = pytest.mark.skipif(not (ROOT / ".git").exists() or shutil.which("git") is None, reason="not a git checkout")


@needs_git
def test_two_checkouts_take_turns(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_ab, "PAIRS", 2)
    shape = ("patch_attention", "--shape", "8x8", "--backend", "reference", "--rounds", "3", "--mode", "bwd")
    status, out, err = run(capsys, *shape, "--ab", "HEAD", "--tolerance", "1000", "--json")
    assert status == 0, err
    (found,) = json.loads(out)["rows"]
    assert found["pairs"] == 2 and found["verdict"] == "same"
    assert found["here_us"] > 0 and found["there_us"] > 0
    assert 0 < found["ratio_low"] <= found["ratio"] <= found["ratio_high"] < math.inf


@needs_git
def test_a_commit_that_is_not_there_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, "--ab", "no_such_commit")
    assert status == 2 and "there is no such commit" in err and err.count("\n") == 1


def test_a_side_is_slower_if_it_is_in_every_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fake:
        def __init__(self, *seconds: float, why: str = "") -> None:
            self.seconds, self.why = seconds, why

    class Worker:
        def __init__(self, seconds: float, why: str) -> None:
            self.seconds, self.why = seconds, why

        def ask(self, request: Any) -> Any:
            return self.seconds if request == "sample" else {"why": self.why} if self.why else {"repeats": 1}

    def judged(here: Fake, there: Fake) -> bench_ab.Side:
        pairs = {bench_ab.ROOT: iter(here.seconds * 2), Path("there"): iter(there.seconds * 2)}
        whys = {bench_ab.ROOT: here.why, Path("there"): there.why}
        monkeypatch.setattr(bench_ab, "checkout", lambda commit: nullcontext(Path("there")))
        monkeypatch.setattr(bench_ab, "worker", lambda path: nullcontext(Worker(next(pairs[path]), whys[path])))
        options = bench.Options(ops=["patch_attention"], labels=["8x8"], backends=["reference"], rounds=7)
        monkeypatch.setattr(bench_ab, "PAIRS", 2 * len(here.seconds))
        return bench_ab.run(options, "commit", 0.05)[0]

    assert judged(Fake(2.0), Fake(1.0)).verdict == "slower" and judged(Fake(2.0), Fake(1.0)).regressed
    assert judged(Fake(1.0), Fake(2.0)).verdict == "faster"
    assert judged(Fake(1.04), Fake(1.0)).verdict == "same"
    lucky = judged(Fake(2.0, 1.0, 2.0), Fake(1.5, 1.5, 1.1))  # memory that lies well once is no regression
    assert lucky.verdict == "same" and lucky.ratio == pytest.approx(1.0 / 1.1) and lucky.pairs == 6
    assert lucky.ratio_low == pytest.approx(1.0 / 1.5) and lucky.ratio_high == pytest.approx(2.0 / 1.1)
    assert judged(Fake(1.0, why="ArithmeticError: WRONG"), Fake(1.0)).regressed
    new = judged(Fake(1.0), Fake(1.0, why="LookupError: this checkout has no such shape"))
    assert not new.regressed and "no time there" in new.verdict


def test_results_alone_leave_a_commit_clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, result = tmp_path / "mvkernels" / "report.py", tmp_path / "benchmarks" / "results" / "rows.csv"
    for path in (source, result):
        path.parent.mkdir(parents=True)
        path.write_text("before")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "one"]):
        subprocess.run([*git, *command], check=True)
    monkeypatch.delenv("MVKERNELS_COMMIT", raising=False)
    monkeypatch.setattr(report, "__file__", str(source))
    clean = report.commit()
    result.write_text("after")
    assert len(clean) == 10 and report.commit() == clean
    source.write_text("after")
    assert report.commit() == f"{clean}-dirty"
