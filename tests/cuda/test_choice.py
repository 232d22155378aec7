"""Which of Triton and CUDA C++ "auto" takes, where both can run a call."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mvkernels import tune
from mvkernels.bench import timing
from mvkernels.cuda import choice, modules
from mvkernels.dispatch import backend
from mvkernels.dispatch.registry import OPS
from mvkernels.triton import configs
from tests.devices import PRETENDED

WITH_CHOICE = [name for name, op in OPS.items() if op.choice is not None]
REASONS = {name: op.why_not["cuda"] for name, op in OPS.items() if "cuda" in op.why_not}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Maps on the CPU count as those of an H100 on which every backend can run, and nothing was measured."""
    monkeypatch.setattr(backend, "_PREFERENCE", {"cpu": ("cuda", "triton")})
    monkeypatch.setattr(configs, "device_of", lambda *_: PRETENDED["sm_90"])
    monkeypatch.setattr(configs, "CONFIGS", tmp_path)
    for op in OPS.values():
        for each in ("triton", "cuda"):
            if each in op.why_not:
                monkeypatch.setitem(op.why_not, each, lambda *_: None)  # type: ignore[arg-type]
    configs.forget()
    yield
    configs.forget()


def arguments_of(name: str, grad: bool = False) -> tuple[dict[str, Any], tuple[Any, ...]]:
    """The arguments of an op's first shape: by name, and checked."""
    op = OPS[name]
    arguments = op.suite("small")[0].make()
    if grad:
        arguments[op.maps[0]].requires_grad_()
    return arguments, op.check(*arguments.values())


def predict(monkeypatch: pytest.MonkeyPatch, name: str, times: float, grad: bool = False) -> None:
    key = choice.key_of(OPS[name], arguments_of(name)[0], grad)
    monkeypatch.setattr(choice, "predicted", lambda: {"sm_90": {name: {configs.class_of(key): times}}})
    configs.forget()


def test_ops_with_both_have_the_choice() -> None:
    assert [name for name, op in OPS.items() if {"triton", "cuda"} <= set(op.why_not)] == WITH_CHOICE
    assert WITH_CHOICE


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("name", WITH_CHOICE)
def test_the_prediction_decides_where_nothing_was_measured(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for times, taken in ((1.31, "cuda"), (1.29, "triton")):
        predict(monkeypatch, name, times)
        assert backend.choose(OPS[name], None, arguments_of(name)[1]) == taken
        # That of forward and backward together is another.
        assert backend.choose(OPS[name], None, arguments_of(name, grad=True)[1]) == "triton"
        predict(monkeypatch, name, times, grad=True)
        assert backend.choose(OPS[name], None, arguments_of(name, grad=True)[1]) == taken
        with torch.no_grad():
            assert backend.choose(OPS[name], None, arguments_of(name, grad=True)[1]) == "triton"
        assert backend.choose(OPS[name], None, arguments_of(name)[1], backward=True) == taken


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("name", WITH_CHOICE)
def test_a_measurement_decides_against_the_prediction(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments, checked = arguments_of(name)
    for times, measured, taken in ((5.0, 0, "triton"), (0.1, 1, "cuda")):
        predict(monkeypatch, name, times)
        text = configs.key_text(choice.key_of(OPS[name], arguments, False))
        content = {"configs": {f"{name}.{choice.KERNEL}": {text: {"CUDA": measured}}}}
        configs.file_of(PRETENDED["sm_90"].name).write_text(json.dumps(content))
        configs.forget()
        assert backend.choose(OPS[name], None, checked) == taken


@pytest.mark.usefixtures("gpu")
def test_without_triton_cuda_is_taken_whatever_is_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "patch_attention"
    predict(monkeypatch, name, 0.5)
    monkeypatch.setitem(OPS[name].why_not, "triton", lambda *_: "no Triton")  # type: ignore[arg-type]
    assert backend.choose(OPS[name], None, arguments_of(name)[1]) == "cuda"
    monkeypatch.setitem(OPS[name].why_not, "cuda", lambda *_: "no driver")  # type: ignore[arg-type]
    assert backend.choose(OPS[name], None, arguments_of(name)[1]) == "reference"


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("faster", ["triton", "cuda"])
@pytest.mark.parametrize("times", [0.5, 5.0])
def test_tune_keeps_what_it_measured(faster: str, times: float, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "patch_attention"
    op, (arguments, checked) = OPS[name], arguments_of(name)
    monkeypatch.setattr(tune, "calls", lambda *_: {"forward": lambda: {"out": op.reference(*checked)}})

    def interleave(ways: dict[str, Any], *_: Any, **__: Any) -> dict[str, timing.Times]:
        return {which: timing.Times((1e-6 if which == faster else 2e-6,)) for which in ways}

    monkeypatch.setattr(timing, "interleave", interleave)
    predict(monkeypatch, name, times)
    (finding,) = tune.tune_choice(op, arguments, "cpu", set())
    assert finding.kernel == choice.KERNEL and finding.key == configs.key_text(choice.key_of(op, arguments, False))
    assert finding.best == ({} if (faster == "cuda") == (times > 1) else {"CUDA": int(faster == "cuda")})
    tune.save(configs.file_of(PRETENDED["sm_90"].name), name, [finding], PRETENDED["sm_90"])
    configs.forget()
    assert backend.choose(op, None, checked) == faster


@pytest.fixture
def reasons(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """With ``gpu``: the reasons against CUDA C++ are looked for as on a GPU, up to what is asked of the driver."""
    find = modules.why_not
    monkeypatch.setattr(modules, "why_not", lambda map_: modules._why_not(0) if find(map_) else None)
    monkeypatch.setattr(modules, "_why_not_on", lambda index: json.loads("null"))  # which Dynamo cannot trace
    for name in WITH_CHOICE:
        monkeypatch.setitem(OPS[name].why_not, "cuda", REASONS[name])  # type: ignore[arg-type]


@pytest.mark.usefixtures("reasons")
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", WITH_CHOICE)
def test_a_compiled_function_takes_what_is_taken_without(
    name: str, dynamic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one graph, also where torch.compile does not know the sizes."""
    op, (arguments, _) = OPS[name], arguments_of(name)
    for times, taken in ((5.0, "cuda"), (0.5, "triton")):
        predict(monkeypatch, name, times)
        torch.compiler.reset()
        graphs: list[str] = []

        def keep(graph: torch.fx.GraphModule, _: Any, graphs: list[str] = graphs) -> Any:
            graphs.append(str(graph.graph))
            return lambda *given: (given[0],)

        compiled = torch.compile(op.function, backend=keep, fullgraph=True, dynamic=dynamic)
        compiled(**arguments)
        assert len(graphs) == 1 and f"mvkernels_{taken}.{name}" in graphs[0]
