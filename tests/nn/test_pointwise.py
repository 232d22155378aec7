from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from mvkernels.nn import pointwise_to_channels_first, pointwise_to_channels_last


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("batch", [0, 1, 2])
def test_to_channels_last(batch, layout, bias):
    x = torch.randn(batch, 5, 4, 6, dtype=torch.float64)
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    if layout == "sliced":
        x = torch.randn(batch, 10, 4, 13, dtype=torch.float64)[:, ::2, :, 1::2]
    weight = torch.randn(7, 5, 1, 1, dtype=torch.float64)
    offset = torch.randn(7, dtype=torch.float64) if bias else None
    out = pointwise_to_channels_last(x, weight, offset)
    assert out.is_contiguous()
    torch.testing.assert_close(out.permute(0, 3, 1, 2), F.conv2d(x, weight, offset))


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("batch", [0, 1, 2])
def test_to_channels_first(batch, channels_last, bias):
    x = torch.randn(batch, 4, 6, 5, dtype=torch.float64)
    weight = torch.randn(7, 5, 1, 1, dtype=torch.float64)
    if channels_last:
        weight = weight.to(memory_format=torch.channels_last)
    offset = torch.randn(7, dtype=torch.float64) if bias else None
    out = pointwise_to_channels_first(x, weight, offset)
    expected = F.conv2d(x.permute(0, 3, 1, 2).contiguous(), weight, offset)
    torch.testing.assert_close(out, expected)
    if batch:
        assert out.stride() == expected.stride()


@pytest.mark.parametrize("batch", [1, 2])
def test_gradient_survives_batch_norm(batch):
    """A batch of 1 whose gradient has an odd batch stride makes PyTorch's batch norm err on the CPU."""
    x = torch.randn(batch, 5, 4, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 5, 1, 1, dtype=torch.float64)
    scale = torch.rand(5, dtype=torch.float64)

    def normed():
        return F.silu(F.batch_norm(x, torch.zeros_like(scale), torch.ones_like(scale), scale, None, False))

    out = pointwise_to_channels_last(normed(), weight).permute(0, 3, 1, 2)
    cotangent = torch.randn(out.shape, dtype=torch.float64)
    expected = torch.autograd.grad(F.conv2d(normed(), weight), x, cotangent)
    torch.testing.assert_close(torch.autograd.grad(out, x, cotangent), expected)


def test_gradients():
    x = torch.randn(2, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 3, 1, 1, dtype=torch.float64, requires_grad=True)
    back = torch.randn(2, 5, 1, 1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, w, b: pointwise_to_channels_first(pointwise_to_channels_last(x, w), b), (x, weight, back)
    )
