"""``mvkernels verify``: finds a wrong kernel, runs what it can, says what it did not run."""

from __future__ import annotations

import dataclasses
import functools
import json
from typing import Any

import pytest
import torch
from torch import Tensor

from mvkernels import testing, verify
from mvkernels.commands import cli
from mvkernels.dispatch.registry import OPS

NAME = "patch_attention"


def change(monkeypatch: pytest.MonkeyPatch, **parts: Any) -> None:
    monkeypatch.setitem(OPS, NAME, dataclasses.replace(OPS[NAME], **parts))


@pytest.mark.core
def test_all_is_right(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", "--dtype", "float32"]) == 0
    out = capsys.readouterr().out
    assert "all correct" in out and "not run: patch_attention on cuda: the CUDA kernels run on CUDA tensors" in out


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", "--dtype", "float16", "bfloat16", "--backend", "reference", "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert found["ok"] and err == ""
    assert {row["dtype"] for row in found["rows"]} == {"float16", "bfloat16"}
    assert {row["backend"] for row in found["rows"]} == {"reference"}
    assert all(row["error"] <= row["allowed"] for row in found["rows"])


def test_inputs_cover_the_suite_and_every_kind_of_strides() -> None:
    op = OPS[NAME]
    found = list(verify.inputs(op))
    strides = {strides for _, strides, _ in found}
    assert set(testing.STRIDES) <= strides
    assert any("9x7" in shape for shape, _, _ in found) and any("1x1" in shape for shape, _, _ in found)
    for case in op.suite("small"):
        assert any(case.label in shape for shape, _, _ in found)
    tokens = {shape for shape, _, _ in verify.inputs(OPS["mobile_to_former"])}
    assert any("9x7" in shape for shape in tokens)
    biased = [make(torch.float32, "cpu") for _, _, make in found]
    assert any("bias" in arguments for arguments in biased)


@pytest.mark.parametrize("tensor", ["out", "dvalue"])
def test_a_wrong_kernel_is_status_1(
    tensor: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = OPS[NAME].function

    class Skewed(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
            return x.clone()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
            return g * 1.001

    @functools.wraps(right)
    def wrong(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **kw: Any) -> Tensor:
        if tensor == "out":
            return right(query, key, value, *rest, **kw) * 1.001
        return right(query, key, Skewed.apply(value), *rest, **kw)

    change(monkeypatch, function=wrong)
    monkeypatch.setattr(verify, "ODD_MAPS", ())
    assert cli.main(["verify", "--op", NAME, "--backend", "reference", "--dtype", "float32", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["ok"]
    assert any(not row["ok"] and row["worst"] == tensor for row in found["rows"])


def test_a_kernel_that_raises_is_a_row_and_the_rest_still_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = OPS[NAME].function

    @functools.wraps(right)
    def fails(query: Tensor, *rest: Any, **kw: Any) -> Tensor:
        if query.shape[3] == 9:
            raise RuntimeError("boom")
        return right(query, *rest, **kw)

    change(monkeypatch, function=fails)
    assert cli.main(["verify", "--backend", "reference", "--dtype", "float32"]) == 1
    out = capsys.readouterr().out
    assert "WRONG RuntimeError: boom" in out and ", 1 wrong" in out


def test_without_kernels_the_reference_is_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    change(monkeypatch, why_not={"cpp": lambda *_: "not built", "triton": lambda *_: "no Triton"})
    result = verify.verify(ops=(NAME,), dtypes=("float32",))
    assert result.ok and {row.backend for row in result.rows} == {"reference"}
    assert result.not_run == {
        (NAME, "cpp"): "not built",
        (NAME, "triton"): "no Triton",
        (NAME, "cuda"): "patch_attention has no cuda kernel",
    }


def test_the_interpreter_runs_only_when_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    reference = OPS[NAME].reference

    @functools.wraps(OPS[NAME].function)
    def function(*args: Any, backend: str, **kw: Any) -> Tensor:
        return reference(*args, **kw)

    change(monkeypatch, function=function, why_not={"triton": lambda *_: None})
    result = verify.verify(ops=(NAME,), dtypes=("float32",))
    assert {row.backend for row in result.rows} == {"reference"}
    assert "--backend triton" in result.not_run[NAME, "triton"]
    result = verify.verify(ops=(NAME,), backends=("triton",), dtypes=("float32",))
    assert {row.backend for row in result.rows} == {"triton"}
    assert "pixels" in result.not_run[NAME, "triton"]


def test_of_kernels_without_a_backward_the_output_is_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference's gradients still are."""
    right = OPS[NAME].function

    def function(*args: Any, backend: str, **kw: Any) -> Tensor:
        assert backend == "reference" or not torch.is_grad_enabled()
        return right(*args, backend="reference", **kw)

    kernels = {"forward_only": frozenset({"cpp"}), "why_not": {"cpp": lambda *_: None}}
    change(monkeypatch, **kernels, function=functools.wraps(right)(function))
    result = verify.verify(ops=(NAME,), dtypes=("float32",))
    assert result.ok and {row.backend for row in result.rows} == {"reference", "cpp"}
    assert {row.worst for row in result.rows if row.backend == "cpp"} == {"out"}
    assert {row.worst for row in result.rows if row.backend == "reference"} > {"out"}


@pytest.mark.parametrize("backend", ["cpp", "triton"])
def test_ops_that_are_not_named_are_those_with_the_kernel(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    change(monkeypatch, why_not={})
    monkeypatch.setattr(verify.report, "check_backends", lambda name, *_: asked.append(name))
    monkeypatch.setattr(verify, "inputs", lambda *_: iter(()))
    verify.verify(backends=(backend,))
    assert asked == [name for name, op in OPS.items() if backend in op.why_not] and NAME not in asked
