"""The steps of benchmarks/gpu.py: what they ask of their commands, on a GPU and in a rehearsal."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

import pytest

from mvkernels.dispatch.registry import OPS

ROOT = Path(__file__).resolve().parents[1]
ON_GPUS = [name for name, op in OPS.items() if "triton" in op.why_not]


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import _gpu_plan

    return _gpu_plan


def jitted(op: str) -> set[str]:
    """The names of an op's kernels that are launched: the decorated ones whose first argument is a pointer to a tensor
    and that nothing else calls; those that it shares with others too."""
    folders = (ROOT / "mvkernels" / "ops" / op / "triton", *(ROOT / "mvkernels" / "triton").iterdir())
    text = "\n".join(path.read_text() for folder in folders for path in folder.glob("*.py"))
    return set(re.findall(r"kernels\.(\w+), \"", text)) | set(re.findall(r'Launch\(\s*[\w.]+,\s*"(\w+)"', text))


def test_what_it_asks_of_its_commands(plan: ModuleType) -> None:
    steps = {step.name: step for step in plan.steps()}
    assert len(steps) == len(plan.steps()), "steps are noted by name"
    # In a block that is kept, nothing is seen of what is read past an end.
    assert steps["memcheck"].environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
    assert not any(step.beside for name, step in steps.items() if name.startswith(("time", "tune", "kernels")))
    for dtype in plan.DTYPES:
        for op in ON_GPUS:
            assert f"verify {op} {dtype}" in steps
    shapes = {f"{case.model} {case.label}" for op in OPS.values() for case in op.suite("full")}
    for text in plan.SHAPES:
        assert any(text in shape for shape in shapes), text
    kernels = {name for op in ON_GPUS for name in jitted(op)}
    assert len(kernels) > 15 and [name for name in kernels if not re.search(plan.KERNELS, name)] == []
    for op, (_, *parts) in plan.COUNTED.items():
        shapes = {f"{case.model} {case.label}" for case in OPS[op].suite("full")}
        for text in parts:
            assert any(text in shape for shape in shapes), text


def test_the_rehearsal_has_the_same_steps(plan: ModuleType) -> None:
    real, rehearsed = plan.steps(), plan.steps(rehearse=True)
    assert [(s.name, s.beside, s.needs) for s in real] == [(s.name, s.beside, s.needs) for s in rehearsed]
    for one, other in zip(real, rehearsed, strict=True):
        of_the_device = {"cuda", "cpu", "triton", "cpp", "reference", "bfloat16", "float32", "128", "1"}
        assert [each for each in one.command if each not in of_the_device] == [
            each for each in other.command if each not in of_the_device
        ]
        assert other.seconds <= 60
    interpreted = [step for step in rehearsed if "TRITON_INTERPRET" in step.environment]
    assert len(interpreted) == len(ON_GPUS) and all("triton" in step.command for step in interpreted)
