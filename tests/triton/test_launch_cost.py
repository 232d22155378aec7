"""Kernel launches over a libcuda that does nothing (fake_cuda): what reaches the launcher, and what it costs."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.triton.fake_cuda.driver import build

pytest.importorskip("triton")
pytestmark = pytest.mark.slow
FAKE = Path(__file__).parent / "fake_cuda"
ROOT = FAKE.parents[2]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What fake_cuda/launches.py prints."""
    triton_launch = pytest.importorskip("mvkernels.triton.repeated")
    if triton_launch._CUDA_LAUNCHER is None:
        pytest.skip("compiled kernels are not kept with this version of Triton, or without its CUDA backend")
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))), None)
    if compiler is None or not Path(sysconfig.get_path("include"), "Python.h").exists():
        pytest.skip("no C compiler, or not Python's headers: Triton builds its launchers with them")
    folder = tmp_path_factory.mktemp("fake_cuda")
    fake = build(folder, compiler)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = [str(ROOT), str(ROOT / "python"), *filter(None, [environment.get("PYTHONPATH")])]
    environment |= fake | {"PYTHONPATH": os.pathsep.join(paths), "TRITON_CACHE_DIR": str(folder / "cache")}
    done = subprocess.run(
        [sys.executable, FAKE / "launches.py"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_launch_again_passes_what_triton_would(found):
    assert found["differences"].keys() == found["calls"].keys()
    for name, each in found["differences"].items():
        assert each == [[]] * len(each), name
    assert set(found["new tensors"].values()) == {0}  # calls that allocate their outputs


def test_a_misaligned_pointer_has_its_own_kernel(found):
    assert found["misaligned"] == {"taken": [1, 0, 0], "own": True, "differences": []}


def test_another_dtype_has_its_own_kernel(found):
    assert found["dtype"] == [1, 0, 0]


def test_an_int_for_a_float_is_tritons_to_judge(found):
    assert found["int for a float"] == [1, 1]


def test_another_device_has_its_own_kernel_and_stream(found):
    assert found["device"] == {"taken": [1, 0, 0], "own": True, "streams": [101, 100]}


def test_hooks_take_tritons_path(found):
    assert found["hooks"] == {"launch_enter_hook": [1, 1], "launch_exit_hook": [1, 2], "afterwards": [0, 2]}


def test_a_change_that_triton_sees_takes_its_path(found):
    assert found["changes"] == {
        "debug": [1, 0],
        "debug again off": [0],
        "caches emptied": [1, 0],
        "source": [1, 0],
        "source again": [1, 0],
        "pre-run hook": [1, 1],
        "no pre-run hook": [0],
    }
    assert "has changed since we compiled this kernel" in found["global"]


def test_a_launch_costs_little(found):
    """Far from what it takes on an idle machine: 6 to 9 us, of Triton's 26 to 48."""
    assert found["launch"]["arguments"] > 50
    assert found["launch"]["us"] < 15
    assert found["calls"]["patch_attention"] < 40  # a forward: its look-up, allocation and launch
    assert found["launch"]["us"] < 0.7 * found["launch"]["triton_us"]
