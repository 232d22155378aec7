"""What compiles csrc/cuda for the package, with a compiler that writes down how it is called."""

from __future__ import annotations

import json
import lzma
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mvkernels.cuda import modules
from tests.ptx.nvcc import compiler

FAKE = """#!{python}
import sys
if "--version" in sys.argv:
    print("nvcc: NVIDIA\\nCuda compilation tools, release 1.0, V1.0.{version}")
    sys.exit()
open({log!r}, "a").write(" ".join(sys.argv[1:]) + chr(10))
if {fails}:
    print("error: expected a ;", file=sys.stderr)
    sys.exit(2)
open(sys.argv[sys.argv.index("-o") + 1], "w").write(" ".join(sys.argv[1:3]) * {times})
"""


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of sources, and a compiler."""
    sources = tmp_path / "sources"
    for name in ("one/first.cu", "one/second.cu", "two/third.cu", "common/shared.cuh"):
        (sources / name).parent.mkdir(parents=True, exist_ok=True)
        (sources / name).write_text(f"// {name}\n")
    monkeypatch.setattr(compiler, "HERE", sources)
    write_compiler(tmp_path)
    monkeypatch.setenv("NVCC", str(tmp_path / "nvcc"))
    return tmp_path


def write_compiler(folder: Path, version: int = 1, fails: bool = False, times: int = 1) -> None:
    text = FAKE.format(python=sys.executable, version=version, log=str(folder / "log"), fails=fails, times=times)
    (folder / "nvcc").write_text(text)
    (folder / "nvcc").chmod(0o755)


def calls(tree: Path) -> int:
    log = tree / "log"
    return len(log.read_text().splitlines()) if log.exists() else 0


def test_every_file_for_every_target(tree: Path) -> None:
    data = tree / "data"
    files = compiler.build(data, 2)
    modules_of = {"one.first", "one.second", "two.third"}
    assert set(files) == {f"{name}.{target}.xz" for name in modules_of for target in compiler.TARGETS}
    assert lzma.decompress((data / "two.third.sm_90a.xz").read_bytes()) == b"-cubin -arch=sm_90a"
    assert lzma.decompress((data / "one.first.compute_80.xz").read_bytes()) == b"-ptx -arch=compute_80\n"
    manifest = json.loads((data / "manifest.json").read_text())
    assert manifest["nvcc"].endswith("V1.0.1") and manifest["files"] == files
    # Each target that a device may ask for is there.
    assert {modules.target_of(major, 0) for major in range(8, 13)} == set(compiler.TARGETS)


def test_only_what_has_changed_is_compiled_again(tree: Path) -> None:
    data = tree / "data"
    compiler.build(data, 2)
    assert calls(tree) == 12
    compiler.build(data, 2)
    assert calls(tree) == 12
    header = tree / "sources" / "common" / "shared.cuh"
    header.write_text("// other\n")
    compiler.build(data, 2)
    assert calls(tree) == 24
    write_compiler(tree, version=2)
    (tree / "sources" / "two" / "third.cu").unlink()
    compiler.build(data, 2)
    assert calls(tree) == 32
    assert not list(data.glob("two.*")), "of a file that is gone nothing is left"


def test_what_does_not_compile_is_said_and_nothing_counts_as_built(tree: Path) -> None:
    write_compiler(tree, fails=True)
    with pytest.raises(RuntimeError, match=r"\.cu for \w+:\nerror: expected a ;"):
        compiler.build(tree / "data", 2)
    assert not (tree / "data" / "manifest.json").exists()


def test_ptx_is_packed_without_what_the_driver_has_no_use_for() -> None:
    given = b"// made by nvcc\n.version 8.7\n\n{\n\t// begin inline asm\n\tmov.u32 \t%r1, 0;\n}\n"
    assert compiler._bare(given) == b".version 8.7\n{\nmov.u32 \t%r1, 0;\n}\n"


def test_the_package_does_not_grow_without_bound(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert compiler.MOST_BYTES == 4_000_000
    monkeypatch.setattr(compiler, "MOST_BYTES", 100)
    with pytest.raises(RuntimeError, match="more than the package is to grow by, 100"):
        compiler.build(tree / "data", 1)
    assert not (tree / "data" / "manifest.json").exists()


def test_without_a_compiler(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVCC", "/nonexistent/nvcc")
    script = Path(compiler.__file__)
    done = subprocess.run(
        [sys.executable, str(script), "--output", str(tree / "data")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert re.fullmatch(r"compile.py: no nvcc: looked for /nonexistent/nvcc\n", done.stderr)


def test_what_is_of_other_sources_is_removed_where_it_cannot_be_made_again(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tree / "data"
    compiler.build(data, 2)
    monkeypatch.setenv("NVCC", "/nonexistent/nvcc")
    monkeypatch.setattr(sys, "argv", ["compile.py", "--output", str(data)])
    assert compiler.main() == 1
    assert compiler.state_of(data) == compiler.state()
    (tree / "sources" / "two" / "third.cu").write_text("// other\n")
    assert compiler.main() == 1
    assert compiler.state_of(data) is None and not list(data.iterdir())


def test_a_compiler_that_does_not_run_leaves_nothing_of_other_sources(
    tree: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tree / "data"
    data.mkdir()
    monkeypatch.setattr(sys, "argv", ["compile.py", "--output", str(data)])
    for text in ("#!/bin/sh\nexit 127\n", "", "#!/bin/sh\necho of nothing\n"):
        (data / "manifest.json").write_text('{"state": "other", "files": {}}')
        (data / "one.first.sm_80.xz").touch()
        (tree / "nvcc").write_text(text)
        assert compiler.main() == 1
        assert not list(data.iterdir()) and "Traceback" not in capsys.readouterr().err
    write_compiler(tree)
    (data / "manifest.json").write_text('{"state": "trunc')
    assert compiler.main() == 0


def test_a_compiler_of_nvidias_packages_is_found(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packages = tree / "site-packages" / "nvidia" / "cu13" / "bin"
    packages.mkdir(parents=True)
    (packages / "nvcc").write_text("#!/bin/sh\n")
    (packages / "nvcc").chmod(0o755)
    for name in ("NVCC", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "path", [str(tree / "site-packages")])
    assert compiler.nvcc() == str(packages / "nvcc")
