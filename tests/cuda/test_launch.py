"""Launches: what the driver is given, what is loaded when, and which of the compiled files a device takes."""

from __future__ import annotations

import json
import lzma
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from mvkernels.cuda import modules
from mvkernels.cuda.driver import Arguments, Driver, DriverError
from mvkernels.cuda.launch import Launch
from tests.ptx.nvcc import compiler

MODULE = "folder/name"


class Recorder(Driver):
    """A driver that keeps what it is asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.depth = 0

    def version(self) -> int:
        return 13010

    def enter(self, device: int) -> None:
        self.asked.append(("enter", device))

    @contextmanager
    def relaxed(self) -> Iterator[None]:
        self.depth += 1
        yield
        self.depth -= 1

    def load(self, image: bytes) -> int:
        assert self.depth == 1, "loading would end a capture"
        self.asked.append(("load", image))
        return len(self.asked)

    def function(self, module: int, name: str) -> int:
        return hash((module, name))

    def allow_shared(self, function: int, shared_bytes: int) -> None:
        self.asked.append(("allow", shared_bytes))

    def launch(
        self, function: int, grid: int, threads: int, shared_bytes: int, stream: int, arguments: Arguments
    ) -> None:
        self.asked.append(("launch", grid, threads, shared_bytes, stream, bytes(arguments.buffer)))


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Recorder:
    """Devices of compute capability 9.0, and data for them."""
    found = Recorder()
    monkeypatch.setattr(modules, "driver", lambda: found)
    monkeypatch.setattr(modules, "DATA", tmp_path)
    monkeypatch.setattr(modules, "_loaded", {})
    monkeypatch.setattr(modules, "_allowed", {})
    monkeypatch.setattr(modules, "_thread", threading.local())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 70 + device, raising=False)
    (tmp_path / "folder.name.sm_90a.xz").write_bytes(lzma.compress(b"cubin"))
    return found


def launch(shared_bytes: int = 0, kernel: str = "kernel") -> Launch:
    return Launch(MODULE, kernel, 9, 128, shared_bytes, ("x", "y"), (-(2**40),), (3, -4), ("scale",))


def test_arguments_lie_as_the_parameters(driver: Recorder) -> None:
    tensors = {name: torch.empty(1) for name in "xy"}
    launch(1000)(tensors, {"scale": 0.5})
    packed = struct.pack("<QQqiif", tensors["x"].data_ptr(), tensors["y"].data_ptr(), -(2**40), 3, -4, 0.5)
    assert driver.asked == [("enter", 0), ("load", b"cubin\0"), ("launch", 9, 128, 1000, 70, packed)]


def test_a_file_is_loaded_once_a_device(driver: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {name: torch.empty(1) for name in "xy"}
    one, other = launch(), launch(kernel="other")
    for device in (0, 1, 0):
        monkeypatch.setattr(torch.cuda, "current_device", lambda device=device: device)
        one(tensors, {"scale": 1.0})
        other(tensors, {"scale": 1.0})
    kinds = [each[0] for each in driver.asked]
    assert kinds.count("load") == 2 and kinds.count("launch") == 6
    assert [each[4] for each in driver.asked if each[0] == "launch"] == [70, 70, 71, 71, 70, 70]


def test_a_thread_has_a_context_before_its_first_launch(driver: Recorder) -> None:
    tensors = {name: torch.empty(1) for name in "xy"}
    one = launch()
    one(tensors, {"scale": 1.0})
    for _ in range(2):
        thread = threading.Thread(target=lambda: [one(tensors, {"scale": 1.0}) for _ in range(2)])
        thread.start()
        thread.join()
    assert [each[0] for each in driver.asked] == ["enter", "load", "launch", *["enter", "launch", "launch"] * 2]


def test_shared_memory_is_asked_for_and_never_taken_back(driver: Recorder) -> None:
    tensors = {name: torch.empty(1) for name in "xy"}
    for amount in (48 << 10, 100 << 10, 60 << 10, 120 << 10):
        launch(amount)(tensors, {"scale": 1.0})
    assert [each for each in driver.asked if each[0] == "allow"] == [("allow", 100 << 10), ("allow", 120 << 10)]


@pytest.mark.parametrize(
    ("capability", "target"),
    [((8, 0), "sm_80"), ((8, 9), "sm_80"), ((9, 0), "sm_90a"), ((10, 3), "sm_100"), ((12, 0), "compute_80")],
)
def test_a_device_takes_code_that_it_can_run(capability: tuple[int, int], target: str) -> None:
    assert modules.target_of(*capability) == target


def test_reasons_against(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    on_gpu = torch.empty(0, device="meta")
    monkeypatch.setattr(torch.Tensor, "device", torch.device("cuda:0"))
    monkeypatch.setattr(modules, "DATA", tmp_path)
    monkeypatch.setattr(modules, "driver", lambda: DriverError("no CUDA driver: not found"))

    def reason(capability: tuple[int, int]) -> str | None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        modules._why_not_on.cache_clear()
        modules.manifest.cache_clear()
        modules.why_not_compiled.cache_clear()
        return modules.why_not(on_gpu)

    try:
        assert "want 8.0" in str(reason((7, 5)))
        assert "make cuda" in str(reason((9, 0)))
        (tmp_path / "manifest.json").write_text(json.dumps({"nvcc": "13.0", "state": "of older sources"}))
        assert "not those of this checkout" in str(reason((9, 0)))
        (tmp_path / "manifest.json").write_text(json.dumps({"cuda": "13.0", "state": compiler.state()}))
        assert reason((9, 0)) == "no CUDA driver: not found"
        monkeypatch.setattr(modules, "driver", Recorder)
        assert reason((9, 0)) is None
        monkeypatch.setattr(Recorder, "version", lambda self: 12080)
        assert reason((9, 0)) == "the driver is one for CUDA 12.8: the kernels want 13.0"
        monkeypatch.setattr(torch.version, "hip", "6.0")
        assert "NVIDIA" in str(reason((9, 0)))
    finally:
        modules._why_not_on.cache_clear()
        modules.manifest.cache_clear()
        modules.why_not_compiled.cache_clear()


def test_cpu_tensors_are_refused() -> None:
    assert modules.why_not(torch.empty(1)) == "the CUDA kernels run on CUDA tensors, but these tensors are on cpu"
