"""What load_weights, create_model and the models say to what does not fit, and that nothing has changed then."""

from __future__ import annotations

import pytest
import torch

import mvmodels

SMALL = ["mobile_former_26m", "mobilevit_xxs"]


@pytest.fixture(params=SMALL)
def model(request):
    return mvmodels.create_model(request.param, num_classes=3)


def quantized(t):
    return torch.quantize_per_tensor(t, 0.1, 0, torch.qint8)


UNFIT = {
    "meta": (lambda t: t.to("meta"), "is on the meta device, without values"),
    "sparse": (lambda t: t.to_sparse(), r"is torch\.sparse_coo, want a dense tensor"),
    "quantized": (quantized, "is quantized, want a dense tensor"),
    "complex": (lambda t: t.to(torch.complex64), r"is torch\.complex64, want torch\.float32"),
    "integer": (lambda t: t.to(torch.int64), r"is torch\.int64, want torch\.float32"),
    "bool": (lambda t: t.to(torch.bool), r"is torch\.bool, want torch\.float32"),
    "none": (lambda t: None, "is a NoneType, want a tensor"),
}


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("change", UNFIT)
def test_weights_that_cannot_be_copied(model, change):
    """The last tensor is the one, so that torch would have overwritten the others before it came to it."""
    make, message = UNFIT[change]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    weights = {name: torch.full_like(value, 0.5) for name, value in before.items()}
    name = [name for name, value in weights.items() if value.is_floating_point()][-1]
    with pytest.raises(ValueError, match=f"load_weights: the weights do not fit:\n  {name} {message}$"):
        mvmodels.load_weights(model, {**weights, name: make(weights[name])}, source="mvmodels")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_count_that_is_a_float():
    model = mvmodels.create_model(SMALL[0], num_classes=3)
    weights = model.state_dict()
    name = next(name for name in weights if name.endswith("num_batches_tracked"))
    with pytest.raises(ValueError, match=f"{name} is torch.float32, want torch.int64"):
        mvmodels.load_weights(model, {**weights, name: torch.tensor(1.5)}, source="mvmodels")


def test_other_floats_are_taken():
    model, other = (mvmodels.create_model(SMALL[0], num_classes=3) for _ in range(2))
    mvmodels.load_weights(model, other.double().state_dict(), source="mvmodels")
    assert torch.equal(model.tokens, other.tokens.float()) and model.tokens.dtype == torch.float32


def test_names_given_twice(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    name, value = next(iter(before.items()))
    for first, second in ((name, f"module.{name}"), (f"module.{name}", name)):
        rest = {k: v for k, v in before.items() if k != name}
        with pytest.raises(ValueError, match=f"{name} is given twice, with and without 'module.'"):
            mvmodels.load_weights(model, {first: value + 1, second: value + 2, **rest}, source="mvmodels")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("key", [3, None, ("a", "b")], ids=repr)
def test_keys_that_are_no_names(model, key):
    with pytest.raises(ValueError, match=f"the key .* is of type {type(key).__name__}, want a name"):
        mvmodels.load_weights(model, {**model.state_dict(), key: torch.zeros(1)}, source="mvmodels")


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize(
    "settings, error, message",
    [
        ({"num_classes": "a"}, TypeError, "num_classes is 'a', want an integer"),
        ({"num_classes": 2.5}, TypeError, "num_classes is 2.5, want an integer"),
        ({"num_classes": True}, TypeError, "num_classes is True, want an integer"),
        ({"in_chans": "3"}, TypeError, "in_chans is '3', want an integer"),
        ({"drop_rate": 1.5}, ValueError, "drop_rate is 1.5, want 0 <= drop_rate <= 1"),
        ({"drop_rate": None}, TypeError, "drop_rate is None, want a number"),
    ],
    ids=str,
)
def test_settings(name, settings, error, message):
    with pytest.raises(error, match=f"^create_model: {message}$"):
        mvmodels.create_model(name, **settings)


@pytest.mark.parametrize(
    "name, settings, error, message",
    [
        (
            "vit_p_1gf",
            {"image_size": (1, 2, 3)},
            TypeError,
            r"image_size is \(1, 2, 3\), want an integer or a pair of integers",
        ),
        ("vit_p_1gf", {"image_size": "a"}, TypeError, "image_size is 'a', want an integer"),
        ("coatnet_0", {"image_size": 3.7}, TypeError, "image_size is 3.7, want an integer"),
        ("coatnet_0", {"image_size": (32, 0)}, ValueError, r"image_size\[1\] is 0, want at least 1"),
        ("efficientformer_l1", {"image_size": (224, 224)}, TypeError, r"image_size is \(224, 224\), want an integer"),
        ("irregular_vit_tiny", {"image_size": None}, TypeError, "image_size is None, want an integer"),
        ("irregular_vit_tiny", {"trunk": 5}, ValueError, "trunk is 5, want 4 widths"),
        ("irregular_vit_tiny", {"trunk": (8, 8, 8.5, 8)}, TypeError, r"trunk\[2\] is 8.5, want an integer"),
        ("irregular_vit_tiny", {"expansion": 1.5}, TypeError, "expansion is 1.5, want an integer"),
        ("irregular_vit_tiny", {"se_ratio": -1}, ValueError, "se_ratio is -1, want a number of at least 0"),
        ("irregular_vit_tiny", {"se_ratio": "a"}, ValueError, "se_ratio is 'a', want a number of at least 0"),
        ("mobilevit_xxs", {"dropout": "a"}, TypeError, "dropout is 'a', want a number"),
        ("poolformer_s12", {"dropout": 2}, ValueError, "dropout is 2, want 0 <= dropout <= 1"),
    ],
    ids=str,
)
def test_settings_of_a_family(name, settings, error, message):
    with pytest.raises(error, match=f"^[A-Za-z_]+: {message}$"):
        mvmodels.create_model(name, **settings)


def test_a_name_that_is_none():
    with pytest.raises(ValueError, match=r"unknown model \['mobilevit_s'\], did you mean mobilevit_s"):
        mvmodels.create_model(["mobilevit_s"])


@pytest.mark.parametrize("rate", [1.5, 1.0, -1, float("nan")])
def test_drop_path_rate(rate):
    with pytest.raises(ValueError, match=f"^create_model: drop_path_rate is {rate}, want 0 <= drop_path_rate < 1$"):
        mvmodels.create_model("mobile_former_26m", drop_path_rate=rate)


FAMILIES = ["mobile_former_26m", "mobilevit_xxs", "efficientvit_b0", "poolformer_s12", "vit_p_1gf"]


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_no_picture(name):
    model = mvmodels.create_model(name)
    for x in (None, [[1.0]], "a"):
        with pytest.raises(TypeError, match=rf": x is a {type(x).__name__}, want a torch\.Tensor$"):
            model(x)
    with pytest.raises(ValueError, match=r": x is \(1, 3, 0, 8\), want H and W of at least"):
        model(torch.randn(1, 3, 0, 8))
