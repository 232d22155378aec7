"""What a built wheel is called, and what is in it."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from mvkernels.dispatch import extension
from mvkernels.version import __version__

pytest.importorskip("setuptools", minversion="77")
from setuptools import Distribution, Extension

ROOT = Path(__file__).resolve().parents[1]
PURE = f"mvkernels-{__version__}-py3-none-any.whl"
# Compiles in a moment, and stands for the kernels: no test loads it.
MODULE = 'extern "C" void* PyInit__C() { return nullptr; }\n'

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="not a checkout")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What the build reads, with a small package and a small extension."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "mvkernels/version.py", "mvkernels/__main__.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "mvkernels" / "__init__.py").touch()
    (tmp_path / "python" / "mvmodels").mkdir(parents=True)
    (tmp_path / "python" / "mvmodels" / "__init__.py").touch()
    (tmp_path / "csrc" / "cpu").mkdir(parents=True)
    (tmp_path / "csrc" / "cpu" / "register.cpp").write_text(MODULE)
    for host in ("onnxruntime", "executorch"):
        (tmp_path / "csrc" / host).mkdir()
        (tmp_path / "csrc" / host / "register.cpp").touch()
    return tmp_path


def build(checkout: Path, command: str = "bdist_wheel", **environment: str) -> str:
    """The file that is new in dist, by name."""
    dist = checkout / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MVKERNELS_")}
    subprocess.run(
        [sys.executable, "setup.py", "-q", command, "--dist-dir", "dist"],
        cwd=checkout, env={**kept, **environment}, check=True, capture_output=True, timeout=300,
    )  # fmt: skip
    (found,) = dist.iterdir()
    return found.name


def contents(checkout: Path, wheel: str) -> tuple[list[str], str]:
    """The compiled files of a wheel, and its file WHEEL."""
    with zipfile.ZipFile(checkout / "dist" / wheel) as files:
        names = files.namelist()
        about = next(name for name in names if name.endswith(".dist-info/WHEEL"))
        assert "mvkernels/__main__.py" in names and "mvmodels/__init__.py" in names
        return [name for name in names if name.endswith((".so", ".pyd"))], files.read(about).decode()


def test_kernels_in_cuda_are_data_of_every_wheel(checkout: Path) -> None:
    """With a compiler that only says yes."""
    (checkout / "csrc" / "cuda" / "one").mkdir(parents=True)
    shutil.copy(ROOT / "csrc" / "cuda" / "compile.py", checkout / "csrc" / "cuda")
    (checkout / "csrc" / "cuda" / "one" / "first.cu").touch()
    compiler = checkout / "nvcc"
    loop = 'while [ $# -gt 1 ]; do [ "$1" = -o ] && echo code > "$2"; shift; done'
    compiler.write_text(f"#!/bin/sh\n{loop}\necho release 1.0\n")
    compiler.chmod(0o755)
    skip = {"MVKERNELS_SKIP_EXT": "1", "NVCC": str(compiler)}
    wanted = {f"mvkernels/cuda/data/one.first.{each}.xz" for each in ("sm_80", "sm_90a", "sm_100", "compute_80")}
    wanted.add("mvkernels/cuda/data/manifest.json")

    def shipped() -> set[str]:
        with zipfile.ZipFile(checkout / "dist" / PURE) as files:
            return {name for name in files.namelist() if "cuda/data" in name}

    assert build(checkout, MVKERNELS_REQUIRE_CUDA="1", **skip) == PURE and shipped() == wanted
    # What was compiled elsewhere of these sources is shipped without a compiler; wheels are built so.
    assert build(checkout, **skip | {"NVCC": "/nonexistent"}) == PURE and shipped() == wanted
    # Of other sources than these nothing is left over from before.
    (checkout / "csrc" / "cuda" / "one" / "first.cu").write_text("// other")
    assert build(checkout, **skip | {"NVCC": "/nonexistent"}) == PURE and not shipped()
    with pytest.raises(subprocess.CalledProcessError):
        build(checkout, MVKERNELS_REQUIRE_CUDA="1", **skip | {"NVCC": "/nonexistent"})
    assert build(checkout, MVKERNELS_SKIP_CUDA="1", **skip) == PURE and not shipped()


@pytest.mark.parametrize(
    "environment",
    [{"MVKERNELS_SKIP_EXT": "1"}, {"CC": "/nonexistent", "CXX": "/nonexistent"}, {"CC": "false", "CXX": "false"}],
    ids=["skipped", "no compiler", "a compiler that fails"],
)
def test_a_wheel_without_kernels_says_so(checkout: Path, environment: dict[str, str]) -> None:
    # What an editable install leaves in the package is no part of a wheel.
    for left in ("_C.abi3.so", "libmvkernels_onnxruntime.so", "libmvkernels_executorch.so"):
        (checkout / "mvkernels" / left).touch()
    assert build(checkout, **environment) == PURE
    compiled, about = contents(checkout, PURE)
    assert compiled == [] and "Root-Is-Purelib: true" in about and "Tag: py3-none-any" in about


@pytest.mark.core
@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("c++"), reason="needs a compiler")
def test_a_wheel_with_kernels_says_so_and_leaves_none_behind(checkout: Path) -> None:
    name = build(checkout, MVKERNELS_REQUIRE_EXT="1", MVKERNELS_SKIP_EXECUTORCH="1")
    assert name.startswith(f"mvkernels-{__version__}-cp310-abi3-linux_")
    compiled, about = contents(checkout, name)
    assert (
        compiled == ["mvkernels/_C.abi3.so", "mvkernels/libmvkernels_onnxruntime.so"]
        and "Root-Is-Purelib: false" in about
    )
    # A later build in the same folder that fails does not ship the kernels of this one.
    (checkout / "csrc" / "cpu" / "register.cpp").write_text("#error\n")
    assert build(checkout) == PURE
    assert contents(checkout, PURE)[0] == []


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("c++"), reason="needs a compiler")
def test_kernels_for_executorch_are_built_where_it_is(checkout: Path) -> None:
    """With a package that has no more than a build looks for."""
    package = checkout / "elsewhere" / "executorch"
    (package / "include" / "executorch").mkdir(parents=True)
    (package / "lib").mkdir()
    for library in ("libexecutorch.so", "libexecutorch_threadpool.so"):
        command = ["c++", "-shared", "-x", "c++", os.devnull, "-o", str(package / "lib" / library)]
        subprocess.run(command, check=True)
    about = package.parent / "executorch-9.8.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: executorch\nVersion: 9.8\n")
    source = checkout / "csrc" / "executorch" / "register.cpp"
    source.write_text('extern "C" const char* version() { return MVK_EXECUTORCH; }\n')
    here = {"PYTHONPATH": str(package.parent)}
    name, library = build(checkout, MVKERNELS_REQUIRE_EXT="1", **here), "mvkernels/libmvkernels_executorch.so"
    assert library in contents(checkout, name)[0]
    with zipfile.ZipFile(checkout / "dist" / name) as files:
        assert b"9.8\0" in files.read(library)
    # Headers of another version: everything else is built, and what was built before is not shipped.
    source.write_text("#error\n")
    assert contents(checkout, build(checkout, **here))[0] == [
        "mvkernels/_C.abi3.so",
        "mvkernels/libmvkernels_onnxruntime.so",
    ]
    with pytest.raises(subprocess.CalledProcessError):
        build(checkout, MVKERNELS_REQUIRE_EXT="1", **here)


def test_a_source_distribution_is_called_the_same(checkout: Path) -> None:
    assert build(checkout, "sdist", CC="false", CXX="false") == f"mvkernels-{__version__}.tar.gz"


def test_the_instruction_sets_that_are_built(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    names = runpy.run_path(str(ROOT / "setup.py"))
    sets = names["ISA_FLAGS"].get(names["MACHINE"], {"baseline": []})
    chosen, first, best = names["chosen"], next(iter(sets)), list(sets)[-1]
    assert chosen(sets, "all") == list(sets)
    assert chosen(sets, best) == list(dict.fromkeys((first, best)))
    assert chosen(sets, f"{first}, {best}") == chosen(sets, best)
    for wrong in ("avx9", "AVX2", f"native,{first}", ",", " "):
        with pytest.raises(SystemExit, match=r"no '.*', want 'all', 'native' or some of"):
            chosen(sets, wrong)
    here = chosen(sets, "")
    assert here and chosen(sets, "native") == here[-1:]
    if extension.module is None:
        pytest.skip("which this processor has, only the extension can say")
    assert set(extension.module.instruction_sets()) <= set(here)


def test_without_a_list_of_what_the_processor_has_all_are_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    names = runpy.run_path(str(ROOT / "setup.py"))

    def missing(self: Path, *_: object) -> str:
        raise OSError(self)

    monkeypatch.setattr(Path, "read_text", missing)
    for wanted in ("", "native"):
        assert names["chosen"](names["ISA_FLAGS"]["x86_64"], wanted) == ["baseline", "avx2", "avx512"]


@pytest.mark.parametrize("system", ["Darwin", "Linux"])
def test_flags_and_libraries_are_those_of_the_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, system: str
) -> None:
    """On macOS clang warns of flags that it does not use, and torch is not linked by a name with a path in it."""
    if tuple(map(int, torch.__version__.split(".")[:2])) < extension.MINIMUM_TORCH:
        pytest.skip(extension.reason)
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    monkeypatch.setattr("platform.system", lambda: system)
    names = runpy.run_path(str(ROOT / "setup.py"))
    monkeypatch.undo()
    calls: list[tuple[str, dict[str, Any]]] = []

    class Compiler:
        compiler_cxx = (sys.executable,)

        def compile(self, sources: list[str], output: str, **options: Any) -> list[str]:
            calls.append(("compile", options))
            return [f"{output}/{source}.o" for source in sources]

        def link_shared_object(self, objects: list[str], path: str, **options: Any) -> None:
            calls.append(("link", {"path": path, "objects": objects, **options}))

    command = names["BuildExtension"](Distribution())
    command.build_temp, command.compiler = str(tmp_path), Compiler()
    monkeypatch.setattr(command, "get_ext_fullpath", lambda name: name)
    command.build_extension(Extension("mvkernels._C", []))
    linked, *others = (options for what, options in calls if what == "link")
    kernels = [unit for unit in linked["objects"] if "register" not in unit]
    assert len(kernels) >= len(names["KERNELS"])
    plt = {"-fno-plt" in options["extra_postargs"] for what, options in calls if what == "compile"}
    assert plt == {system != "Darwin"}
    assert linked.get("libraries", []) == ([] if system == "Darwin" else ["torch_cpu"])
    assert linked.get("extra_postargs", []) == (["-Wl,-undefined,dynamic_lookup"] if system == "Darwin" else [])
    (alone,) = (options for options in others if "onnxruntime" in options["path"])  # neither torch nor Python
    assert set(kernels) < set(alone["objects"]) and not alone.get("libraries") and not alone.get("extra_postargs")
