"""What the tests of mobile_to_former and former_to_mobile share: random problems, and who can run them."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from mvkernels import can_run, testing
from mvkernels.dispatch import extension
from mvkernels.dispatch.registry import OPS

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
HEAD_DIMS = (1, 3, 6, 8, 12, 20, 22, 24, 36, 48, 64, 88, 120, 160)
WIDE_HEAD_DIMS = (65, 88, 96, 120, 130, 200, 256)
DEVICE = os.environ.get("MVKERNELS_TEST_DEVICE", "cpu")
INSTRUCTION_SETS = extension.module.instruction_sets() if extension.module else []

needs_device = pytest.mark.skipif(DEVICE == "cpu", reason="MVKERNELS_TEST_DEVICE names no other device")


# Of a test, or of one parameter: Triton's kernels on CPU tensors.
INTERPRETER = (
    pytest.mark.interpreter,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1 from the start"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, where lanes are masked
)


def interpreter(test: Any) -> Any:
    for mark in INTERPRETER:
        test = mark(test)
    return test


def needs_cpp(op: str) -> Any:
    able, reason = can_run(op, "cpp", **OPS[op].suite("small")[0].make())
    return pytest.mark.skipif(not able, reason=reason or "it runs")


def tokens(shape: tuple[int, ...], kind: str, dtype: torch.dtype, device: str, generator: torch.Generator) -> Tensor:
    """A token set (B, heads, M, D): "contiguous", "split" (as a Linear leaves it), "strided", "expanded"."""
    b, h, m, d = shape
    values = torch.randn(shape, generator=generator).to(device, dtype)
    if kind == "split":
        return values.transpose(1, 2).contiguous().transpose(1, 2)
    if kind == "strided":
        room = torch.full((b, h, 2 * m, d + 1, 2), float("nan"), dtype=dtype, device=device)[:, :, ::2, 1:, 0]
        return room.copy_(values)
    return values[:, :, :1].expand(shape) if kind == "expanded" else values


TOKENS = ("contiguous", "split", "strided", "expanded")


@st.composite
def problems(
    draw: Any,
    names: tuple[str, ...],
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    device: str = "cpu",
    most: int = 14,
    residual: bool = False,
    head_dims: tuple[int, ...] = HEAD_DIMS,
) -> dict[str, Any]:
    """Arguments by name, any shape, strides and dtype: ``x`` is a map, the others are token sets."""
    dtype = draw(st.sampled_from(dtypes))
    m = draw(st.sampled_from([1, 2, 3, 4, 6, 8, 16, 17, 40]))
    b, h, d = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.sampled_from(head_dims))
    size = (draw(st.integers(1, most)), draw(st.integers(1, most)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    arguments: dict[str, Any] = {}
    for name in names:
        if name == "x":
            kind = draw(st.sampled_from(testing.STRIDES))
            arguments[name] = testing.make_map((b, h, d, *size), kind, dtype, device, generator)
        else:
            arguments[name] = tokens((b, h, m, d), draw(st.sampled_from(TOKENS)), dtype, device, generator)
    if draw(st.booleans()):
        arguments["scale"] = draw(st.sampled_from([0.1, 0.3, -0.4]))
    if residual and draw(st.booleans()):
        arguments["residual"] = False
    return arguments


def assert_ok(comparisons: list[testing.Comparison]) -> None:
    wrong = [str(c) for c in comparisons if not c.ok]
    assert not wrong, "; ".join(wrong)
