from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import mvkernels
from mvkernels import third_party
from mvkernels.nn import EfficientViTBlock, LiteMLA, MBConv


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def randomised(module: nn.Module) -> nn.Module:
    third_party.randomise(module)
    return module.eval()


def by_head(module: LiteMLA, x: torch.Tensor) -> torch.Tensor:
    """The formula with one matrix of scores for each sample and head, and nothing of this library."""
    d, results = module.head_dim, []
    qkv = F.conv2d(x, module.qkv.conv.weight, module.qkv.conv.bias)
    scales = [qkv]
    for k, (depthwise, pointwise) in zip(module.scales, module.aggreg):
        each = F.conv2d(qkv, depthwise.weight, depthwise.bias, padding=k // 2, groups=qkv.shape[1])
        scales.append(F.conv2d(each, pointwise.weight, pointwise.bias, groups=qkv.shape[1] // d))
    for b in range(x.shape[0]):
        heads = []
        for scale in scales:
            for head in scale[b].flatten(1).split(3 * d):
                q, k, v = head.split(d)
                scores = q.relu().t() @ k.relu()
                heads.append((scores / (scores.sum(1, keepdim=True) + module.eps) @ v.t()).t())
        results.append(torch.cat(heads).unflatten(-1, x.shape[2:]))
    return module.proj(torch.stack(results))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"scales": ()},
        {"scales": (3, 7)},
        {"bias": True},
        {"heads": 3, "out_channels": 20},
        {"heads_ratio": 0.5, "norm": False, "eps": 1e-2},
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [(5, 7), (1, 3)], ids=str)
def test_lite_mla_against_its_formula(settings, size):
    module = randomised(LiteMLA(16, head_dim=8, **settings)).double()
    x = torch.randn(2, 16, *size, dtype=torch.float64, requires_grad=True)
    out, expected = module(x), by_head(module, x)
    assert out.shape[1] == settings.get("out_channels", 16)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    leaves = [x, *module.parameters()]
    cotangent = torch.randn_like(out)
    torch.testing.assert_close(
        *(torch.autograd.grad(y, leaves, cotangent) for y in (out, expected)), rtol=1e-8, atol=1e-8
    )


@pytest.mark.parametrize("scales", [(), (5,), (3, 5)], ids=str)
def test_names_and_weights_are_timms(scales):
    timm = pytest.importorskip("timm.models.efficientvit_mit")
    other = randomised(timm.LiteMLA(16, 16, dim=8, scales=scales, eps=1e-15))
    module = LiteMLA(16, head_dim=8, scales=scales).eval()
    module.load_state_dict(other.state_dict())
    x = torch.randn(2, 16, 6, 5)
    torch.testing.assert_close(module(x), other(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("settings", [{}, {"expand_ratio": 6.0, "head_dim": 8}], ids=str)
def test_block_is_timms(settings):
    timm = pytest.importorskip("timm.models.efficientvit_mit")
    other = randomised(timm.EfficientVitBlock(32, **settings))
    module = EfficientViTBlock(32, eps=1e-5, **settings).eval()
    module.load_state_dict(other.state_dict())
    x = torch.randn(2, 32, 6, 5)
    torch.testing.assert_close(module(x), other(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scales", [(), (5,)], ids=str)
@pytest.mark.parametrize("dw_in_ffn", [False, True])
def test_places_of_the_depthwise_convolution(scales, dw_in_ffn):
    block = randomised(EfficientViTBlock(16, head_dim=8, scales=scales, dw_in_ffn=dw_in_ffn))
    depthwise = [m for m in block.modules() if isinstance(m, nn.Conv2d) and m.kernel_size[0] > 1]
    assert len(depthwise) == len(scales) + dw_in_ffn
    x = torch.randn(1, 16, 9, 9)
    before, after = block.local_module(x), block.local_module(x + F.pad(torch.ones(1, 16, 1, 1), (4, 4, 4, 4)))
    reached = (before != after).any(1).sum()
    assert reached == (9 if dw_in_ffn else 1)
    assert block(x).shape == x.shape


def test_mbconv():
    module = randomised(MBConv(8, 12, stride=2, expand_ratio=2.5))
    assert module(torch.randn(1, 8, 7, 8)).shape == (1, 12, 4, 4)
    assert [m.bias is None for m in module.modules() if isinstance(m, nn.Conv2d)] == [True] * 3
    fewer = MBConv(8, 12, fewer_norm=True)
    assert [m.bias is None for m in fewer.modules() if isinstance(m, nn.Conv2d)] == [False, False, True]
    assert sum(isinstance(m, nn.BatchNorm2d) for m in fewer.modules()) == 1
    with pytest.raises(ValueError, match="stride is 2 without"):
        MBConv(8, 12, stride=2, kernel_size=None)


def test_channels_last_stays():
    module = randomised(EfficientViTBlock(16, head_dim=8)).to(memory_format=torch.channels_last)
    x = torch.randn(2, 16, 6, 10)
    out = module(x.contiguous(memory_format=torch.channels_last))
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, module(x), rtol=1e-4, atol=1e-4)


def test_float16_and_autocast():
    """1e-15 is 0 in float16, and the sums pass what it holds."""
    module = randomised(LiteMLA(16, head_dim=8, norm=False))
    x = torch.randn(1, 16, 24, 24)
    expected = module(x)
    half = copy.deepcopy(module).half()
    assert half(50 * x.half()).isfinite().all()
    torch.testing.assert_close(half(x.half()).float(), expected, rtol=0.05, atol=0.05)
    assert not half(torch.zeros(1, 16, 4, 4).half()).count_nonzero()
    with torch.autocast("cpu", torch.bfloat16):
        out = module(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, rtol=0.1, atol=0.1)


def test_backend_copy_and_pickle():
    module = randomised(LiteMLA(16, head_dim=8, backend="reference"))
    x = torch.randn(1, 16, 5, 5)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x), module(x))
    with pytest.raises(mvkernels.BackendUnavailable):
        LiteMLA(16, head_dim=8, backend="cuda")(x)


@pytest.mark.parametrize(
    "settings, match",
    [
        ({"head_dim": 0}, "head_dim is 0"),
        ({"head_dim": 32}, "gives no heads"),
        ({"heads": 0}, "heads is 0"),
        ({"out_channels": 0}, "out_channels is 0"),
        ({"scales": (5, 2)}, r"scales is \(5, 2\), want odd"),
        ({"eps": -1.0}, "eps is -1.0"),
        ({"backend": "fastest"}, "backend"),
    ],
    ids=str,
)
def test_bad_settings(settings, match):
    with pytest.raises(ValueError, match=match):
        LiteMLA(16, **{"head_dim": 8, **settings})


@pytest.mark.parametrize("shape", [(16, 5, 5), (1, 8, 5, 5)], ids=str)
def test_bad_input(shape):
    with pytest.raises(ValueError, match="LiteMLA: x is"):
        LiteMLA(16, head_dim=8)(torch.randn(shape))
