"""ViT with either stem: sizes, weights of timm and transformers, backends, other picture sizes."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

import mvmodels
from mvkernels import third_party
from mvmodels.encoder import TokenAttention, resize_tokens
from mvmodels.vit import SIZES, VisionTransformer
from tests.models.agreement import backends_agree, need_cpp

# Counted here; the paper's tables print millions of parameters and billions of multiply-adds.
TABLE = {
    "vit_c_1gf": (4_567_936, 4.6, 1.1),
    "vit_c_4gf": (17_754_136, 17.8, 4.0),
    "vit_c_18gf": (81_573_160, 81.6, 17.7),
    "vit_c_36gf": (167_796_008, 167.8, 35.0),
    "vit_p_1gf": (4_830_376, 4.8, 1.1),
    "vit_p_4gf": (18_507_112, 18.5, 3.9),
    "vit_p_18gf": (86_567_656, 86.7, 17.5),
    "vit_p_36gf": (178_364_392, 178.4, 35.9),
}
SHALLOW = dataclasses.replace(SIZES["1gf"], depth=2)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("name", TABLE)
def test_parameters_and_multiply_adds(name):
    counted, published, gigas = TABLE[name]
    info = mvmodels.model_info(name)
    with torch.device("meta"):
        model = mvmodels.create_model(name)
        macs = mvmodels.count_macs(model, torch.empty(1, 3, 224, 224)) / 1e6
    assert sum(p.numel() for p in model.parameters()) == counted == info.params
    assert round(macs, 1) == info.macs
    assert (info.published_params, info.published_flops) == (f"{published}M", f"{gigas}G")
    assert counted / 1e6 == pytest.approx(published, rel=0.03) and macs / 1e3 == pytest.approx(gigas, rel=0.03)


def test_twins_differ_in_the_stem_and_by_one_block():
    with torch.device("meta"):
        conv, patch = (mvmodels.create_model(f"vit_{stem}_4gf") for stem in "cp")
    assert len(patch.blocks) == len(conv.blocks) + 1
    strides = [m.stride[0] for m in conv.stem.modules() if isinstance(m, nn.Conv2d)]
    assert strides == [2, 2, 2, 2, 1]
    with torch.device("meta"):
        stem = mvmodels.create_model("vit_c_18gf").stem
    assert [layer.conv.stride[0] for layer in stem.convs] == [2, 2, 1, 2, 1, 2]
    assert stem.proj.bias is not None and stem.convs[0].conv.bias is None


def shallow(conv_stem: bool, **settings) -> VisionTransformer:
    model = VisionTransformer(SHALLOW, conv_stem, num_classes=5, **settings)
    third_party.randomise(model)
    return model.eval()


@pytest.mark.core
def test_attention_is_that_of_torch():
    attention = TokenAttention(24, 3).double()
    x = torch.randn(2, 11, 24, dtype=torch.float64)
    q, k, v = attention.qkv(x).unflatten(2, (3, 3, 8)).permute(2, 0, 3, 1, 4)
    expected = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(attention(x), attention.proj(expected))


@pytest.mark.parametrize("conv_stem", [True, False], ids=["conv", "patch"])
@pytest.mark.parametrize("size", [(64, 64), (50, 35)], ids=str)
def test_backends_agree(conv_stem, size):
    def build(backend):
        torch.manual_seed(1)
        return shallow(conv_stem, backend=backend)

    backends_agree(build, torch.randn(2, 3, *size), 5)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_bfloat16_is_near(backend):
    if backend == "cpp":
        need_cpp()
    model = shallow(True, backend=backend)
    x = torch.randn(2, 3, 64, 48)
    with torch.no_grad():
        expected = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            cast = model(x).float()
    half = model.bfloat16()(x.bfloat16())
    half.float().square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    for out in (cast, half.detach().float()):
        assert (out - expected).abs().max() < 0.1 * expected.abs().max()


def test_compiles_and_exports():
    """In one graph, at a size whose positions are resized; an exported one needs nothing of this library."""
    model, x = shallow(False).double(), torch.randn(1, 3, 40, 48, dtype=torch.float64)
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(x), expected)
        program = torch.export.export(model, (x,))
        torch.testing.assert_close(program.module()(x), expected)
    namespaces = {str(node.target).split(".")[0] for node in program.graph.nodes if node.op == "call_function"}
    assert not any(name.startswith("mvkernels") for name in namespaces), namespaces


@pytest.mark.parametrize("conv_stem", [True, False], ids=["conv", "patch"])
def test_every_parameter_learns(conv_stem):
    model = shallow(conv_stem).train()
    model(torch.randn(2, 3, 40, 32)).square().sum().backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not silent, silent


def test_features():
    model = mvmodels.create_model("vit_c_1gf", features_only=True).eval()
    assert model.stages == ((192, 16),)
    full = mvmodels.create_model("vit_c_1gf").eval()
    mvmodels.load_weights(model, full.state_dict(), source="mvmodels")
    x = torch.randn(1, 3, 70, 48)
    with torch.no_grad():
        (features,) = model(x)
        assert features.shape == (1, 192, 5, 3)
        assert torch.equal(features, full.forward_features(x)[1])


def test_positions_follow_the_picture():
    """The trained grid has its own positions; another has them resized, and the class token keeps its own."""
    values = torch.randn(1, 1 + 6, 4)
    assert resize_tokens(values, ((1, 1), (2, 3)), ((1, 1), (2, 3)), "bicubic") is values
    wider = resize_tokens(values, ((1, 1), (2, 3)), ((1, 1), (4, 6)), "bilinear")
    assert wider.shape == (1, 25, 4) and torch.equal(wider[:, 0], values[:, 0])
    torch.testing.assert_close(wider[:, 1:].mean(1), values[:, 1:].mean(1))
    summed = resize_tokens(values.abs(), ((1, 1), (2, 3)), ((1, 1), (4, 6)), "bilinear", keep_sum=True)
    torch.testing.assert_close(summed.sum(1), values.abs().sum(1))
    # Pictures of one size give what a model that was built for it gives.
    model = shallow(False, image_size=(32, 48))
    other = shallow(False, image_size=(64, 96))
    weights = model.state_dict()
    weights["pos_embed"] = resize_tokens(model.pos_embed.detach(), ((1, 1), (2, 3)), ((1, 1), (4, 6)), "bicubic")
    other.load_state_dict(weights)
    x = torch.randn(1, 3, 64, 96)
    torch.testing.assert_close(model(x), other(x))


def test_the_rest_of_a_picture_is_zero():
    model = shallow(False)
    x = torch.randn(1, 3, 50, 35)
    torch.testing.assert_close(model(x), model(nn.functional.pad(x, (0, 13, 0, 14))))


class TestOtherLibraries:
    def model(self) -> nn.Module:
        size = dataclasses.replace(SIZES["1gf"], dim=48, depth=2, heads=3, mlp_ratio=3)
        return VisionTransformer(size, False, num_classes=7, image_size=64).eval()

    def test_timm(self):
        timm = pytest.importorskip("timm")
        other = timm.models.vision_transformer.VisionTransformer(
            img_size=64, embed_dim=48, depth=3, num_heads=3, mlp_ratio=3, num_classes=7
        )
        third_party.randomise(other)
        model = self.model()
        mvmodels.load_weights(model, other.state_dict(), source="timm")
        self.same(model, other.eval(), lambda out: out)

    def test_transformers(self):
        transformers = pytest.importorskip("transformers")
        config = transformers.ViTConfig(
            hidden_size=48, num_hidden_layers=3, num_attention_heads=3, intermediate_size=144, image_size=64,
            num_labels=7, layer_norm_eps=1e-6,
        )  # fmt: skip
        other = transformers.ViTForImageClassification(config)
        third_party.randomise(other)
        model = self.model()
        mvmodels.load_weights(model, other.state_dict(), source="transformers")
        self.same(model, other.eval(), lambda out: out.logits)

    @staticmethod
    def same(model, other, logits):
        x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
        with torch.no_grad():
            expected = logits(other.double()(x))
            assert expected.std() > 1e-2
            torch.testing.assert_close(model.double()(x), expected, rtol=1e-6, atol=1e-6)

    def test_the_convolution_stem_has_no_other_names(self):
        with pytest.raises(ValueError, match="source is 'timm', want mvmodels"):
            mvmodels.load_weights(shallow(True), {}, source="timm")


@pytest.mark.parametrize(
    "settings, match",
    [
        ({"num_classes": 0}, "num_classes is 0"),
        ({"image_size": 0}, "image_size is 0"),
        ({"backend": "fast"}, "backend"),
    ],
    ids=str,
)
def test_bad_settings(settings, match):
    with pytest.raises(ValueError, match=match):
        mvmodels.create_model("vit_c_1gf", **settings)(torch.randn(1, 3, 32, 32))


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 1, 32, 32), (1, 3, 0, 32)], ids=str)
def test_bad_input(shape):
    with pytest.raises(ValueError, match="VisionTransformer: x is"):
        shallow(True)(torch.randn(shape))
