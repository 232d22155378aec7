"""The seven networks: sizes, values against the authors' layout, checkpoints, features."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import mvkernels
import mvmodels
from mvkernels import third_party
from tests import mobile_former_layout as layout

# The published table: exact parameters, millions of multiply-adds, printed parameters, top-1.
TABLE = {
    "26m": (3_232_788, 23.5, "3.2M", 64.0),
    "52m": (3_469_092, 49.3, "3.5M", 68.7),
    "96m": (4_585_252, 92.0, "4.6M", 72.8),
    "151m": (7_595_828, 146.1, "7.6M", 75.2),
    "214m": (9_425_920, 208.2, "9.4M", 76.7),
    "294m": (11_422_648, 286.6, "11.4M", 77.9),
    "508m": (13_976_976, 498.3, "14.0M", 79.3),
}
# Random weights magnify the last bit of an input to as much as 1e-9 of the logits.
WHOLE_MODEL = {"rtol": 1e-7, "atol": 1e-7}
CHANNELS = {
    "26m": (8, 12, 24, 64, 96),
    "52m": (8, 12, 24, 64, 96),
    "96m": (12, 16, 32, 88, 128),
    "151m": (12, 16, 32, 88, 128),
    "214m": (12, 20, 40, 112, 160),
    "294m": (16, 24, 48, 128, 192),
    "508m": (24, 40, 72, 176, 240),
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def theirs(size: str, **settings) -> nn.Module:
    model = layout.MobileFormer(size, **settings)
    third_party.randomise(model)
    nn.init.normal_(model.tokens.weight)
    return model.eval()


def pair(size: str, **settings) -> tuple[nn.Module, nn.Module]:
    """The same network twice, with the same weights: laid out as the authors' code, and ours."""
    other = theirs(size, **settings)
    model = mvmodels.create_model(f"mobile_former_{size}", **settings)
    mvmodels.load_weights(model, other.state_dict(), source="authors")
    return other, model.eval()


@pytest.mark.parametrize("size", TABLE)
def test_parameters_and_multiply_adds(size):
    parameters, macs, printed, top1 = TABLE[size]
    model = mvmodels.create_model(f"mobile_former_{size}")
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert round(mvmodels.count_macs(model, torch.randn(1, 3, 224, 224)) / 1e6, 1) == macs
    assert model.training  # counting leaves no trace
    assert not any(m._forward_hooks for m in model.modules())
    info = mvmodels.model_info(f"mobile_former_{size}")
    assert (info.params, info.macs, info.published_params, info.published_top1) == (parameters, macs, printed, top1)
    assert info.published_flops == size.upper() and "2108.05895" in info.paper


@pytest.mark.core
@pytest.mark.parametrize("size", TABLE)
def test_logits_of_the_authors_layout_in_float64(size):
    """Odd sizes and a batch: tokens in front mix samples up only where there are several."""
    other, model = (m.double() for m in pair(size, num_classes=7))
    x = torch.randn(2, 3, 70, 94, dtype=torch.float64)
    with torch.no_grad():
        expected = other(x)
        assert expected.std() > 1e-3  # an answer to compare
        torch.testing.assert_close(model(x), expected, **WHOLE_MODEL)
        last = copy.deepcopy(model).to(memory_format=torch.channels_last)
        out = last(x.contiguous(memory_format=torch.channels_last))
        torch.testing.assert_close(out, expected, **WHOLE_MODEL)


