"""The LayerNorms of the layer's Triton kernels."""

import pytest
import torch

from mvkernels import testing
from tests.ops.bridges import assert_ok
from tests.ops.test_patch_transformer_layer import OP, arguments_of, on_triton


@on_triton
@pytest.mark.parametrize("noise", [0.0, 0.004, 1.0])
def test_nearly_equal_channels(noise):
    """The float32 nearest to the mean of such rows is off by about as much as they differ."""
    arguments = arguments_of(3, 12, size=(5, 4))
    arguments["x"].mul_(noise).add_(12345.7)
    assert_ok(testing.check(OP, arguments, "triton"))


@on_triton
def test_a_backward_under_autocast_keeps_the_dtype_of_the_forward():
    """Autograd may be asked for gradients inside of a context that the forward was outside of."""
    arguments = arguments_of(2, 12, size=(5, 4))
    leaves = {name: value.requires_grad_() for name, value in testing.tensors_in(arguments).items()}
    found = []
    for enabled in (True, False):
        out = OP.function(**arguments, backend="triton")
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found.append(torch.autograd.grad(out, list(leaves.values()), torch.ones_like(out)))
    for under, outside in zip(*found):
        assert under.dtype == torch.float32 and torch.equal(under, outside)
