"""Which kernels of the attention's backward a call takes, and what the host computes for them."""

from __future__ import annotations

import random
from dataclasses import replace

import torch

from mvkernels.cuda.attention import backward_plan as plan
from mvkernels.triton.attention.problem import AttentionProblem
from tests.cuda.attention_cases import Case, laid
from tests.devices import PRETENDED


def _kernel(case: Case, dtype: torch.dtype = torch.bfloat16, aligned: int = 16, arch: str = "sm_90") -> str:
    given = case.arguments(dtype)
    maps = [(name, given[of]) for name, of in zip("qkv", ("query", "key", "value"))]
    maps += [("g", laid(torch.zeros(given["value"].shape, dtype=dtype), case.strides))]
    maps += [(f"d{name}", map_) for name, map_ in maps[:3]]
    problem = AttentionProblem.of_call(case.op, maps, given.get("bias"), case.group, case.shift, False)
    launches, _ = plan.backward_launches(replace(problem, device=PRETENDED[arch]), case.bias, True, aligned)
    (found,) = (each.kernel for each in launches if each.kernel.startswith("attention_backward"))
    return found.removeprefix("attention_backward_")


def test_which_kernel_a_call_takes() -> None:
    """Whole rows in registers where groups are small or 12 x 12, equal, and rows aligned; else each warp owns keys."""
    swin = Case(3, 32, (14, 14), (7, 7), (3, 3), strides="channels_last", bias=True)
    assert _kernel(swin) == _kernel(replace(swin, strides="packed")) == "bf16_56_32"
    assert _kernel(swin, torch.float16) == "f16_56_32"
    assert _kernel(swin, torch.float32) == "f32_32"
    assert _kernel(swin, aligned=8) == "bf16_56_32"
    assert _kernel(swin, aligned=2) == _kernel(replace(swin, strides="contiguous")) == "bf16_32"
    mobilevit = Case(4, 60, (16, 16), (2, 2), strides="channels_last")
    assert _kernel(mobilevit) == "bf16_plain_64_64"
    assert _kernel(replace(mobilevit, size=(8, 8))) == "bf16_plain_16_64"
    assert _kernel(replace(mobilevit, size=(16, 15))) == "bf16_64"  # patches of two sizes
    assert _kernel(replace(mobilevit, size=(32, 32))) == "bf16_plain_64"
    for d, dim in ((16, 16), (24, 24), (36, 40)):  # 256 tokens
        many = replace(mobilevit, size=(32, 32), d=d)
        assert _kernel(many) == _kernel(many, aligned=8) == f"bf16_plain_256_{dim}"
        assert _kernel(many, arch="sm_80") == _kernel(replace(many, strides="contiguous")) == f"bf16_plain_{dim}"
    large = replace(swin, size=(24, 24), group=(12, 12), shift=(0, 0))
    assert _kernel(large) == "bf16_144_32"
    assert _kernel(large, arch="sm_80") == "bf16_32"  # sums of the bias's gradient do not fit
    assert _kernel(replace(large, bias=False), arch="sm_80") == "bf16_144_32"
    assert _kernel(replace(large, d=48)) == "bf16_48"


def test_divisors() -> None:
    """As csrc/cuda/attention/groups.cuh divides by them: all numbers below 2**31."""
    draw = random.Random(0)
    for n in (1, 2, 3, 7, 12, 64, 65, 1000, (1 << 20) + 1, (1 << 30) - 1, 1 << 30):
        by, shift = plan.divisor_of(n)
        assert -(1 << 31) <= by < 1 << 31
        for x in (0, 1, n - 1, n, n + 1, (1 << 31) - 1, ((1 << 31) - 1) // n * n, *draw.choices(range(1 << 31), k=100)):
            assert 2 * x * (by % (1 << 32)) >> 32 >> shift == x // n
