"""Installs a wheel into a folder and uses it there: its kernels, the time of an import, and no word to the network.

PyTorch is that of another interpreter, which is not changed.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from release import binary, contents
from release.common import Failed

MOST_SECONDS = 0.5
"""Processor time of `import mvkernels` after `import torch`. Usual are a few hundredths."""
MOST_ERROR = 1e-5
PROBE = """
import json, sys, time
asked = []
sys.addaudithook(lambda event, _: asked.append(event) if event.startswith(("socket.", "urllib.", "http.")) else None)
import torch
asked.clear()
start = time.process_time()
import mvkernels
seconds = time.process_time() - start
from mvkernels.dispatch import extension
maps = torch.randn(3, 1, 2, 8, 12, 16, generator=torch.Generator().manual_seed(0))
found = mvkernels.patch_attention(*maps, 2).double()
wanted = mvkernels.patch_attention(*maps.double(), 2, backend="reference")
print(json.dumps({
    "file": mvkernels.__file__, "version": mvkernels.__version__, "seconds": seconds, "network": sorted({*asked}),
    "error": float((found - wanted).abs().max() / wanted.abs().max()), "reason": extension.reason,
    "build_info": extension.build_info(), "instruction_set": extension.instruction_set(),
    "here": extension.module.instruction_sets() if extension.module else [],
}))
"""


def of_this_machine(wheel: Path) -> bool:
    """Whether a wheel can be installed here; one for every platform can."""
    system = {"linux": "linux", "darwin": "macosx"}.get(sys.platform, "?")
    found = contents.platforms(wheel)
    return not found or any(system in name and name.endswith(platform.machine()) for name in found)


def without_network() -> list[str]:
    """What goes before a command so that it has no network; nothing where the system does not allow it."""
    line = ["unshare", "--map-root-user", "--net"]
    able = shutil.which("unshare") and not subprocess.run([*line, "true"], capture_output=True, check=False).returncode
    return line if able else []


def probed(python: Path, folder: Path, environment: dict[str, str]) -> dict[str, Any]:
    """What PROBE says in a fresh process of ``python`` that has ``folder`` before its own packages."""
    where = [str(python), "-c", "import sysconfig; print(sysconfig.get_paths()['platlib'])"]
    site = subprocess.run(where, capture_output=True, text=True, check=True).stdout.strip()
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MVKERNELS_")}
    kept |= {"PYTHONPATH": os.pathsep.join([str(folder), site]), **environment}
    # -S: an editable installation beside that torch would lend its extension.
    line = [*without_network(), str(python), "-S", "-c", PROBE]
    done = subprocess.run(line, cwd=folder, env=kept, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        raise Failed((done.stderr.strip().splitlines() or ["no output"])[-1])
    return json.loads(done.stdout)


def judged(found: dict[str, Any], folder: Path, version: str, sets: list[str]) -> None:
    """Raises Failed unless one process found what the wheel is to have."""
    if not Path(found["file"]).resolve().is_relative_to(folder.resolve()) or found["version"] != version:
        raise Failed(f"imported {found['version']} of {found['file']}")
    if found["build_info"].get("instruction_sets", []) != sets:
        raise Failed(f"kernels for {found['build_info'].get('instruction_sets')}, want {sets}: {found['reason']}")
    if found["network"]:
        raise Failed(f"asks the network: {', '.join(found['network'])}")
    if not found["error"] <= MOST_ERROR:
        raise Failed(f"{found['instruction_set'] or 'PyTorch'}: error {found['error']:.1e}, want at most {MOST_ERROR}")


def installed(wheel: Path, python: Path, version: str) -> str:
    """One process for each instruction set that this processor has, three at least; the fastest import counts."""
    if not of_this_machine(wheel):
        return "not tried: the wheel is for another machine"
    sets = [] if contents.is_pure(wheel) else binary.INSTRUCTION_SETS[platform.machine()]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "site"
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps"]
        done = subprocess.run(
            [*pip, "--no-index", "--target", str(folder), str(wheel)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise Failed((done.stderr.strip().splitlines() or ["pip failed"])[-1])
        runs = [probed(python, folder, {})]
        runs += [probed(python, folder, {"MVKERNELS_CPU_ISA": name}) for name in runs[0]["here"][1:]]
        while len(runs) < 3:
            runs.append(probed(python, folder, {}))
        for found in runs:
            judged(found, folder, version, sets)
    fastest = min(found["seconds"] for found in runs)
    if fastest > MOST_SECONDS:
        raise Failed(f"`import mvkernels` takes {fastest:.2f} s, want at most {MOST_SECONDS}")
    ran = [found["instruction_set"] for found in runs if found["instruction_set"]]
    worst = max(found["error"] for found in runs)
    network = "no network" if without_network() else "asks no network"
    return f"{', '.join(dict.fromkeys(ran)) or 'PyTorch'} ran, error {worst:.1e}, import {fastest:.3f} s, {network}"