@pytest.mark.parametrize("size", ["26m", "96m"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
def test_gradients_of_the_authors_layout_in_float64(size, training):
    other, model = (m.double().train(training) for m in pair(size, num_classes=3))
    x = torch.randn(4, 3, 66, 64, dtype=torch.float64)
    cotangent = torch.randn(4, 3, dtype=torch.float64)
    grads = []
    for network in (other, model):
        parameters = dict(network.named_parameters())
        grads.append(dict(zip(parameters, torch.autograd.grad(network(x), parameters.values(), cotangent))))
    expected, actual = grads
    assert len(actual) == len(expected)
    for name, grad in actual.items():
        reference = expected[model.weight_sources["authors"].name_of(name)]
        # PyTorch's gradient of hardsigmoid has a sixth to float32's precision, in float64 too. Statistics of four
        # samples are badly conditioned: dividing by them magnifies rounding.
        tolerance = (1e-5 if training else 1e-6) * max(1.0, float(reference.abs().max()))
        torch.testing.assert_close(grad, reference, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("size", ["26m", "96m", "508m"])
@pytest.mark.parametrize("batch", [1, 2])
def test_blocks_of_the_authors_layout_in_float32(size, batch):
    other, model = pair(size)
    tokens = torch.randn(model.tokens.shape[0], batch, model.tokens.shape[1])
    for ours, block in zip(model.blocks, other.features):
        x = torch.randn(
            batch, ours.conv1.in_channels if hasattr(ours, "conv1") else ours.mobile.conv1.in_channels, 9, 7
        )
        before = x.clone()
        with torch.no_grad():
            features, after = block((x, tokens))
            y, z = ours(x, tokens.transpose(0, 1))
        assert torch.equal(x, before)
        torch.testing.assert_close(y, features, rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(z.transpose(0, 1), after, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("size", TABLE)
def test_features(size):
    model = mvmodels.create_model(f"mobile_former_{size}", features_only=True).eval()
    assert model.stages == tuple(zip(CHANNELS[size], (2, 4, 8, 16, 32)))
    with torch.no_grad():
        maps = model(torch.randn(1, 3, 64, 96))
    assert [tuple(m.shape) for m in maps] == [(1, c, 64 // r, 96 // r) for c, r in model.stages]
    other = theirs(size)
    mvmodels.load_weights(model, other.state_dict())  # the head is passed over
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        tokens = other.tokens.weight[:, None]
        expected = other.double().features((other.stem(x.double()), tokens.double()))[0]
        torch.testing.assert_close(model.double()(x.double())[-1], expected, **WHOLE_MODEL)


def test_every_parameter_learns():
    for settings in ({}, {"plain": True}, {"features_only": True}):
        model = mvmodels.create_model("mobile_former_26m", num_classes=3, **settings)
        third_party.randomise(model)
        out = model(torch.randn(2, 3, 64, 64))
        sum(m.square().mean() for m in (out if isinstance(out, list) else [out])).backward()
        silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
        # Of the last bridge only the first token goes on; a key's bias shifts all scores of a pixel's row alike.
        assert not silent, silent


def test_settings():
    model = mvmodels.create_model("mobile_former_26m", num_classes=5, in_chans=1, stem_stride=1, drop_rate=0.25)
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 5)
    assert model.stages[0] == (8, 1) and model.stages[-1] == (96, 16)
    assert model.head.dropout.p == 0.25
    model = mvmodels.create_model("mobile_former_52m", drop_path_rate=0.3)
    rates = [b.former.drop_path.p for b in model.blocks[1:]]
    assert rates == pytest.approx([0.3 * (i + 2) / 9 for i in range(8)])
    assert model.mobile_to_former.drop_path.p == 0.3


def test_plain_bridges():
    """The paper's equations: no gate, and each head projects its own slice of a token."""
    authors = mvmodels.create_model("mobile_former_96m")
    plain = mvmodels.create_model("mobile_former_96m", plain=True)
    names = [name for name, _ in plain.named_parameters()]
    assert not any("gate" in name for name in names)
    assert plain.blocks[1].mobile_to_former.query.weight.shape == (12, 64)
    assert plain.blocks[1].former_to_mobile.key.weight.shape == (16, 64)
    bridges = sum(b.mobile_to_former.channels for b in authors.blocks[1:]) + authors.mobile_to_former.channels
    back = sum(b.former_to_mobile.channels for b in authors.blocks[1:])
    saved = bridges * (128 + 1 + 64) + 2 * back * 64  # gates, and half of each query, key and value
    count = [sum(p.numel() for p in m.parameters()) for m in (authors, plain)]
    assert count[0] - count[1] == saved
    with pytest.raises(ValueError, match=r"features\.1\.local_global\.q\.weight is"):
        mvmodels.load_weights(plain, theirs("96m").state_dict())


def test_backend_reaches_every_bridge():
    model = mvmodels.create_model("mobile_former_26m", backend="cuda")
    with pytest.raises(mvkernels.BackendUnavailable):
        model(torch.randn(2, 3, 32, 32))
    bridges = [m for m in model.modules() if isinstance(m, (mvkernels.nn.MobileToFormer, mvkernels.nn.FormerToMobile))]
    assert len(bridges) == 17 and all(m.backend == "cuda" for m in bridges)


def test_compiles_and_exports():
    model = mvmodels.create_model("mobile_former_26m", num_classes=3).eval()
    third_party.randomise(model)
    model.double()
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        expected = model(x)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x), expected)
        program = torch.export.export(model, (x,))
        torch.testing.assert_close(program.module()(x), expected)
    namespaces = {str(node.target).split(".")[0] for node in program.graph.nodes if node.op == "call_function"}
    assert not any(name.startswith("mvkernels") for name in namespaces), namespaces


@pytest.mark.parametrize(
    "name, settings, error, match",
    [
        ("mobile_former_295m", {}, ValueError, "mobile_former_294m"),
        (None, {}, ValueError, "unknown model None"),
        ("mobile_former_26m", {"num_classes": 0}, ValueError, "num_classes is 0"),
        ("mobile_former_26m", {"in_chans": 0}, ValueError, "in_chans is 0"),
        ("mobile_former_26m", {"stem_stride": 4}, ValueError, "stem_stride is 4"),
        ("mobile_former_26m", {"drop_path_rate": 1.0}, ValueError, "want 0 <= drop_path_rate < 1"),
        ("mobile_former_26m", {"backend": "fastest"}, ValueError, "backend"),
        ("mobile_former_26m", {"depth": 3}, TypeError, "depth"),
    ],
    ids=str,
)
def test_bad_settings(name, settings, error, match):
    with pytest.raises(error, match=match):
        mvmodels.create_model(name, **settings)


@pytest.mark.parametrize("shape", [(3, 64, 64), (1, 1, 64, 64)], ids=str)
def test_bad_input(shape):
    with pytest.raises(ValueError, match="MobileFormer: x is"):
        mvmodels.create_model("mobile_former_26m")(torch.randn(shape))


def test_list_models():
    assert mvmodels.list_models("mobile_former_*") == [f"mobile_former_{size}" for size in TABLE]
    assert mvmodels.list_models("mobile_former_2*m") == [
        "mobile_former_26m",
        "mobile_former_214m",
        "mobile_former_294m",
    ]
    assert mvmodels.list_models("resnet*") == []


class TestLoadWeights:
    @pytest.fixture(scope="class")
    def checkpoint(self):
        return theirs("26m").state_dict()

    def model(self, **settings):
        return mvmodels.create_model("mobile_former_26m", **settings)

    @pytest.mark.parametrize("key", ["state_dict", "model", None])
    def test_forms_of_checkpoint(self, checkpoint, key):
        model = self.model()
        wrapped = {f"module.{name}": value for name, value in checkpoint.items()}
        mvmodels.load_weights(model, {key: wrapped, "epoch": 3} if key else wrapped)
        assert torch.equal(model.tokens, checkpoint["tokens.weight"])
        assert torch.equal(model.head.classifier.weight, checkpoint["classifier.classifier.1.weight"])

    def test_every_tensor_arrives(self, checkpoint):
        model = self.model()
        mvmodels.load_weights(model, checkpoint)
        own = model.state_dict()
        name_of = model.weight_sources["authors"].name_of
        assert sorted(map(name_of, own)) == sorted(checkpoint)
        assert all(torch.equal(value, checkpoint[name_of(name)]) for name, value in own.items())

    def test_own_names(self):
        first, second = self.model(), self.model()
        mvmodels.load_weights(second, first.state_dict(), source="mvmodels")
        assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters()))
        features = self.model(features_only=True)
        mvmodels.load_weights(features, first.state_dict(), source="mvmodels")
        assert torch.equal(features.tokens, first.tokens)

    def test_counts_of_batches_may_be_missing(self, checkpoint):
        kept = {name: v for name, v in checkpoint.items() if not name.endswith("num_batches_tracked")}
        mvmodels.load_weights(self.model(), kept)

    def test_everything_that_does_not_fit_is_listed(self, checkpoint):
        model = self.model()
        before = copy.deepcopy(model.state_dict())
        changed = dict(checkpoint)
        del changed["features.3.local_global.alpha.0.bias"]
        changed["features.3.local_global.beta"] = torch.zeros(1)
        changed["classifier.classifier.1.weight"] = torch.zeros(10, 1024)
        changed["stem.1.bias"] = "none"
        with pytest.raises(ValueError) as caught:
            mvmodels.load_weights(model, changed)
        assert str(caught.value).split("\n  ")[1:] == [
            "features.3.local_global.alpha.0.bias is missing",
            "features.3.local_global.beta has no counterpart in the model",
            "stem.1.bias is a str, want a tensor",
            "classifier.classifier.1.weight is (10, 1024), want (1000, 1024)",
        ]
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    def test_another_size(self, checkpoint):
        with pytest.raises(ValueError, match=r"and \d+ more"):
            mvmodels.load_weights(mvmodels.create_model("mobile_former_96m"), checkpoint)

    def test_bad_arguments(self, checkpoint):
        with pytest.raises(TypeError, match="model is a str"):
            mvmodels.load_weights("mobile_former_26m", checkpoint)
        with pytest.raises(TypeError, match="state_dict is a str"):
            mvmodels.load_weights(self.model(), "26m.pth")
        with pytest.raises(ValueError, match="source is 'timm'"):
            mvmodels.load_weights(self.model(), checkpoint, source="timm")
        with pytest.raises(ValueError, match="Linear does not know the authors' names"):
            mvmodels.load_weights(nn.Linear(2, 2), checkpoint)
