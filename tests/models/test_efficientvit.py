"""The eight EfficientViTs: sizes, logits of timm's models, checkpoints of timm and of the authors, features."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import nn

import mvkernels
import mvmodels
from mvkernels import third_party

# Exact parameters, millions of multiply-adds, what the authors print, top-1 at 224.
TABLE = {
    "b0": (3_410_008, 100.2, "", "", None),
    "b1": (9_102_024, 519.2, "9.1M", "0.52G", 79.39),
    "b2": (24_330_712, 1584.9, "24M", "1.6G", 82.10),
    "b3": (48_646_056, 3953.8, "49M", "4.0G", 83.47),
    "l0": (42_422_280, 4594.7, "", "", None),
    "l1": (52_654_088, 5258.5, "53M", "5.3G", 84.48),
    "l2": (63_707_016, 6949.9, "64M", "6.9G", 85.05),
    "l3": (246_037_288, 27586.5, "246M", "28G", 85.81),
}
IN_TIMM = [size for size in TABLE if size != "l0"]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def theirs(size: str, **settings) -> nn.Module:
    timm = pytest.importorskip("timm")
    model = timm.create_model(f"efficientvit_{size}", **settings)
    third_party.randomise(model)
    return model.eval()


def pair(size: str, **settings) -> tuple[nn.Module, nn.Module]:
    """The same network twice, with the same weights: timm's, and ours."""
    other = theirs(size, **settings)
    model = mvmodels.create_model(f"efficientvit_{size}", **settings)
    mvmodels.load_weights(model, other.state_dict(), source="timm")
    return other, model.eval()


def as_mit(state_dict: dict[str, torch.Tensor], large: bool) -> dict[str, torch.Tensor]:
    """timm's names turned into those of the authors' code, by what their layers are called there."""
    renamed = {}
    for name, value in state_dict.items():
        parts = name.split(".")
        if parts[0] == "stem":
            place = 0 if parts[1] == "in_conv" else 1 + int(parts[1].removeprefix("res"))
            first = ["stages", "0"] if large else ["input_stem"]
            parts = ["backbone", *first, "op_list", str(place), *parts[2:]]
        elif parts[0] == "stages":
            parts = ["backbone", "stages", str(int(parts[1]) + large), "op_list", *parts[3:]]
        elif parts[1] == "in_conv":
            parts = ["head", "op_list", "0", *parts[2:]]
        else:
            layer = {"0": ["2", "linear"], "1": ["2", "norm"], "4": ["3", "linear"]}[parts[2]]
            parts = ["head", "op_list", *layer, parts[3]]
        renamed[".".join(parts)] = value
    return renamed


@pytest.mark.parametrize("size", TABLE)
def test_parameters_and_multiply_adds(size):
    with torch.device("meta"):
        model = mvmodels.create_model(f"efficientvit_{size}")
        macs = mvmodels.count_macs(model, torch.empty(1, 3, 224, 224))
    count = sum(p.numel() for p in model.parameters())
    assert (count, round(macs / 1e6, 1)) == TABLE[size][:2]
    info = mvmodels.model_info(f"efficientvit_{size}")
    assert (info.params, info.macs, info.published_params, info.published_flops, info.published_top1) == TABLE[size]
    assert "2205.14756" in info.paper
    assert ("L1" in info.note) == (size == "l0")


@pytest.mark.parametrize("size", IN_TIMM)
def test_parameters_of_timm(size):
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        assert sum(p.numel() for p in timm.create_model(f"efficientvit_{size}").parameters()) == TABLE[size][0]


@pytest.mark.core
@pytest.mark.parametrize("size", ["b0", "b1"])
def test_logits_of_timm(size):
    """An odd size, and a batch. timm's attention is float32 in every dtype, so that float64 would show no more."""
    other, model = pair(size, num_classes=7)
    x = torch.randn(2, 3, 70, 94)
    with torch.no_grad():
        expected = other(x)
        assert expected.std() > 1e-2  # an answer to compare
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
        last = copy.deepcopy(model).to(memory_format=torch.channels_last)
        out = last(x.contiguous(memory_format=torch.channels_last))
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


