"""The workflow of wheels, pyproject.toml, setup.py and the checks say the same where each says it by itself."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest

from mvkernels.dispatch import extension
from release import binary, contents

tomllib = pytest.importorskip("tomllib")  # Python 3.11 has it
yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).resolve().parents[2]
WORKFLOW = ROOT / ".github/workflows/wheels.yml"
MINIMUM = ".".join(map(str, extension.MINIMUM_TORCH))

pytestmark = pytest.mark.skipif(not WORKFLOW.exists(), reason="not a checkout")


@pytest.fixture(scope="module")
def jobs() -> dict[str, Any]:
    return yaml.safe_load(WORKFLOW.read_text())["jobs"]


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def setup() -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("setuptools.setup", lambda **_: None)
        return runpy.run_path(str(ROOT / "setup.py"))


def commands(job: dict[str, Any]) -> list[str]:
    return [step["run"] for step in job["steps"] if "run" in step]


def used(job: dict[str, Any], action: str) -> list[dict[str, Any]]:
    """What a job hands to an action, each time."""
    return [step.get("with", {}) for step in job["steps"] if step.get("uses", "").startswith(action)]


@pytest.mark.core
def test_one_python_and_one_wheel_a_platform(project: dict[str, Any], jobs: dict[str, Any]) -> None:
    """cp310 alone is built, the limited API and the oldest Python are that, and every platform is there."""
    tool = project["tool"]["cibuildwheel"]
    oldest = re.fullmatch(r">=3\.(\d+)", project["project"]["requires-python"])
    assert oldest and tool["build"] == f"cp3{oldest[1]}-*"
    text = (ROOT / "setup.py").read_text()
    assert f'"py_limited_api": "cp3{oldest[1]}"' in text and f"Py_LIMITED_API=0x03{int(oldest[1]):02x}0000" in text
    assert f'"python_limited_api": "3.{oldest[1]}"' in text and f"cp3{oldest[1]}-abi3" in contents.tag.__doc__
    images = {name: image for name, image in tool["linux"].items() if name.endswith("-image")}
    assert images == dict.fromkeys(
        ("manylinux-x86_64-image", "manylinux-aarch64-image"), f"manylinux_2_{contents.OLDEST_GLIBC}"
    )
    # The machines are of as many platforms as a release has wheels with kernels; each builds its own.
    machines = jobs["wheel"]["strategy"]["matrix"]["os"]
    assert tool["linux"]["archs"] == ["native"] and tool["macos"]["archs"] == ["arm64"]
    assert [re.sub(r"[\d.-]+", "-", machine) for machine in machines] == ["ubuntu-", "ubuntu-arm", "macos-"]
    assert len(machines) == sum("-abi3-" in pattern for pattern in contents.RELEASE.values())


def test_the_oldest_torch(project: dict[str, Any], jobs: dict[str, Any], setup: dict[str, Any]) -> None:
    """Wheels are built, tested and checked with the torch from which on the extension runs."""
    tool, checks = project["tool"]["cibuildwheel"], " ".join(commands(jobs["check"]))
    for text in (tool["before-build"], tool["before-test"], checks):
        assert re.findall(r"torch==([\d.]+)", text) == [f"{MINIMUM}.0"], text
    major, minor = extension.MINIMUM_TORCH
    assert int(setup["TORCH_TARGET"], 16) == major << 56 | minor << 48
    text = (ROOT / "setup.py").read_text()
    assert f'"minimum_torch": "{MINIMUM}"' in text and f"if version < ({major}, {minor}):" in text
    assert f"libtorch_cpu of torch {MINIMUM} " in binary.LIST.read_text()
    (needs,) = (need for need in project["project"]["dependencies"] if need.startswith("torch"))
    assert tuple(map(int, needs.removeprefix("torch>=").split("."))) <= extension.MINIMUM_TORCH


def test_every_instruction_set_is_built_and_looked_for(project: dict[str, Any], setup: dict[str, Any]) -> None:
    environment = project["tool"]["cibuildwheel"]["environment"]
    assert environment == {"MVKERNELS_BUILD_ISAS": "all", "MVKERNELS_REQUIRE_EXT": "1"}
    for machine, sets in binary.INSTRUCTION_SETS.items():
        assert sets == list(setup["ISA_FLAGS"][{"arm64": "aarch64"}.get(machine, machine)])
    assert {*setup["ISA_FLAGS"]} <= {*binary.INSTRUCTION_SETS}


def test_torch_is_in_no_wheel(project: dict[str, Any], setup: dict[str, Any]) -> None:
    """auditwheel leaves out what the extension is linked to, in the workflow and in the Makefile."""
    (ours,) = (name for name in binary.LIBRARIES if "torch" in name)
    repair = project["tool"]["cibuildwheel"]["linux"]["repair-wheel-command"]
    for text in (repair, (ROOT / "Makefile").read_text()):
        assert re.findall(r"--exclude (lib\S+)", text) == [ours]
    assert not [name for name in binary.OF_MACOS if "torch" in name]  # there it is not linked by name
    assert not any("torch" in name for name in contents.KINDS)


def test_cuda_is_compiled_once_and_handed_on(jobs: dict[str, Any], project: dict[str, Any]) -> None:
    place = "mvkernels/cuda/data"
    assert [with_["path"] for with_ in used(jobs["cuda"], "actions/upload-artifact")] == [place]
    for name in ("wheel", "pure"):
        (data,) = used(jobs[name], "actions/download-artifact")
        assert data == {"name": used(jobs["cuda"], "actions/upload-artifact")[0]["name"], "path": place}
        assert jobs[name]["needs"] == "cuda"
        steps = [step.get("uses", step.get("run", "")) for step in jobs[name]["steps"]]
        downloads = next(i for i, step in enumerate(steps) if "download-artifact" in step)
        builds = next(i for i, step in enumerate(steps) if "cibuildwheel --" in step or "-m build" in step)
        assert downloads < builds
    # Without nvcc one of them would stop the build, the other would leave the files out.
    environments = [step.get("env", {}) for job in jobs.values() for step in job["steps"]]
    environments += [job.get("env", {}) for job in jobs.values()]
    environments += [yaml.safe_load(WORKFLOW.read_text())["env"], project["tool"]["cibuildwheel"]["environment"]]
    assert not {"MVKERNELS_REQUIRE_CUDA", "MVKERNELS_SKIP_CUDA"} & {name for each in environments for name in each}


def test_only_what_was_checked_is_published_and_only_of_a_tag(jobs: dict[str, Any]) -> None:
    workflow = yaml.safe_load(WORKFLOW.read_text())
    assert jobs["check"]["needs"] == ["wheel", "pure"] and jobs["publish"]["needs"] == "check"
    assert jobs["publish"]["if"] == "startsWith(github.ref, 'refs/tags/v')"
    assert workflow[True]["push"] == {"tags": ["v*"]}  # YAML reads `on` as a truth value
    (line,) = (line for line in commands(jobs["check"]) if "release.check" in line)
    assert f"--complete --glibc {contents.OLDEST_GLIBC} " in line and line.endswith(" dist/*")
    assert used(jobs["check"], "actions/download-artifact") == used(jobs["publish"], "actions/download-artifact")
    pattern = used(jobs["check"], "actions/download-artifact")[0]["pattern"]
    for name in ("wheel", "pure"):
        assert used(jobs[name], "actions/upload-artifact")[0]["name"].startswith(pattern.rstrip("*"))
    assert not used(jobs["cuda"], "actions/upload-artifact")[0]["name"].startswith(pattern.rstrip("*"))
    # A token may be asked for by the last job alone, and nothing is published with a password.
    assert jobs["publish"]["permissions"] == {"id-token": "write"} and workflow["permissions"] == {"contents": "read"}
    assert not [name for name, job in jobs.items() if "permissions" in job and name != "publish"]
    assert "secrets" not in WORKFLOW.read_text()


def test_a_test_of_a_wheel_is_of_the_wheel(project: dict[str, Any]) -> None:
    """The tests are copied, and those that are named are there."""
    tool = project["tool"]["cibuildwheel"]
    assert {"tests", "pyproject.toml"} <= {*tool["test-sources"]}
    named = re.findall(r"tests/\S+\.py", " ".join(tool["test-command"]))
    assert named and all((ROOT / name).exists() for name in named)


def test_the_kernels_in_cuda_are_of_the_names_and_the_size_that_a_wheel_may_have() -> None:
    compiler = runpy.run_path(str(ROOT / "csrc/cuda/compile.py"))
    assert compiler["MOST_BYTES"] < contents.MOST_BYTES
    pattern, _ = contents.KINDS["CUDA kernels"]
    for source in compiler["sources"]():
        name = compiler["module_of"](source).replace("/", ".")
        for target in compiler["TARGETS"]:
            assert re.fullmatch(pattern, f"mvkernels/cuda/data/{name}.{target}.xz")
