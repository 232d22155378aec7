"""Irregular patches and adaptive fusion: the grids, the invariants of the fusion, every open point's settings."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mvmodels
from mvkernels import third_party
from mvmodels.irregular_vit import AdaptivePatchFusion, IrregularPatchEmbedding, IrregularViT, Size
from tests.models.agreement import backends_agree

SMALL = Size(24, 2, 3)
TRUNK = (8, 8, 12, 16)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def small(**options) -> IrregularViT:
    model = IrregularViT(SMALL, num_classes=5, **{"trunk": TRUNK, **options})
    third_party.randomise(model)
    return model.eval()


@pytest.mark.parametrize("name, params", [("irregular_vit_tiny", 6_867_131), ("irregular_vit_small", 25_058_267)])
def test_parameters_and_multiply_adds(name, params):
    info = mvmodels.model_info(name)
    with torch.device("meta"):
        model = mvmodels.create_model(name)
        macs = mvmodels.count_macs(model, torch.empty(1, 3, 224, 224)) / 1e6
    assert sum(p.numel() for p in model.parameters()) == info.params == params
    assert round(macs, 1) == info.macs
    assert info.published_params == info.published_flops == "" and info.published_top1 is None


@pytest.mark.parametrize("coarse", ["two", "one"])
def test_sixty_six_tokens(coarse):
    embedding = IrregularPatchEmbedding(3, 24, TRUNK, coarse=coarse).eval()
    maps = embedding(torch.randn(2, 3, 224, 224))
    assert [tuple(m.shape) for m in maps] == [(2, 24, 7, 7), (2, 24, 4, 4), (2, 24, 1, 1)]
    model = small(coarse=coarse)
    tokens, grids = model.forward_features(torch.randn(1, 3, 224, 224))
    assert tokens.shape == (1, 66, 24) and grids == model.grids == ((7, 7), (4, 4), (1, 1))


def test_tokens_are_row_major_fine_to_whole():
    """Without positions and encoder the tokens are the branches' maps, row by row."""
    model = small(position=False)
    model.blocks, model.norm = torch.nn.Sequential(), torch.nn.Identity()
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        fine, coarse, whole = model.embedding(x)
        tokens, _ = model.forward_features(x)
    assert torch.equal(tokens[0, 9], fine[0, :, 1, 2])
    assert torch.equal(tokens[0, 49 + 6], coarse[0, :, 1, 2])
    assert torch.equal(tokens[0, 65], whole[0, :, 0, 0])


def test_the_single_token_sees_the_whole_picture():
    embedding = IrregularPatchEmbedding(1, 8, TRUNK).eval()
    x = torch.randn(1, 1, 64, 64, requires_grad=True)
    (grad,) = torch.autograd.grad(embedding(x)[2].square().sum(), x)
    assert all(float(corner.abs().max()) > 0 for corner in (grad[..., :8, :8], grad[..., -8:, -8:]))


def fusion(tokens: int, dim: int, **options) -> AdaptivePatchFusion:
    module = AdaptivePatchFusion(dim, tokens, **options)
    torch.nn.init.normal_(module.weight)
    return module.double()


def always_one(module: AdaptivePatchFusion) -> AdaptivePatchFusion:
    """m = 1, whatever the tokens: the sigmoid of a large number is 1."""
    torch.nn.init.zeros_(module.mlp[2].weight)
    torch.nn.init.constant_(module.mlp[2].bias, 100.0)
    return module


shapes = st.tuples(st.integers(1, 3), st.integers(1, 70), st.integers(1, 40))


@settings(max_examples=20, deadline=None)
@given(shape=shapes, per_channel=st.booleans(), source=st.sampled_from(["token", "mean"]))
def test_it_starts_as_the_mean(shape, per_channel, source):
    """(a) s = 1/N as it is at first, and m = 1: mean pooling."""
    batch, count, dim = shape
    module = always_one(AdaptivePatchFusion(dim, count, per_channel=per_channel, source=source).double())
    tokens = torch.randn(batch, count, dim, dtype=torch.float64)
    torch.testing.assert_close(module(tokens), tokens.mean(1), rtol=1e-6, atol=1e-6)


@settings(max_examples=20, deadline=None)
@given(shape=shapes, per_channel=st.booleans(), softmax=st.booleans(), seed=st.integers(0, 99))
def test_order_does_not_matter(shape, per_channel, softmax, seed):
    """(b) Tokens and s permuted together give the same, where m is each token's own."""
    batch, count, dim = shape
    torch.manual_seed(seed)
    module = fusion(count, dim, per_channel=per_channel, softmax=softmax)
    tokens = torch.randn(batch, count, dim, dtype=torch.float64)
    expected, order = module(tokens), torch.randperm(count)
    with torch.no_grad():
        module.weight.copy_(module.weight[order].clone())
    torch.testing.assert_close(module(tokens[:, order]), expected)


