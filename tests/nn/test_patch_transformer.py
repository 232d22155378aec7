from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from mvkernels.nn import PatchTransformer, patch_transformer_layer


def plain(module: PatchTransformer, x: torch.Tensor) -> torch.Tensor:
    """The same with an unfold, nn.functional's attention on token sequences, and a fold."""
    ph, pw = module.patch_size
    b, c, h, w = x.shape
    z = x.view(b, c, h // ph, ph, w // pw, pw).permute(0, 3, 5, 2, 4, 1).reshape(b * ph * pw, -1, c)
    for layer in module.layers:
        qkv = layer.qkv(layer.norm1(z)).unflatten(-1, (3, module.heads, -1)).permute(2, 0, 3, 1, 4)
        attention = nn.functional.scaled_dot_product_attention(*qkv).transpose(1, 2).flatten(2)
        z = z + layer.proj(attention)
        z = z + layer.fc2(layer.activation(layer.fc1(layer.norm2(z))))
    z = module.norm(z)
    return z.view(b, ph, pw, h // ph, w // pw, c).permute(0, 5, 3, 1, 4, 2).reshape(b, c, h, w)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"patch_size": (1, 2), "heads": 3},
        {"patch_size": 4, "ffn_dim": 5, "activation": nn.GELU},
        {"final_norm": False, "norm_eps": 1e-2},
        {"depth": 0},
    ],
    ids=str,
)
@pytest.mark.parametrize("batch", [1, 2])
def test_against_unfold_and_fold(settings, batch):
    module = PatchTransformer(**{"dim": 12, "depth": 2, "dtype": torch.float64, **settings})
    x = torch.randn(batch, 12, 8, 4, dtype=torch.float64, requires_grad=True)
    expected, out = plain(module, x), module(x)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    leaves = [x, *module.parameters()]
    cotangent = torch.randn_like(out)
    grads = [torch.autograd.grad(y, leaves, cotangent, allow_unused=True) for y in (out, expected)]
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-9)


def test_layout_follows_the_input():
    module = PatchTransformer(8, 1)
    x = torch.randn(2, 8, 4, 6)
    out = module(x)
    assert out.is_contiguous()
    last = module(x.contiguous(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last, out)
    torch.testing.assert_close(module(x.transpose(2, 3).contiguous().transpose(2, 3)), out)


def test_any_size():
    module = PatchTransformer(8, 1, dtype=torch.float64)
    x = torch.randn(1, 8, 5, 7, dtype=torch.float64)
    out = module(x)
    even = module(x[:, :, ::2, ::2].repeat_interleave(2, 2).repeat_interleave(2, 3))
    torch.testing.assert_close(out[:, :, ::2, ::2], even[:, :, ::2, ::2])  # a group sees itself alone


def test_three_projections_are_one():
    packed = nn.Linear(8, 24).double()
    parts = []
    for weight, bias in zip(packed.weight.chunk(3), packed.bias.chunk(3)):
        part = nn.Linear(8, 8).double()
        part.load_state_dict({"weight": weight, "bias": bias})
        parts.append(part)
    rest = {
        "norm1": nn.LayerNorm(8).double(),
        "proj": nn.Linear(8, 8).double(),
        "norm2": nn.LayerNorm(8).double(),
        "fc1": nn.Linear(8, 16).double(),
        "activation": nn.functional.silu,
        "fc2": nn.Linear(16, 8).double(),
        "heads": 2,
    }
    x = torch.randn(2, 4, 4, 8, dtype=torch.float64)
    a, b = (patch_transformer_layer(x, qkv=qkv, **rest) for qkv in (packed, tuple(parts)))
    torch.testing.assert_close(a, b)
    a.sum().backward()
    expected = packed.weight.grad
    b.sum().backward()
    torch.testing.assert_close(torch.cat([p.weight.grad for p in parts]), expected)


def test_dropout_only_in_training():
    module = PatchTransformer(8, 2, dropout=0.5)
    x = torch.randn(1, 8, 4, 4)
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert torch.equal(module(x), module(x))


def test_hooks_and_copies():
    module = PatchTransformer(8, 1).eval()
    x = torch.randn(1, 8, 4, 6)
    shapes = []
    for part in (module.layers[0].qkv, module.layers[0].fc2):
        part.register_forward_hook(lambda m, i, o: shapes.append(tuple(o.shape)))
    out = module(x)
    assert shapes == [(1, 4, 6, 24), (1, 4, 6, 8)]
    assert torch.equal(copy.deepcopy(module)(x), out)


def test_compiles_without_graph_breaks():
    module = PatchTransformer(8, 1).eval()
    x = torch.randn(1, 8, 4, 5)
    torch.testing.assert_close(torch.compile(module, fullgraph=True, backend="eager")(x), module(x))


@pytest.mark.parametrize(
    "settings, error",
    [
        ({"dim": 10}, ValueError),
        ({"heads": 0}, ValueError),
        ({"depth": -1}, ValueError),
        ({"ffn_dim": 0}, ValueError),
        ({"patch_size": 0}, ValueError),
        ({"patch_size": "2"}, TypeError),
        ({"backend": "fastest"}, ValueError),
    ],
    ids=str,
)
def test_bad_settings(settings, error):
    with pytest.raises(error, match=next(iter(settings))):
        PatchTransformer(**{"dim": 8, "depth": 1, **settings})


@pytest.mark.parametrize("shape", [(1, 4, 4, 8), (8, 4, 4), (1, 8, 4, 4, 1)], ids=str)
def test_bad_input(shape):
    with pytest.raises(ValueError, match="PatchTransformer: x is"):
        PatchTransformer(8, 1)(torch.randn(shape))
