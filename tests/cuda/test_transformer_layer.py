"""patch_transformer_layer with its attention in CUDA C++: Triton's and nvcc's code of a call, executed on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import mvkernels
from mvkernels import testing
from mvkernels.cuda.attention import plan
from mvkernels.cuda.launch import Launch
from mvkernels.dispatch.registry import OPS
from mvkernels.ops.patch_transformer_layer.autograd import KERNELS, TENSORS
from mvkernels.triton.repeated import RepeatedLaunch
from tests.ops.test_patch_transformer_layer import arguments_of
from tests.ptx import nvcc
from tests.ptx.launches import Executed, executed

pytestmark = pytest.mark.skipif(bool(nvcc.why_not()), reason=nvcc.why_not())

OP = OPS["patch_transformer_layer"]
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32, "tf32": torch.float32}
ROWS = ["linear_rows", "norm_ffn", "ffn_backward", "norm_backward"]


@dataclass(frozen=True)
class Case:
    """A layer, and kernels of the attention that it is to take in half types."""

    heads: int
    head_dim: int
    size: tuple[int, int]
    taken: tuple[str, ...]
    patch: tuple[int, int] = (2, 2)
    hidden: int = 40
    strides: str = "channels_last"
    bias: bool = True
    values: str = "normal"

    def __str__(self) -> str:
        height, width = self.size
        return f"{self.heads}x{self.head_dim}_{height}x{width}_{self.strides}_{self.values}"

    def arguments(self, dtype: torch.dtype, batch: int = 2) -> dict[str, Any]:
        found = arguments_of(self.heads, self.head_dim, self.hidden, self.size, self.patch, batch, dtype, self.strides,
                             self.bias, device="cpu")  # fmt: skip
        if self.values == "constant":
            found["x"].fill_(1.5)
        elif self.values == "peaked":
            found["qkv_weight"][: self.heads * self.head_dim] *= 40
        return found


CASES = (
    Case(2, 24, (8, 8), ("forward_{}_plain_24", "backward_{}_plain_16_24")),
    Case(1, 48, (16, 16), ("forward_small_{}_plain_48", "backward_{}_plain_64_48"), strides="contiguous"),
    Case(1, 36, (32, 16), ("forward_{}_plain_40", "backward_{}_plain_256_40"), patch=(2, 1), strides="sliced"),
    Case(2, 20, (9, 7), ("forward_{}_24", "backward_{}_24"), hidden=17, strides="transposed", bias=False),
    Case(3, 16, (3, 17), ("forward_{}_16", "backward_{}_16"), patch=(1, 1), values="peaked", strides="offset"),
    Case(2, 16, (1, 1), ("forward_{}_16", "backward_{}_16"), strides="expanded"),
    Case(2, 32, (8, 8), ("forward_{}_plain_32", "backward_{}_plain_16_32"), values="constant"),
)
"""Groups of 16, 64 and 256 tokens, of unequal sizes, of 51 and of one."""


def _faults(comparisons: list[testing.Comparison], log: list[Executed]) -> list[str]:
    wrong = [str(each) for each in comparisons if not each.ok]
    return wrong + [f"{launch.kernel}: {found}" for launch in log for found in launch.findings]


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_is_right_and_without_fault(case: Case, kind: str) -> None:
    """Output and all gradients against float64; the attention's kernels are those of CUDA C++ and no others."""
    with executed(tf32=kind == "tf32") as log:
        comparisons = testing.check(OP, case.arguments(DTYPES[kind]), "cuda")
    assert not _faults(comparisons, log)
    names = [launch.kernel for launch in log]
    assert [name for name in names if name in ROWS] == [
        "linear_rows", "linear_rows", "norm_ffn", "ffn_backward", "norm_backward", "norm_backward"
    ]  # fmt: skip
    attention = [name.removeprefix("attention_") for name in names if name not in ROWS]
    dim = plan.padded(case.head_dim)
    exact = f"forward_{kind}_{dim}", f"backward_{kind}_{dim}"
    assert attention == list(exact if "32" in kind else (each.format(kind) for each in case.taken))


@contextmanager
def _recorded() -> Iterator[list[str]]:
    """Within: nothing is launched, what would be is kept by name."""
    found: list[str] = []
    with (
        executed(),
        mock.patch.object(RepeatedLaunch, "__call__", lambda launch, *_: found.append(launch.kernel.__name__)),
        mock.patch.object(Launch, "__call__", lambda launch, *_: found.append(launch.kernel)),
    ):
        yield found


