"""The comparison of C++ kernels in one process."""

from __future__ import annotations

import argparse
import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

from mvkernels.dispatch import extension
from mvkernels.dispatch.registry import OPS

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
pytestmark = pytest.mark.skipif(
    extension.module is None or not BENCHMARKS.exists(), reason="needs a checkout with the C++ extension"
)
OPTIONS = argparse.Namespace(op=["relu_linear_attention"], suite="small", batch=1, dtype="float32", min_time=0.01)


@pytest.fixture
def kernels_ab(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("kernels_ab")


@pytest.mark.parametrize("name", ["patch_attention", "mobile_to_former", "former_to_mobile", "relu_linear_attention",
                                  "multiscale_linear_attention"])  # fmt: skip
def test_the_operators_of_a_call_are_recorded(kernels_ab: Any, name: str) -> None:
    op = OPS[name]
    case = op.suite("small")[0]
    (fwd, forward, arguments), (bwd, backward, more) = kernels_ab.of_call(op, case.make(layout="channels_last"))
    assert (fwd, bwd) == ("fwd", "bwd") and backward.__name__ == f"{name}_backward.default"
    with torch.no_grad():
        found, want = forward(*arguments), op.function(**case.make(layout="channels_last"), backend="reference")
        assert all(torch.isfinite(each).all() for each in tree_leaves(backward(*more)))
    torch.testing.assert_close(tree_leaves(found)[0], want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", [name for name, op in OPS.items() if not op.differentiable])
def test_of_a_kernel_without_a_backward_the_forward_is_recorded(kernels_ab: Any, name: str) -> None:
    op = OPS[name]
    case = op.suite("small")[0]
    ((mode, forward, arguments),) = kernels_ab.of_call(op, case.make(layout="channels_last"))
    assert (mode, forward.__name__) == ("fwd", f"{name}.default")
    want = op.function(**case.make(layout="channels_last"), backend="reference")
    torch.testing.assert_close(forward(*arguments), want, rtol=1e-3, atol=1e-3)


def test_of_an_op_that_is_made_of_others_all_operators_are_recorded(kernels_ab: Any) -> None:
    op = OPS["patch_transformer_layer"]
    found = list(kernels_ab.of_call(op, op.suite("small")[0].make(layout="channels_last")))
    names = ["pointwise", "patch_attention_forward", "pointwise", "pointwise", "pointwise"]
    assert [(mode, forward.__name__) for mode, forward, _ in found] == [("fwd", f"{name}.default") for name in names]


def test_a_slower_kernel_is_seen(
    kernels_ab: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    op = OPS["relu_linear_attention"]
    monkeypatch.setitem(OPS, op.name, replace(op, suite=lambda _: op.suite("small")[:1]))

    def other(name: str) -> Any:
        ours = getattr(torch.ops.mvkernels_cpp, name).default
        if not name.endswith("_backward"):
            return ours
        return lambda *arguments: (ours(*arguments), ours(*arguments))[0]

    forward, backward = kernels_ab.compare(OPTIONS, other)
    assert 0.6 < forward < 1.7 and 0.3 < backward < 0.8
    assert "here/there" in capsys.readouterr().out
