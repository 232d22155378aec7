"""The LayerNorms of the layer's Triton kernels."""

import pytest

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