def test_the_shapes_of_the_models_take_the_fast_kernels() -> None:
    """A packed qkv's rows have 6 C bytes, and its thirds begin at 2 C and 4 C: whole ones of 16 for 64 to 240 channels,
    so the channels of a head alone say by how many bytes its rows are moved."""
    taken = set()
    for case in OP.suite("full"):
        arguments = case.make(dtype=torch.bfloat16)
        tokens, dim = case.shape["height"] * case.shape["width"] // 4, case.shape["channels"] // 4
        with _recorded() as names:
            able, reason = mvkernels.can_run(OP.name, "cuda", **arguments)
            if tokens > plan.TOKENS or dim % 4:
                assert not able and ("groups of 1024 pixels" if tokens > plan.TOKENS else "head_dim 30") in reason
                continue
            out = OP.function(**arguments | {"x": arguments["x"].requires_grad_()}, backend="cuda")
            out.backward(torch.zeros_like(out))
        walks = tokens == 64 and 2 * dim % 16 == 0
        whole = f"{tokens}_" if tokens in (16, 64) or plan.padded(dim) in (16, 24, 40) else ""
        assert [name for name in names if name not in ROWS] == [
            f"attention_forward{'_small' if walks else ''}_bf16_plain_{plan.padded(dim)}",
            f"attention_backward_bf16_plain_{whole}{plan.padded(dim)}",
        ]
        taken.add((tokens, dim))
    assert {(256, 36), (64, 48), (16, 60)} < taken


def test_another_backend_takes_none_of_these_kernels() -> None:
    arguments = CASES[0].arguments(torch.bfloat16)
    with _recorded() as names:
        out = OP.function(**arguments | {"x": arguments["x"].requires_grad_()}, backend="triton")
        out.backward(torch.zeros_like(out))
    assert names and not any(name.startswith("attention_") for name in names)


def test_operators_give_what_fake_tensors_say() -> None:
    forward, backward = KERNELS["cuda"]

    def results(tensors: list[torch.Tensor], *settings: Any) -> list[Any]:
        out, *saved = forward(*tensors, *settings, True)
        found = [out, *saved, *backward(torch.empty_like(out), *saved, *tensors, *settings)]
        found += forward(*tensors, *settings, False)
        return [(each.shape, each.stride(), each.dtype) for each in found]

    for case in CASES[0], CASES[1]:
        tensors = list(testing.normalised(OP, case.arguments(torch.bfloat16)).values())[:TENSORS]
        settings = (case.heads, *case.patch, 1e-5, 0.3)
        with _recorded():
            real = results(tensors, *settings)
        with FakeTensorMode(allow_non_fake_inputs=False) as fake:
            assert results([fake.from_tensor(each) for each in tensors], *settings) == real


def test_a_backward_under_autocast_keeps_the_dtype_of_the_forward() -> None:
    case = Case(2, 16, (4, 4), ())
    leaves = {name: value.requires_grad_() for name, value in testing.tensors_in(case.arguments(torch.float32)).items()}
    found = []
    with executed():
        for enabled in (True, False):
            out = OP.function(**case.arguments(torch.float32) | leaves, backend="cuda")
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                found.append(torch.autograd.grad(out, list(leaves.values()), torch.ones_like(out)))
    for under, outside in zip(*found, strict=True):
        assert under.dtype == torch.float32 and torch.equal(under, outside)


def test_an_empty_batch() -> None:
    arguments = CASES[0].arguments(torch.bfloat16, batch=0)
    leaves = {name: value.requires_grad_() for name, value in testing.tensors_in(arguments).items()}
    with executed() as log:
        out = OP.function(**arguments | leaves, backend="cuda")
        grads = torch.autograd.grad(out, list(leaves.values()), torch.ones_like(out))
    assert not log and out.shape == arguments["x"].shape
    assert not any(grad.any() for grad in grads)


def test_what_is_declined() -> None:
    """What the attention in CUDA C++ declines, and what Triton's kernels decline, each said in one line."""
    able, reason = mvkernels.can_run(OP.name, "cuda", **CASES[0].arguments(torch.bfloat16))
    assert not able and "tensors are on cpu" in reason
    declined: tuple[tuple[dict[str, Any], torch.dtype, str], ...] = (
        ({"head_dim": 16, "size": (34, 34)}, torch.bfloat16, "groups of 289 pixels"),
        ({"head_dim": 30}, torch.bfloat16, "head_dim 30"),
        ({"head_dim": 12}, torch.bfloat16, "head_dim 12"),
        ({"head_dim": 52}, torch.float32, "float32 heads of 52 channels"),
        ({"head_dim": 16}, torch.float64, "float64"),
        ({"head_dim": 16}, torch.bfloat16, ""),
    )
    with executed():
        for changes, dtype, words in declined:
            able, reason = mvkernels.can_run(OP.name, "cuda", **arguments_of(**changes, dtype=dtype, device="cpu"))
            assert able == (not words) and words in reason
        with mock.patch.dict(OP.why_not, {"triton": lambda *_: "what Triton says"}):
            able, reason = mvkernels.can_run(OP.name, "cuda", **CASES[0].arguments(torch.bfloat16))
            assert not able and reason == "what Triton says"
