"""Loading and launching by both ways to the driver, on a driver that writes down what it is asked for."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

HERE = Path(__file__).parent
LOADED = ["retain 1", "current 0x101", "capture 2", "load image", "function 0x200 add", "capture 0"]
LAUNCHED = "launch 0x300 grid 5 1 1 block 128 1 1 shared 100000 stream 0x7 arguments 0102030405060708ffffffff"
BEGIN = """
import sys
from mvkernels.cuda import driver as driver_
driver = driver_.driver()
"""
LOAD = """
driver.enter(1)
with driver.relaxed():
    function = driver.function(driver.load(b"image\\0"), "add")
"""
LAUNCH = """
arguments = driver_.Arguments.of(bytes([1, 2, 3, 4, 5, 6, 7, 8, 255, 255, 255, 255]))
driver.launch(function, 5, 128, 100000, 7, arguments)
"""
KINDS = ("Driver", "Bindings")


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a libcuda."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    folder = tmp_path_factory.mktemp("driver")
    library = folder / "libcuda.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(library), str(HERE / "driver.c"), "-ldl"], check=True)
    return folder


def run(fake: Path, kind: str, code: str, fails: str = "") -> tuple[str, list[str]]:
    """(what the code prints, what the driver was asked for)."""
    if kind == "Bindings":
        pytest.importorskip("cuda.bindings")
    # A module that hides the package, where ctypes is to be taken.
    hide = "" if kind == "Bindings" else "import sys; sys.modules['cuda'] = None\n"
    log = fake / f"{kind}-{abs(hash((code, fails)))}.log"
    log.write_text("")
    environment = os.environ | {"LD_LIBRARY_PATH": str(fake), "FAKE_DRIVER_LOG": str(log), "FAKE_DRIVER_FAILS": fails}
    code = f"{hide}{BEGIN}assert type(driver).__name__ == {kind!r}, driver\n{code}"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip(), log.read_text().splitlines()


def caught(code: str) -> str:
    """The code, with a refusal printed."""
    return f"try:\n{textwrap.indent(code, '    ')}\nexcept driver_.DriverError as error:\n    print(error)\n"


@pytest.mark.parametrize("kind", KINDS)
def test_a_kernel_is_loaded_and_launched(fake: Path, kind: str) -> None:
    code = LOAD + "driver.allow_shared(function, 100000)\n" + LAUNCH
    assert run(fake, kind, code) == ("", [*LOADED, "attribute 0x300 8 100000", LAUNCHED])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["cuModuleLoadData", "cuModuleGetFunction", "cuDevicePrimaryCtxRetain"])
def test_what_the_driver_refuses_is_said(fake: Path, kind: str, name: str) -> None:
    said, asked = run(fake, kind, caught(LOAD), fails=name)
    assert said == f"{name}: invalid argument (1)"
    # What was changed for the thread is put back.
    assert asked.count("capture 2") == asked.count("capture 0")


@pytest.mark.parametrize("kind", KINDS)
def test_a_launch_that_fails_is_an_error(fake: Path, kind: str) -> None:
    code = (
        f"{LOAD}try:\n    {LAUNCH.strip().replace(chr(10), chr(10) + '    ')}\nexcept driver_.DriverError as error:\n"
    )
    said, _ = run(fake, kind, code + "    print(error)", fails="cuLaunchKernel")
    assert said == "cuLaunchKernel: invalid argument (1)"


def test_without_a_driver_the_reason_is_kept(tmp_path: Path) -> None:
    if Path("/dev/nvidiactl").exists():
        pytest.skip("there is a driver")
    done = subprocess.run(
        [sys.executable, "-c", BEGIN + "print(type(driver).__name__, driver)"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.startswith("DriverError no CUDA driver: libcuda.so.1")
