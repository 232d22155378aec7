from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mvkernels.nn import (
    DownsampleMobile,
    DropPath,
    DynamicReLU,
    Former,
    FormerToMobile,
    HeadwiseLinear,
    Mobile,
    MobileToFormer,
)
from mvkernels.nn import mobile_former as module_under_test
from tests.mobile_former_layout import DyReLU, HyperFunc

BRIDGES = [MobileToFormer, FormerToMobile]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def randomise(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data.normal_(0.0, 0.5, generator=generator)
    return module


def inputs(batch=2, channels=12, tokens=3, width=16, size=(5, 7), dtype=torch.float64):
    x = torch.randn(batch, channels, *size, dtype=dtype, requires_grad=True)
    return x, torch.randn(batch, tokens, width, dtype=dtype, requires_grad=True)


def sample_by_sample(module: nn.Module, x: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """The formulas with one matrix for each sample and head, and nothing of this library."""
    gate = 1.0 if module.gate is None else 2 * (module.gate(tokens) + 3).clamp(0, 6) / 6
    results = []
    if isinstance(module, MobileToFormer):
        query = module.query(tokens)
        for b in range(x.shape[0]):
            heads = []
            for q, pixels in zip(query[b].chunk(module.heads, -1), x[b].flatten(1).chunk(module.heads)):
                heads.append((q @ pixels / pixels.shape[0] ** 0.5).softmax(-1) @ pixels.t())
            results.append(torch.cat(heads, -1))
        seen = module.proj(torch.stack(results) * gate)
        return F.layer_norm(tokens + seen, tokens.shape[-1:], module.norm.weight, module.norm.bias, module.norm.eps)
    key, value = module.key(tokens), module.value(tokens) * gate
    for b in range(x.shape[0]):
        heads = []
        parts = (key[b].chunk(module.heads, -1), value[b].chunk(module.heads, -1))
        for k, v, pixels in zip(*parts, x[b].flatten(1).chunk(module.heads)):
            heads.append(((k @ pixels / pixels.shape[0] ** 0.5).softmax(0).t() @ v).t())
        results.append(torch.cat(heads).unflatten(-1, x.shape[2:]))
    return x + torch.stack(results)


@pytest.mark.parametrize("kind", BRIDGES)
@pytest.mark.parametrize("settings", [{}, {"gate": True}, {"headwise": True}, {"heads": 1}, {"heads": 4}], ids=str)
@pytest.mark.parametrize("batch, tokens", [(1, 6), (3, 1)])
def test_bridge_against_its_formula(kind, settings, batch, tokens):
    module = randomise(kind(12, 16, dtype=torch.float64, **settings))
    x, z = inputs(batch, tokens=tokens)
    out, expected = module(x, z), sample_by_sample(module, x, z)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    leaves = [x, z, *module.parameters()]
    cotangent = torch.randn_like(out)
    grads = [torch.autograd.grad(y, leaves, cotangent) for y in (out, expected)]
    torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-6)  # hardsigmoid's gradient is no better in PyTorch


@pytest.mark.parametrize("kind", BRIDGES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_the_map_is_not_copied(kind, layout, monkeypatch):
    """What the op gets lies in the input's memory, and what it returns is what the module returns."""
    x = torch.randn(2, 12, 6, 8)
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    if layout == "sliced":
        x = torch.randn(2, 12, 12, 17)[:, :, ::2, 1::2]
    seen = {}
    name = "mobile_to_former" if kind is MobileToFormer else "former_to_mobile"
    original = getattr(module_under_test, name)

    def spy(*args, **kwargs):
        seen["in"] = next(a for a in args if a.dim() == 5)
        seen["out"] = original(*args, **kwargs)
        return seen["out"]

    monkeypatch.setattr(module_under_test, name, spy)
    with torch.no_grad():
        out = kind(12, 16)(x, torch.randn(2, 3, 16))
    assert seen["in"].data_ptr() == x.data_ptr() and seen["in"].stride()[-2:] == x.stride()[-2:]
    if kind is FormerToMobile:
        assert out.data_ptr() == seen["out"].data_ptr()
        wanted = torch.channels_last if layout == "channels_last" else torch.contiguous_format
        assert out.is_contiguous(memory_format=wanted)


@pytest.mark.parametrize("kind", BRIDGES)
def test_lower_precision_under_autocast(kind):
    """The residual stream keeps float32: it is not rounded on its way through the op."""
    module, (x, z) = randomise(kind(12, 16)), inputs(dtype=torch.float32)
    with torch.no_grad():
        exact = module(x, z)
        with torch.autocast("cpu", torch.bfloat16):
            out = module(x, z)
    assert out.dtype == torch.float32
    assert 0 < float((out - exact).abs().max()) < 0.2
    if kind is FormerToMobile:
        module.value.weight.data.zero_()
        module.value.bias.data.zero_()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(module(x, z), x)


def test_drop_path_drops_samples():
    drop = DropPath(0.25)
    x = torch.ones(4000, 2, 3)
    out = drop(x)
    assert out.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert torch.equal(out[:, :1, :1].expand_as(out), out)  # whole samples
    assert float(out.mean()) == pytest.approx(1.0, abs=0.05)
    assert drop.eval()(x) is x and DropPath()(x) is x
    with pytest.raises(ValueError, match=r"p is 1\.0"):
        DropPath(1.0)


@pytest.mark.parametrize("kind", BRIDGES)
def test_drop_path_of_a_bridge(kind):
    """Each sample is what it is without the branch, or with it scaled up."""
    module = randomise(kind(12, 16, drop_path=0.5, dtype=torch.float64))
    x, z = inputs(batch=16)
    out = module(x, z)
    module.eval()
    if kind is FormerToMobile:
        dropped, kept = x, x + 2 * (module(x, z) - x)
    else:
        dropped = module.norm(z)
        weight, bias = module.proj.weight.data.clone(), module.proj.bias.data.clone()
        module.proj.weight.data, module.proj.bias.data = 2 * weight, 2 * bias
        kept = module(x, z)
    which = [[torch.allclose(out[b], choice[b]) for b in range(16)] for choice in (dropped, kept)]
    assert all(a != b for a, b in zip(*which)) and 0 < sum(which[0]) < 16


def test_headwise_is_block_diagonal():
    headwise, full = HeadwiseLinear(6, 4, heads=2).double(), nn.Linear(6, 4).double()
    randomise(headwise)
    full.weight.data = torch.block_diag(*headwise.weight.data.chunk(2))
    full.bias.data = headwise.bias.data.clone()
    x = torch.randn(5, 3, 6, dtype=torch.float64)
    torch.testing.assert_close(headwise(x), full(x))


@pytest.mark.parametrize("settings", [{}, {"gate": True}, {"ffn_ratio": 0}, {"heads": 1}, {"ffn_ratio": 3}], ids=str)
@pytest.mark.parametrize("tokens", [1, 6])
def test_former_against_its_formula(settings, tokens):
    module = randomise(Former(16, dtype=torch.float64, **settings))
    z = torch.randn(3, tokens, 16, dtype=torch.float64)
    gate = 1.0 if module.gate is None else 2 * F.hardsigmoid(module.gate(z))
    parts = []
    for q, memory in zip(module.query(z).chunk(module.heads, -1), z.chunk(module.heads, -1)):
        parts.append((q @ memory.mT / memory.shape[-1] ** 0.5).softmax(-1) @ memory)
    expected = module.norm1(z + module.proj(torch.cat(parts, -1) * gate))
    if settings.get("ffn_ratio", 2):
        assert module.fc1.out_features == settings.get("ffn_ratio", 2) * 16
        expected = module.norm2(expected + module.fc2(F.gelu(module.fc1(expected))))
    torch.testing.assert_close(module(z), expected)


def test_dynamic_relu():
    module = DynamicReLU(5, 16).double()
    theirs = HyperFunc(16, 5, 0).double()
    randomise(module)
    theirs.hyper[0], theirs.hyper[2] = module.fc1, module.fc2
    x, z = torch.randn(2, 5, 3, 4, dtype=torch.float64), torch.randn(2, 16, dtype=torch.float64)
    out = module(x, z)
    torch.testing.assert_close(out, DyReLU()((x, theirs((z[None], None)))))
    assert not torch.allclose(out[0], module(x[:1], z[1:])[0])  # the token does matter
    for parameter in module.fc2.parameters():
        parameter.data.zero_()
    torch.testing.assert_close(module(x, z), x.relu())


@pytest.mark.parametrize("groups", [1, 4])
def test_mobile_keeps_or_halves_the_map(groups):
    z = torch.randn(2, 16)
    x = torch.randn(2, 8, 7, 10)
    same, wider = Mobile(8, 8, 3, 16, groups), Mobile(8, 16, 3, 16, groups)
    assert same(x, z).shape == x.shape and wider(x, z).shape == (2, 16, 7, 10)
    assert DownsampleMobile(8, 12, (6, 4), 16, groups)(x, z).shape == (2, 12, 4, 5)
    for module in (same, wider):
        module.norm3.weight.data.zero_()
    assert torch.equal(same(x, z), x)  # a residual block
    assert torch.equal(wider(x, z), torch.zeros(2, 16, 7, 10))
    assert isinstance(same.shuffle, nn.ChannelShuffle if groups > 1 else nn.Identity)


@pytest.mark.parametrize("kind", BRIDGES)
def test_copies_and_compiles(kind):
    module = randomise(kind(12, 16, gate=True)).eval()
    x, z = (t.detach() for t in inputs(dtype=torch.float32))
    expected = module(x, z)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x, z), expected)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(module, fullgraph=True, backend="aot_eager")(x, z), expected)


