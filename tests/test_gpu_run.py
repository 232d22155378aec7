"""benchmarks/gpu.py without a GPU: its plan, its deadline, what it keeps, what it goes on with."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import sysconfig
import tarfile
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from mvkernels.dispatch.registry import OPS

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu

    monkeypatch.setattr(gpu, "identity", lambda: ["code", "device"])
    return gpu


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    # Where nothing is installed but what the package needs: -S leaves out the finders of editable installs.
    places = dict.fromkeys((sysconfig.get_path("purelib"), sysconfig.get_path("platlib")))
    line = [sys.executable, "-S", str(ROOT / "benchmarks" / "gpu.py"), *arguments]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(places)}
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)


def code(text: str) -> tuple[str, ...]:
    return (sys.executable, "-c", text)


def packed(out: Path, name: str) -> str:
    with tarfile.open(out / "results.tar.gz") as tar:
        file = tar.extractfile(name)
        assert file is not None
        return file.read().decode()


def test_without_a_gpu_it_says_so_and_is_status_2() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    found = python()
    assert found.returncode == 2
    assert "no CUDA device" in found.stderr and found.stderr.count("\n") == 1


def test_its_steps_need_no_installed_package(tmp_path: Path) -> None:
    found = python("--rehearse", "--only", "info", "--out", str(tmp_path))
    assert found.returncode == 0, found.stdout + found.stderr
    assert "mvkernels" in packed(tmp_path, "logs/info.log")


def test_it_can_be_listed_without_one() -> None:
    found = python("--dry-run")
    assert found.returncode == 0, found.stderr
    for op in (name for name, op in OPS.items() if "triton" in op.why_not):
        for what in ("verify", "counters"):
            assert f"{what} {op}" in found.stdout
    assert "tune" in found.stdout and "times" in found.stdout
    assert python("--only", "nothing").returncode == 2


def test_a_step_that_fails_or_takes_too_long_stops_no_other(gpu: ModuleType, tmp_path: Path) -> None:
    steps = [
        gpu.Step("first", code("print('one')"), 20),
        gpu.Step("fails", code("raise SystemExit(3)"), 20, beside=True),
        gpu.Step("hangs", code("import time; time.sleep(60)"), 4.1, beside=True),
        gpu.Step("needs", code(""), 20, needs="no-such-program"),
        gpu.Step("last", code("print('last')"), 20),
    ]
    run = gpu.Run(tmp_path, None, "cpu", tmp_path / "work")
    begun = time.monotonic()
    run.all(steps, cores=2)
    assert time.monotonic() - begun < 30
    assert run.status.pop("needs") == "left out: needs no-such-program"
    assert run.status == {"first": "ok", "fails": "status 3", "hangs": "too long", "last": "ok"}
    notes = json.loads(packed(tmp_path, "notes.json"))
    assert set(notes["done"]) == {"first", "last"} and notes["status"].items() >= run.status.items()
    assert packed(tmp_path, "logs/last.log") == "last\n"


def test_the_deadline_holds_and_what_was_cut_off_keeps_its_rows(gpu: ModuleType, tmp_path: Path) -> None:
    rows = tmp_path / "rows"
    keeps = f"import signal, time; signal.signal(15, lambda *_: (open({str(rows)!r}, 'w').write('kept'), exit(0)))"
    steps = [gpu.Step("long", code(f"{keeps}; time.sleep(60)"), 60), gpu.Step("late", code(""), 60)]
    begun = time.monotonic()
    run = gpu.Run(tmp_path, 12 / 60, "cpu", tmp_path / "work")
    run.all(steps, cores=1)
    assert time.monotonic() - begun < 16
    assert run.status == {"long": "cut off", "late": "no time"} and rows.read_text() == "kept"


@pytest.mark.core
def test_it_goes_on_where_it_stopped(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "log"

    def append(letter: str, more: str = "") -> tuple[str, ...]:
        return code(f"open({str(log)!r}, 'a').write({letter!r}); {more}")

    monkeypatch.setattr(gpu.Run.__init__, "__defaults__", (tmp_path / "work",))

    def go(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["gpu.py", "--rehearse", *arguments])
        return int(gpu.main())

    wrong = [gpu.Step("a", append("a"), 20), gpu.Step("b", append("b", "exit(1)"), 20)]
    monkeypatch.setattr(gpu, "steps", lambda *_: wrong)
    assert go("--out", str(tmp_path / "one")) == 1
    right = [gpu.Step("a", append("a"), 20), gpu.Step("b", append("b"), 20)]
    monkeypatch.setattr(gpu, "steps", lambda *_: right)
    assert go("--out", str(tmp_path / "two"), "--resume", str(tmp_path / "one")) == 0
    assert log.read_text() == "abb"
    assert go("--out", str(tmp_path / "three"), "--resume", str(tmp_path / "two"), "--only", "a") == 0
    assert log.read_text() == "abb"
    monkeypatch.setattr(gpu, "identity", lambda: ["other code", "device"])
    assert go("--out", str(tmp_path / "four"), "--resume", str(tmp_path / "two")) == 0
    assert log.read_text() == "abbab" and "other code, not code" in capsys.readouterr().err
    with pytest.raises(gpu.report.UsageError, match="nothing to resume"):
        go("--resume", str(tmp_path / "nowhere"))


def test_what_an_earlier_run_found_is_taken_over(gpu: ModuleType, tmp_path: Path) -> None:
    def run(out: str, earlier: str | None, *steps: tuple[str, str], minutes: float | None = None) -> Any:
        found = gpu.Run(tmp_path / out, minutes, "cpu", tmp_path / f"work {out}")
        if earlier:
            (found.results / "a.csv").write_text("of another run")
            found.take_over(tmp_path / earlier)
        found.all([gpu.Step(name, code(f"folder = {str(found.results)!r}; {text}"), 20) for name, text in steps], 1)
        return found

    fine, wrong = "print('said'); open(folder + '/a.csv', 'w').write('row')", "exit(1)"
    run("one", None, ("a", fine), ("b", wrong))
    # Another machine: nothing of the first run is there but what it has packed.
    shutil.rmtree(tmp_path / "work one")
    late = run("late", "one", ("b", "pass"), minutes=1e-3)
    assert late.status == {"b": "no time"}
    late.pack()
    found = run("two", "late", ("a", wrong), ("b", "pass"), ("c", "pass"))
    assert list(found.status) == ["c", "b"]  # what had failed comes last
    place = f"benchmarks/results/{found.results.name}/a.csv"
    assert (tmp_path / "two" / "replaced" / place).read_text() == "of another run"
    for out in ("one", "late", "two"):
        assert packed(tmp_path / out, place) == "row"
        assert packed(tmp_path / out, "logs/a.log") == "said\n"
    assert set(json.loads(packed(tmp_path / "two", "notes.json"))["done"]) == set("abc")
    archive = tmp_path / "two" / "results.tar.gz"
    archive.write_bytes(archive.read_bytes()[:-40])
    with pytest.raises(gpu.report.UsageError, match="nothing to resume"):
        found.take_over(tmp_path / "two")


def test_what_was_compiled_is_taken_over_or_compiled_again(gpu: ModuleType, tmp_path: Path) -> None:
    def run(out: str) -> Any:
        return gpu.Run(tmp_path / out, None, "cpu", tmp_path / f"work {out}")

    make = "import os, pathlib; f = pathlib.Path(os.environ['TRITON_CACHE_DIR'], 'a'); f.mkdir(parents=True);"
    steps = [gpu.Step("compile 1", code(make + "(f / 'k.cubin').write_text('code')"), 20, beside=True)]
    run("one").all(steps, 1)
    for out, earlier in (("two", "one"), ("three", "two")):
        later = run(out)
        later.take_over(tmp_path / earlier)
        later.all(steps, 1)
        later.pack()
        assert later.status == {} and (later.work / "cache" / "triton" / "a" / "k.cubin").read_text() == "code"
    for part in (tmp_path / "three").glob("cache.*"):
        part.unlink()
    later = run("four")
    later.take_over(tmp_path / "three")
    later.all(steps, 1)
    assert later.status == {"compile 1": "ok"}


def test_told_to_end_it_ends_the_steps_and_keeps_their_rows(gpu: ModuleType, tmp_path: Path) -> None:
    keeps = "import signal, sys, time; signal.signal(15, lambda *_: (print('kept', flush=True), sys.exit(3)))"
    script = f"""
