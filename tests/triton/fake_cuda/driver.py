"""CUDA without a GPU: a libcuda that does nothing, and Triton's driver over it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_name("libcuda.c")


def build(folder: Path, compiler: str) -> dict[str, str]:
    """Compile it into a folder; the environment in which Triton and the loader find it there."""
    library = folder / "libcuda.so.1"
    line = [compiler, "-shared", "-fPIC", "-w", "-Wl,-soname,libcuda.so.1", "-o", str(library), str(SOURCE)]
    subprocess.run(line, check=True)
    (folder / "libcuda.so").symlink_to(library.name)  # by which Triton before 3.6 links
    libraries = [str(folder), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    return {
        "CUDA_VISIBLE_DEVICES": "",
        "LD_LIBRARY_PATH": os.pathsep.join(libraries),
        "TRITON_LIBCUDA_PATH": str(folder),
    }


def pretend(arch: str) -> Any:
    """From here on Triton compiles for a GPU of this architecture, "sm_90": its driver, whose ``device`` may be set."""
    from triton.backends.nvidia.driver import CudaDriver
    from triton.runtime import driver

    class FakeDriver(CudaDriver):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.device = 0
            self.get_current_device = lambda: self.device
            self.set_current_device = lambda device: None
            self.get_current_stream = lambda device: 100 + device
            self.get_device_capability = lambda device=0: (int(arch[3:-1]), int(arch[-1]))

    found = FakeDriver()
    driver.set_active(found)
    return found