def test_order_matters_where_the_mean_token_decides():
    module = fusion(6, 8, source="mean")
    tokens, order = torch.randn(1, 6, 8, dtype=torch.float64), torch.tensor([1, 2, 3, 4, 5, 0])
    expected = module(tokens)
    with torch.no_grad():
        module.weight.copy_(module.weight[order].clone())
    assert not torch.allclose(module(tokens[:, order]), expected)


@settings(max_examples=20, deadline=None)
@given(shape=shapes, data=st.data(), per_channel=st.booleans())
def test_one_token_can_be_all(shape, data, per_channel):
    """(c) s one-hot and m = 1 selects a token."""
    batch, count, dim = shape
    chosen = data.draw(st.integers(0, count - 1))
    module = always_one(fusion(count, dim, per_channel=per_channel))
    torch.nn.init.zeros_(module.weight)
    with torch.no_grad():
        module.weight[chosen] = 1.0
    tokens = torch.randn(batch, count, dim, dtype=torch.float64)
    torch.testing.assert_close(module(tokens), tokens[:, chosen])


def test_softmax_weighs_one_in_all():
    module = fusion(9, 4, softmax=True, per_channel=True)
    weights = module.weights(torch.randn(3, 9, 4, dtype=torch.float64))
    assert weights.shape == (3, 9, 4)
    torch.testing.assert_close(weights.sum(1), torch.ones(3, 4, dtype=torch.float64))


@pytest.mark.parametrize("source", ["token", "mean"])
def test_other_grids_weigh_alike(source):
    """The mean stays the mean of the grids' means, weighted as trained, when a picture is larger."""
    trained, wanted = ((2, 2), (1, 1)), ((4, 6), (1, 1))
    module = always_one(AdaptivePatchFusion(8, trained, source=source))
    tokens = torch.randn(2, 25, 8)
    expected = (4 * tokens[:, :24].mean(1) + tokens[:, 24]) / 5
    torch.testing.assert_close(module(tokens, wanted), expected)


OPTIONS = [
    {},
    {"position": False, "coarse": "one", "se_ratio": 0.0},
    {"fusion": "mean", "softmax": True},
    {"per_channel": True, "activation": "hardswish", "expansion": 2, "reduction": 8},
]


@pytest.mark.core
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "+".join(o) or "default")
@pytest.mark.parametrize("size", [(64, 64), (45, 70)], ids=str)
def test_backends_agree_and_every_parameter_learns(options, size):
    def build(backend):
        torch.manual_seed(1)
        return small(backend=backend, **options)

    gradients = backends_agree(build, torch.randn(2, 3, *size), 5)
    silent = [name for name, gradient in gradients.items() if not gradient.abs().sum() > 0]
    assert not silent, silent


def test_bfloat16_is_near():
    model, x = small(), torch.randn(2, 3, 64, 48)
    with torch.no_grad():
        expected = model(x)
        half = model.bfloat16()(x.bfloat16()).float()
    assert (half - expected).abs().max() < 0.1 * expected.abs().max()


def test_features():
    model = small(features_only=True)
    assert model.stages == ((24, 32), (24, 64))
    x = torch.randn(1, 3, 128, 192)
    with torch.no_grad():
        maps = model(x)
    assert [tuple(m.shape) for m in maps] == [(1, 24, 4, 6), (1, 24, 2, 3)]
    full = small()
    mvmodels.load_weights(model, full.state_dict(), source="mvmodels")
    with torch.no_grad():
        tokens, _ = full.forward_features(x)
        assert torch.equal(model(x)[0][0, :, 1, 2], tokens[0, 8])


@pytest.mark.parametrize(
    "options, match",
    [
        ({"coarse": "three"}, "coarse is 'three'"),
        ({"fusion": "max"}, "source is 'max'"),
        ({"activation": "tanh"}, "activation is 'tanh', want one of"),
        ({"trunk": (8, 8)}, "want 4 widths"),
        ({"expansion": 0}, "expansion is 0"),
        ({"num_classes": 0}, "num_classes is 0"),
    ],
    ids=str,
)
def test_bad_settings(options, match):
    with pytest.raises(ValueError, match=match):
        mvmodels.create_model("irregular_vit_tiny", **options)


def test_bad_input():
    with pytest.raises(ValueError, match="IrregularViT: x is"):
        small()(torch.randn(1, 1, 64, 64))