@pytest.mark.parametrize("kind", BRIDGES)
@pytest.mark.parametrize(
    "settings, match",
    [
        ({"channels": 7}, "channels is 7, want a multiple of heads = 2"),
        ({"channels": 0}, "channels is 0"),
        ({"heads": 0}, "heads is 0"),
        ({"token_dim": 0}, "token_dim is 0"),
        ({"token_dim": 9, "headwise": True}, "token_dim is 9, want a multiple"),
        ({"backend": "fastest"}, "backend"),
        ({"drop_path": -0.1}, "p is -0.1"),
    ],
    ids=str,
)
def test_bad_settings(kind, settings, match):
    with pytest.raises(ValueError, match=match):
        kind(**{"channels": 12, "token_dim": 16, **settings})


@pytest.mark.parametrize("kind", BRIDGES)
@pytest.mark.parametrize(
    "x, tokens, match",
    [
        ((2, 11, 4, 4), (2, 3, 16), "x is"),
        ((2, 12, 4), (2, 3, 16), "x is"),
        ((2, 12, 4, 4), (3, 2, 16), "tokens is"),  # tokens in front
        ((2, 12, 4, 4), (2, 3, 15), "tokens is"),
        ((2, 12, 4, 4), (2, 16), "tokens is"),
        ((2, 12, 4, 4), (2, 0, 16), "M is 0"),
    ],
    ids=str,
)
def test_bad_input(kind, x, tokens, match):
    with pytest.raises(ValueError, match=match):
        kind(12, 16)(torch.randn(x), torch.randn(tokens))


@pytest.mark.parametrize("settings", [{"token_dim": 10}, {"heads": 0}, {"ffn_ratio": -1}], ids=str)
def test_bad_former(settings):
    with pytest.raises(ValueError, match="Former: "):
        Former(**{"token_dim": 16, **settings})


@pytest.mark.parametrize("kind", BRIDGES)
def test_no_samples(kind):
    x, z = inputs(batch=0)
    out = kind(12, 16, dtype=torch.float64)(x, z)
    assert out.shape == (x if kind is FormerToMobile else z).shape
    out.sum().backward()
    assert x.grad.shape == x.shape and z.grad.shape == z.shape
