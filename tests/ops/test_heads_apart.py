"""What is wrong in one head of a map stays there, also where heads lie side by side and a kernel reads several."""

import math

import pytest
import torch

import mvkernels
from tests.ops.test_patch_transformer_layer import on_triton

OPS = {
    "mobile_to_former": {"query": (1, 2, 6, 16), "x": (1, 2, 16, 5, 7)},
    "former_to_mobile": {"x": (1, 2, 16, 5, 7), "key": (1, 2, 6, 16), "value": (1, 2, 6, 16)},
    "patch_attention": dict.fromkeys(("query", "key", "value"), (1, 2, 16, 5, 7)),
    "window_attention": dict.fromkeys(("query", "key", "value"), (1, 2, 16, 5, 7)),
    "relu_linear_attention": dict.fromkeys(("query", "key", "value"), (1, 2, 16, 5, 7)),
}
SETTINGS = {"patch_attention": {"patch_size": 2}, "window_attention": {"window_size": 4}}


def _channels_last(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.permute(0, 3, 4, 1, 2).contiguous().permute(0, 3, 4, 1, 2) if tensor.dim() == 5 else tensor


@on_triton
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(("op", "which"), [(op, which) for op, shapes in OPS.items() for which in shapes])
def test_nan_and_infinity_stay_in_their_head(op, which, bad):
    torch.manual_seed(0)
    given = {name: _channels_last(torch.randn(shape).half()) for name, shape in OPS[op].items()}
    given[which][0, 0, 1, 3] = bad
    leaves = [value.requires_grad_() for value in given.values()]
    out = getattr(mvkernels, op)(*leaves, **SETTINGS.get(op, {}), backend="triton")
    for found in (out, *torch.autograd.grad(out, leaves, torch.ones_like(out))):
        assert found[:, 1].isfinite().all()
        assert not out[:, 0].isfinite().all()