import sys
sys.path.insert(0, {str(ROOT / "benchmarks")!r})
import gpu
from pathlib import Path
line = (sys.executable, "-c", {keeps + "; print('begun', flush=True); time.sleep(60)"!r})
gpu.steps = lambda *_: [gpu.Step("first", line, 60, beside=True), gpu.Step("second", line, 60)]
gpu.Run.__init__.__defaults__ = (Path({str(tmp_path / "work")!r}),)
sys.exit(gpu.main())
"""
    line = [sys.executable, "-c", script, "--rehearse", "--out", str(tmp_path / "out")]
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL)
    log = tmp_path / "work" / "logs" / "first.log"
    while not log.exists() or "begun" not in log.read_text():
        assert process.poll() is None
        time.sleep(0.05)
    process.terminate()
    assert process.wait(20) == 1
    assert json.loads(packed(tmp_path / "out", "notes.json"))["status"] == {"first": "cut off", "second": "no time"}
    assert packed(tmp_path / "out", "logs/first.log") == "begun\nkept\n"


def test_killed_at_any_moment_it_goes_on(gpu: ModuleType, tmp_path: Path) -> None:
    """SIGKILL at random moments: what had ended well is there, is not done again, and the rest is."""
    log, names = tmp_path / "log", "abcdefgh"
    script = f"""
