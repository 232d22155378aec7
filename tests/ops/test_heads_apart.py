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


def _called(op, given, grad):
    leaves = [value.clone(memory_format=torch.preserve_format).requires_grad_() for value in given.values()]
    out = getattr(mvkernels, op)(*leaves, **SETTINGS.get(op, {}), backend="triton")
    return out.detach(), *torch.autograd.grad(out, leaves, grad)


@on_triton
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("op", "which"), [(op, which) for op, shapes in OPS.items() for which in (*shapes, "grad")])
def test_nan_and_infinity_stay_in_their_head(op, which, bad):
    torch.manual_seed(0)
    given = {name: _channels_last(torch.randn(shape).half()) for name, shape in OPS[op].items()}
    grad = torch.randn(next(iter(OPS[op].values()))).half()
    whole = _called(op, given, grad)
    wrong = grad if which == "grad" else given[which]
    wrong[0, 0, 1, 3] = bad
    found = _called(op, given, grad)
    for have, want in zip(found, whole, strict=True):
        assert want.isfinite().all()
        assert torch.equal(have[:, 1], want[:, 1])
    # What is rectified has nothing left of -inf.
    if op != "relu_linear_attention" or which in ("value", "grad") or bad != -math.inf:
        assert not all(tensor[:, 0].isfinite().all() for tensor in found)
