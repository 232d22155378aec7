"""Files are written whole or not at all, and one line says why not; standard output is a file like any other."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from mvkernels import files
from mvkernels.bench import plots as bench_plots
from mvkernels.commands import cli, command
from mvkernels.report import UsageError

FULL = Path("/dev/full")
full = pytest.mark.skipif(not FULL.exists(), reason="no /dev/full")
posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX")


def _save(state: dict[str, torch.Tensor], path: Path) -> None:
    with files.replacing(path) as file:
        torch.save(state, file)


def _figure(path: Path) -> None:
    plt = bench_plots.pyplot()
    figure, axis = plt.subplots(figsize=(12, 12))
    axis.imshow(torch.rand(400, 400).numpy())
    bench_plots.save(figure, path)


def _by_name(path: Path) -> None:
    with files.replacing_all(path) as place:
        place.write_bytes(b"x" * 400_000)
        place.with_suffix(".bin").write_bytes(b"y" * 400_000)


# Each writes a few hundred kilobytes in its own way.
WRITERS = {
    "text": lambda path: files.write(path, "x" * 400_000),
    "csv": lambda path: files.write_csv(path, ["a", "b"], [{"a": i} for i in range(100_000)]),
    "torch.save": lambda path: _save({"a": torch.randn(50_000), "b": torch.randn(50_000)}, path),
    "a figure": lambda path: _figure(path.with_suffix(".png")),
    "a folder's file": _by_name,
}


@pytest.fixture
def small_files():
    """A limit on the size of files, which fails in the middle as a full disk does, and needs no disk of its own."""
    resource = pytest.importorskip("resource")
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@posix
@pytest.mark.parametrize("writer", WRITERS)
def test_what_cannot_be_written_whole_leaves_the_old_file_and_nothing_else(tmp_path, small_files, writer):
    if writer == "a figure":
        pytest.importorskip("matplotlib")
    for there in (tmp_path / "file.pt", tmp_path / "file.png"):
        there.write_text("old")
    with pytest.raises(UsageError, match=r"file\.(pt|png) cannot be written: File too large$"):
        WRITERS[writer](tmp_path / "file.pt")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"file.pt": "old", "file.png": "old"}


@pytest.mark.core
@pytest.mark.parametrize("writer", WRITERS)
def test_what_is_written_replaces_the_old_file(tmp_path, writer):
    if writer == "a figure":
        pytest.importorskip("matplotlib")
    for _ in range(2):  # the folder is made, and the second time the file is there
        WRITERS[writer](tmp_path / "new" / "file.pt")
    names = sorted(path.name for path in (tmp_path / "new").iterdir())
    assert names == {"a figure": ["file.png"], "a folder's file": ["file.bin", "file.pt"]}.get(writer, ["file.pt"])


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, UsageError])
@pytest.mark.parametrize("way", [files.replacing, files.replacing_all])
def test_other_errors_pass_and_leave_nothing(tmp_path, way, error):
    """A fault of the writer is no fault of the disk: only what comes of the system's error is told as one."""
    with pytest.raises(error, match="mine"), way(tmp_path / "file"):
        raise error("mine")
    assert list(tmp_path.iterdir()) == []


def test_the_folder_goes_meanwhile(tmp_path):
    folder = tmp_path / "folder"
    with pytest.raises(UsageError, match="file cannot be written: No such file"), files.replacing(folder / "file") as f:
        f.write(b"x")
        for part in folder.iterdir():
            part.unlink()
        folder.rmdir()
    assert list(tmp_path.iterdir()) == []