import sys
sys.path.insert(0, {str(ROOT / "benchmarks")!r})
import gpu
from pathlib import Path
gpu.identity = lambda: ["code", "device"]
step = lambda name: gpu.Step(name, (sys.executable, "-c",
    f"import time; time.sleep(0.2); open({str(log)!r}, 'a').write({{name!r}})"), 20)
gpu.steps = lambda *_: [step(name) for name in {names!r}]
gpu.Run.__init__.__defaults__ = (Path({str(tmp_path / "work")!r}),)
sys.exit(gpu.main())
"""
    chance = random.Random(1)
    out, resumed, kept = tmp_path / "0", list[str](), set[str]()
    for attempt in range(1, 9):
        line = [sys.executable, "-c", script, "--rehearse", "--out", str(out), *resumed]
        begun = len(log.read_text()) if log.exists() else 0
        process = subprocess.Popen(line, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        if attempt > 3:
            assert process.wait(120) == 0
            break
        while not log.exists() or len(log.read_text()) == begun:
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.5))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        before = log.read_text() if log.exists() else ""
        if (out / "results.tar.gz").exists():
            done = set(json.loads(packed(out, "notes.json"))["done"])
            assert kept <= done <= set(before)
            kept, resumed = done, ["--resume", str(out)]
        out = tmp_path / str(attempt)
    assert set(json.loads(packed(out, "notes.json"))["done"]) == set(log.read_text()) == set(names)
    assert len(log.read_text()) <= len(names) + 3  # again only what a kill had met at work


NCU = """==PROF== Connected
"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size","Device","CC","Section Name","Metric Name","Metric Unit","Metric Value","Rule Name"
"""  # noqa: E501


def test_hardware_counters_become_rows(gpu: ModuleType, tmp_path: Path) -> None:
    import _counters

    def lines(launch: int, duration: str, unit: str) -> str:
        head = f'"{launch}","1","python","host","a_kernel","1","7","(128, 1, 1)","(2048, 1, 1)","0","9.0","Section",'
        values = {name: ("%", "1,012.5") for name in _counters.COLUMNS} | {"Duration": (unit, duration)}
        return "".join(f'{head}"{name}","{of}","{value}",""\n' for name, (of, value) in values.items())

    run = gpu.Run(tmp_path, None, "cpu", tmp_path / "work")
    log = NCU + lines(0, "1.5", "us") + lines(1, "9", "ns")  # the second is the same launch once more
    log += lines(2, "nan", "ns").replace("a_kernel", "another") + '"3","1","python","ho'  # cut off
    (run.logs / "counters_patch_attention.log").write_text(log)
    run.counted()
    # A later run of another op, in another process, leaves these rows.
    (run.logs / "counters_patch_attention.log").rename(run.logs / "counters_mobile_to_former.log")
    run.counted()
    written = (run.results / "counters.csv").read_text()
    assert written.count("a_kernel,2048,1500.0") == 2 and "patch_attention" in written
    (row,) = _counters.rows(log)
    assert (row["kernel"], row["grid"], row["ns"], row["sm_percent"]) == ("a_kernel", 2048, 1500.0, 1012.5)
    assert _counters.rows("ncu: no such device") == []
    (step,) = [step for step in gpu.steps() if step.name == "counters patch_attention"]
    assert step.command[:3] == ("ncu", "--clock-control", "none")


@pytest.mark.skipif(not shutil.which("xz"), reason="needs xz")
def test_the_cache_travels_and_is_kept_after_every_step(gpu: ModuleType, tmp_path: Path) -> None:
    one = gpu.Run(tmp_path / "one", None, "cpu", tmp_path / "work 1")
    folder = Path(one.environment["TRITON_CACHE_DIR"])
    make = "import os, pathlib; f = pathlib.Path(os.environ['TRITON_CACHE_DIR'], '{0}'); f.mkdir(parents=True);"
    make += "(f / 'k.cubin').write_text('{0}')"
    one.all([gpu.Step(name, code(make.format(name)), 20) for name in "ab"], 1)
    parts = sorted((tmp_path / "one").glob("cache.*.tar.xz"))
    for part, name in zip(parts, "ab", strict=True):
        with tarfile.open(part) as tar:
            assert tar.getnames() == [f"triton/{name}/k.cubin"]
    two = gpu.Run(tmp_path / "two", None, "cpu", tmp_path / "work 2")
    two.unpack_cache(tmp_path / "one")
    for name in "ab":
        assert (Path(two.environment["TRITON_CACHE_DIR"]) / name / "k.cubin").read_text() == name
    assert folder != Path(two.environment["TRITON_CACHE_DIR"])
    three = gpu.Run(tmp_path / "three", None, "cpu", tmp_path / "work 3")
    three.unpack_cache(parts[0])
    assert [path.name for path in Path(three.environment["TRITON_CACHE_DIR"]).iterdir()] == ["a"]


@pytest.mark.parametrize(
    "line",
    [
        "gpu.py --rehearse --only info --cache {}",
        "precompile.py --out {}/no",
        "precompile.py --out x --processes 0",
        "precompile.py --out x --key {}/no",
    ],
)
def test_bad_usage_is_one_line(line: str, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    (tmp_path / "file").write_text("no archive")
    name, *arguments = line.format(tmp_path / "file").split()
    if name == "gpu.py":
        arguments += ["--out", str(tmp_path)]
    found = subprocess.run([sys.executable, str(ROOT / "benchmarks" / name), *arguments], cwd=tmp_path,
                           capture_output=True, text=True, check=False)  # fmt: skip
    assert found.returncode == 2 and found.stderr.count("\n") == 1, found.stderr


def test_a_change_of_the_code_is_seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from _identity import fingerprint

    seen = {fingerprint(tmp_path)}
    for name in ("mvkernels/a.py", "csrc/cpu/a.cpp", "tests/test_a.py", "benchmarks/a.py", "python/mvmodels/a.py"):
        for text in ("one", "two")[: 2 if name == "mvkernels/a.py" else 1]:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
            seen.add(fingerprint(tmp_path))
    assert len(seen) == 7
    before = fingerprint(tmp_path)
    for name in ("mvkernels/configs/some_gpu.json", "benchmarks/results/some-gpu/x.csv", "README.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    assert fingerprint(tmp_path) == before


def test_another_torch_or_triton_is_another_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import _identity

    from mvkernels import report

    monkeypatch.setattr(_identity, "fingerprint", lambda root: "the same code")
    seen = [_identity.identity()]
    monkeypatch.setattr(_identity.torch, "__version__", "9.0")
    seen.append(_identity.identity())
    monkeypatch.setattr(report.metadata, "version", lambda package: "9.0")
    seen.append(_identity.identity())

    def absent(package: str) -> str:
        raise report.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(report.metadata, "version", absent)
    seen.append(_identity.identity())
    assert len({str(each) for each in seen}) == 4


@pytest.mark.parametrize("minutes", ["0", "-1", "nan", "inf", "x"])
def test_a_time_that_is_none(
    gpu: ModuleType, minutes: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--dry-run", "--minutes", minutes])
    with pytest.raises(SystemExit) as stopped:
        gpu.main()
    assert stopped.value.code == 2 and "--minutes" in capsys.readouterr().err.splitlines()[-1]


def test_what_it_asks_triton_for_is_compiled_without_a_gpu(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    if not shutil.which("cc") or not shutil.which("xz") or not Path(sysconfig.get_path("include"), "Python.h").exists():
        pytest.skip("needs a C compiler, Python's headers and xz")
    line = [sys.executable, str(ROOT / "benchmarks" / "precompile.py"), "--out", str(tmp_path / "cache.tar.xz")]
    line += ["--processes", "1", "--only", "time patch_attention 4x60_8x8_p2 128"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    found = subprocess.run(line, capture_output=True, text=True, check=False, env=environment)
    assert (found.returncode, found.stderr) == (0, "")
    with tarfile.open(tmp_path / "cache.tar.xz") as tar:
        names = [Path(name).name for name in tar.getnames()]
    assert {"forward_packed.cubin", "backward_packed.cubin"} <= set(names)
    assert not [name for name in names if name.endswith(".so")]