def test_logits_and_conventions_of_timms_l1():
    """An L model; and two epsilons that no checkpoint holds: where features hardly vary they change an answer."""
    other, model = pair("l1")
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = other(x)
        assert expected.std() > 1e-2
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)

        other.head.in_conv.norm.running_var[::2] = 1e-6
        state_dict = other.state_dict()
        expected, outputs = other(x), {}
        for source, given in (("timm", state_dict), ("mit", as_mit(state_dict, True))):
            mvmodels.load_weights(model, given, source=source)
            outputs[source] = model(x)
    torch.testing.assert_close(outputs["timm"], expected, rtol=1e-4, atol=1e-4)
    assert float((outputs["mit"] - expected).abs().max()) > 1e-3
    norms = [m.eps for m in model.modules() if isinstance(m, (nn.BatchNorm2d, nn.LayerNorm))]
    assert set(norms) == {1e-7}
    mvmodels.efficientvit.follow(model, "timm")
    assert model.head.conv.norm.eps == 1e-5 and model.head.norm.eps == 1e-7
    assert {m.eps for m in model.modules() if isinstance(m, mvkernels.nn.LiteMLA)} == {1e-5}


def test_gradients_of_timm():
    """In training mode: statistics of the batch, and every parameter by its name."""
    other, model = pair("b0", num_classes=3)
    x = torch.randn(4, 3, 64, 96)
    cotangent = torch.randn(4, 3)
    grads = []
    for network in (other.double().train(), model.double().train()):
        parameters = dict(network.named_parameters())
        out = network(x.double())
        grads.append(dict(zip(parameters, torch.autograd.grad(out, parameters.values(), cotangent.double()))))
    expected, actual = grads
    name_of = model.weight_sources["timm"].name_of
    assert sorted(map(name_of, actual)) == sorted(expected)
    largest = max(float(g.abs().max()) for g in expected.values())
    for name, grad in actual.items():
        reference = expected[name_of(name)]
        scale = max(float(reference.abs().max()), 1e-3 * largest)
        torch.testing.assert_close(grad, reference, rtol=0, atol=1e-4 * scale, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("size", ["b0", "l0"])
def test_features(size):
    model = mvmodels.create_model(f"efficientvit_{size}", features_only=True).eval()
    widths = model.size.widths[1:]
    assert model.stages == tuple(zip(widths, (4, 8, 16, 32)))
    with torch.no_grad():
        maps = model(torch.randn(1, 3, 64, 96))
    assert [tuple(m.shape) for m in maps] == [(1, c, 64 // r, 96 // r) for c, r in model.stages]


def test_features_of_timm():
    other = theirs("b0")
    model = mvmodels.create_model("efficientvit_b0", features_only=True).eval()
    mvmodels.load_weights(model, other.state_dict(), source="timm")  # the head is passed over
    x = torch.randn(1, 3, 96, 64)
    with torch.no_grad():
        expected = other.forward_intermediates(x, intermediates_only=True)
        actual = model(x)
    assert len(actual) == len(expected) == 4
    for a, b in zip(actual, expected):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scales", [(), (5,), (3, 5)], ids=str)
@pytest.mark.parametrize("dw_in_ffn", [False, True])
def test_places_of_the_depthwise_convolution(scales, dw_in_ffn):
    model = mvmodels.create_model("efficientvit_b0", num_classes=3, scales=scales, dw_in_ffn=dw_in_ffn)
    names = list(model.state_dict())
    assert any("aggreg" in n for n in names) == bool(scales)
    assert any(re.search(r"local_module\.main\.depth_conv", n) for n in names) == dw_in_ffn
    third_party.randomise(model)
    model(torch.randn(2, 3, 64, 64)).square().sum().backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not silent, silent


def test_settings():
    model = mvmodels.create_model("efficientvit_b0", num_classes=5, in_chans=1, drop_rate=0.25, conventions="timm")
    assert model(torch.randn(2, 1, 64, 64)).shape == (2, 5)
    assert model.head.dropout.p == 0.25
    assert {m.eps for m in model.modules() if isinstance(m, mvkernels.nn.LiteMLA)} == {1e-5}


def test_backend_reaches_every_attention():
    model = mvmodels.create_model("efficientvit_b0", backend="cuda")
    with pytest.raises(mvkernels.BackendUnavailable):
        model(torch.randn(2, 3, 32, 32))
    found = [m.backend for m in model.modules() if isinstance(m, mvkernels.nn.LiteMLA)]
    assert found == ["cuda"] * 4


def test_compiles_and_exports():
    model = mvmodels.create_model("efficientvit_b0", num_classes=3).eval()
    third_party.randomise(model)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-4)
        program = torch.export.export(model, (x,))
        torch.testing.assert_close(program.module()(x), expected, rtol=1e-4, atol=1e-4)
    namespaces = {str(node.target).split(".")[0] for node in program.graph.nodes if node.op == "call_function"}
    assert not any(name.startswith("mvkernels") for name in namespaces), namespaces


@pytest.mark.parametrize(
    "name, settings, error, match",
    [
        ("efficientvit_b4", {}, ValueError, "efficientvit_b"),
        ("efficientvit_m0", {}, ValueError, "unknown model"),
        ("efficientvit_b0", {"num_classes": 0}, ValueError, "num_classes is 0"),
        ("efficientvit_b0", {"in_chans": 0}, ValueError, "in_chans is 0"),
        ("efficientvit_b0", {"scales": (4,)}, ValueError, r"scales is \(4,\), want odd"),
        ("efficientvit_b0", {"conventions": "hf"}, ValueError, "conventions is 'hf', want mit or timm"),
        ("efficientvit_b0", {"backend": "fastest"}, ValueError, "backend"),
        ("efficientvit_b0", {"depth": 3}, TypeError, "depth"),
    ],
    ids=str,
)
def test_bad_settings(name, settings, error, match):
    with pytest.raises(error, match=match):
        mvmodels.create_model(name, **settings)


@pytest.mark.parametrize("shape", [(3, 64, 64), (1, 1, 64, 64)], ids=str)
def test_bad_input(shape):
    with pytest.raises(ValueError, match="EfficientViT: x is"):
        mvmodels.create_model("efficientvit_b0")(torch.randn(shape))


def test_list_models():
    assert mvmodels.list_models("efficientvit_*") == [f"efficientvit_{size}" for size in TABLE]


class TestLoadWeights:
    @pytest.fixture(scope="class")
    def checkpoint(self):
        return theirs("b0").state_dict()

    @pytest.mark.parametrize("size", ["b0", "l1"])
    def test_every_tensor_of_the_authors_arrives(self, size):
        with torch.device("meta"):
            state_dict = pytest.importorskip("timm").create_model(f"efficientvit_{size}").state_dict()
            model = mvmodels.create_model(f"efficientvit_{size}")
        given = as_mit(state_dict, size == "l1")
        name_of = model.weight_sources["mit"].name_of
        assert sorted(map(name_of, model.state_dict())) == sorted(given)
        timms = model.weight_sources["timm"].name_of
        for name, value in model.state_dict().items():
            assert value.shape == given[name_of(name)].shape
            assert as_mit({timms(name): value}, size == "l1").keys() == {name_of(name)}

    def test_sources_agree(self, checkpoint):
        models = [mvmodels.create_model("efficientvit_b0") for _ in range(4)]
        mvmodels.load_weights(models[0], checkpoint, source="timm")
        mvmodels.load_weights(models[1], {"state_dict": as_mit(checkpoint, False)}, source="mit")
        mvmodels.load_weights(models[2], models[0].state_dict(), source="mvmodels")
        mvmodels.load_weights(models[3], as_mit(checkpoint, False))  # the authors' by default
        for model in models[1:]:
            assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), models[0].state_dict().values()))

    def test_everything_that_does_not_fit_is_listed(self, checkpoint):
        model = mvmodels.create_model("efficientvit_b0")
        before = copy.deepcopy(model.state_dict())
        changed = dict(checkpoint)
        del changed["stages.2.blocks.1.context_module.main.aggreg.0.0.weight"]
        changed["stages.2.blocks.1.context_module.main.beta"] = torch.zeros(1)
        changed["head.classifier.4.weight"] = torch.zeros(10, 1280)
        with pytest.raises(ValueError) as caught:
            mvmodels.load_weights(model, changed, source="timm")
        assert str(caught.value).split("\n  ")[1:] == [
            "stages.2.blocks.1.context_module.main.aggreg.0.0.weight is missing",
            "stages.2.blocks.1.context_module.main.beta has no counterpart in the model",
            "head.classifier.4.weight is (10, 1280), want (1000, 1280)",
        ]
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert {m.eps for m in model.modules() if isinstance(m, mvkernels.nn.LiteMLA)} == {1e-15}

    def test_another_size_and_another_source(self, checkpoint):
        with pytest.raises(ValueError, match=r"and \d+ more"):
            mvmodels.load_weights(mvmodels.create_model("efficientvit_b1"), checkpoint, source="timm")
        with pytest.raises(ValueError, match="is missing"):
            mvmodels.load_weights(mvmodels.create_model("efficientvit_b0"), checkpoint, source="mit")
        with pytest.raises(ValueError, match="source is 'apple', want authors, mit, mvmodels or timm"):
            mvmodels.load_weights(mvmodels.create_model("efficientvit_b0"), checkpoint, source="apple")