def test_many_at_once_write_whole_files(tmp_path):
    path, wrong = tmp_path / "file", []

    def write(letter: str) -> None:
        for _ in range(20):
            files.write(path, letter * 10_000)
            text = path.read_text()
            if len(text) != 10_000 or len({*text}) != 1:
                wrong.append(text)

    threads = [threading.Thread(target=write, args=(letter,)) for letter in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and [p.name for p in tmp_path.iterdir()] == ["file"]


@posix
def test_rights_links_and_devices_are_kept(tmp_path):
    real, link = tmp_path / "real", tmp_path / "elsewhere" / "link"
    link.parent.mkdir()
    link.symlink_to(real)
    before = os.umask(0o027)
    try:
        files.write(link, "a")
    finally:
        os.umask(before)
    assert link.is_symlink() and real.read_text() == "a" and stat.S_IMODE(real.stat().st_mode) == 0o640
    real.chmod(0o604)
    files.write(link, "b")
    assert real.read_text() == "b" and stat.S_IMODE(real.stat().st_mode) == 0o604
    files.write("/dev/null", "c")
    files.check("/dev/null")
    assert not Path("/dev/null").is_file()
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    files.write(pipe, "d")
    assert os.read(read, 9) == b"d" and pipe.is_fifo()
    os.close(read)


def test_parts_of_killed_processes_go_and_those_of_others_stay(tmp_path):
    def part(name: str, age: float) -> Path:
        path = tmp_path / name
        path.touch()
        os.utime(path, (time.time() - age,) * 2)
        return path

    dead = part(".a[1].csv.0123abcd.part", 3600)
    alive, other = part(".a[1].csv.4567abcd.part", 5), part(".b.csv.0123abcd.part", 3600)
    files.write(tmp_path / "a[1].csv", "new")
    assert not dead.exists() and alive.exists() and other.exists()
    files.remove_parts(tmp_path / "a[1].csv", after=0)
    assert not alive.exists() and other.exists()


@pytest.mark.parametrize("name", ["x" * 250 + ".csv", "ß" * 120])
def test_long_names(tmp_path, name):
    files.check(tmp_path / name)
    files.write(tmp_path / name, "a")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_check_changes_nothing(tmp_path):
    (tmp_path / "there").write_text("a")
    for name in ("there", "new"):
        files.check(tmp_path / name)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"there": "a"}
    with pytest.raises(UsageError, match="cannot be written: Is a directory"):
        files.check(tmp_path)
    with pytest.raises(UsageError, match=r"cannot be written: (File exists|Not a directory)"):
        files.check(tmp_path / "there" / "below")


# Standard output


def _closed_pipe():
    read, write = os.pipe()
    os.close(read)
    return os.fdopen(write, "w")


OUTPUTS = {"full": (lambda: FULL.open("w"), 2), "closed pipe": (_closed_pipe, 141)}
VERIFY = "verify --op relu_linear_attention --backend reference --dtype float32"
RESULTS = Path(__file__).resolve().parents[1] / "benchmarks/results/intel-xeon-2.50ghz-avx512"
COMMANDS = [
    *("--help", "info", "info --json", "bench --help", "tune --help", VERIFY),
    f"bench --allocator default --read {RESULTS}/patch_attention.csv",
    "bench --allocator default --html .",
]


@posix
@full
@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("line", COMMANDS)
def test_an_output_that_fails_is_one_line(tmp_path, monkeypatch, capsys, line, output):
    monkeypatch.chdir(tmp_path)
    Path("a.csv").write_text("a,b\n1,2\n")
    make, wanted = OUTPUTS[output]
    with make() as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        try:
            status = cli.main(line.split())
        except SystemExit as exit:
            status = exit.code
    err = capsys.readouterr().err
    assert status == wanted
    prog = "mvkernels" if line == "--help" else f"mvkernels {line.split()[0]}"
    said = f"{prog}: standard output cannot be written: No space left on device\n"
    assert err == (said if output == "full" else "")


@posix
@full
@pytest.mark.parametrize("shell, status, lines", [("> /dev/full", 2, 1), ("| true; exit ${PIPESTATUS[0]}", 141, 0)])
def test_python_has_nothing_to_add_at_exit(shell, status, lines):
    said = f"\"$0\" -c '{_SAY}' {shell}"
    found = subprocess.run(
        ["bash", "-c", said, sys.executable], capture_output=True, text=True, timeout=60, check=False
    )
    assert found.returncode == status and found.stderr.count("\n") == lines, found.stderr


_SAY = """
import sys, time
from mvkernels.commands.command import run
def say():
    time.sleep(0.2)
    print("x" * 10)
    return 0
sys.exit(run("say", say))
"""


@full
@pytest.mark.parametrize(
    "error, status, said",
    [
        (UsageError("bad"), 2, "prog: bad\n"),
        (OSError(28, "No space left on device", "file"), 2, "prog: file: No space left on device\n"),
        (KeyboardInterrupt(), 130, "\nprog: interrupted\n"),
    ],
)
def test_an_error_is_told_beside_an_output_that_fails(monkeypatch, capsys, error, status, said):
    def failing() -> int:
        print("half a line")
        raise error

    with FULL.open("w") as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        assert command.run("prog", failing) == status
    assert capsys.readouterr().err == said


@full
def test_a_full_stderr_leaves_the_status(monkeypatch):
    def failing() -> int:
        raise UsageError("bad")

    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", FULL.open("w", buffering=1))
        assert command.run("prog", failing) == 2


def test_no_output_at_all(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    assert cli.main(["info", "--json"]) == 0


def test_text_that_standard_output_has_no_letters_for_is_told_in_one_line():
    script = "from mvkernels.commands.command import run; raise SystemExit(run('show', lambda: print('caf\\u00e9')))"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and "standard output cannot be written" in done.stderr
