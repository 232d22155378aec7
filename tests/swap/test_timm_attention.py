"""timm's EfficientFormer and CoAtNet: the attention of each block, swapped between its projections."""

from __future__ import annotations

import copy
import io
import logging
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from mvkernels.swap import swap, verify_swap
from tests.swap.conftest import compiles_for_all_sizes, randomise

pytest.importorskip("timm")


def efficientformer_attention(**settings) -> nn.Module:
    from timm.models.efficientformer import Attention

    return randomise_in_place(Attention(**{"dim": 24, "resolution": (3, 4), **settings}))


def coatnet_attention(position="bias", **settings) -> nn.Module:
    from timm.layers import RelPosBias, RelPosMlp
    from timm.models.maxxvit import Attention2d

    kinds = {"bias": lambda **kw: RelPosBias(window_size=(3, 4), **kw), "none": None}
    kinds["mlp"] = lambda **kw: RelPosMlp(window_size=(3, 4), hidden_dim=8, **kw)
    return randomise_in_place(Attention2d(**{"dim": 24, "dim_out": 64, "rel_pos_cls": kinds[position], **settings}))


def randomise_in_place(module: nn.Module) -> nn.Module:
    randomise(module)  # whose result is None for EfficientFormer's attention
    return module


MAKE = {"efficientformer": efficientformer_attention, "coatnet": coatnet_attention}


def example(family: str, batch: int = 2, dtype=torch.float32) -> torch.Tensor:
    shape = (batch, 12, 24) if family == "efficientformer" else (batch, 24, 3, 4)
    return torch.randn(shape, dtype=dtype)


@pytest.fixture(params=MAKE)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize(("name", "count"), [("efficientformer_l1", 1), ("coatnet_0_224", 7)])
def test_every_attention_of_a_model_is_found(name, count):
    import timm

    with torch.device("meta"):
        model = timm.create_model(name)
    keys = list(model.state_dict())
    report = swap(model)
    assert report.count == count
    if name == "coatnet_0_224":
        assert [e.name for e in report.entries][:2] == ["stages.2.blocks.0.attn", "stages.2.blocks.1.attn"]
    assert list(model.state_dict()) == keys
    report.restore()
    assert not any(hasattr(type(m), "mvk_original") for m in model.modules())


def test_verify_swap_of_models():
    """A network of each kind with few and narrow blocks."""
    from timm.models.efficientformer import EfficientFormer
    from timm.models.maxxvit import MaxxVit, MaxxVitCfg

    first = EfficientFormer((1, 1, 1, 2), (8, 16, 16, 24), num_classes=5, num_vit=1)
    second = MaxxVit(MaxxVitCfg((8, 8, 32, 64), (1, 1, 2, 1), stem_width=8), img_size=64, num_classes=5)
    for model, size, count in ((first, 224, 1), (second, 64, 3)):
        randomise(model)
        result = verify_swap(model, torch.randn(1, 3, size, size))
        assert result.ok and result.swapped == count, str(result)
        assert model.training is False


def test_verify_swap_of_the_attention_itself(family):
    module = MAKE[family]()
    module(example(family))  # EfficientFormer's keeps its biases with their graph
    result = verify_swap(module, example(family))
    assert result.ok and result.swapped == 1, str(result)


@pytest.mark.parametrize("head_first", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_forms_of_coatnets_attention(head_first, fused):
    for position in ("bias", "mlp", "none"):
        module = coatnet_attention(position, head_first=head_first, attn_drop=0.3, proj_drop=0.2).double()
        module.fused_attn = fused
        module.scale = 0.3  # which scaled_dot_product_attention does not look at
        same_values_and_gradients(module, example("coatnet", dtype=torch.float64))


def same_values_and_gradients(module: nn.Module, x: torch.Tensor) -> None:
    leaves = [x.requires_grad_(), *module.parameters()]
    results = []
    for _ in range(2):
        module.train(False)
        out = module(x)
        cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(0), dtype=out.dtype)
        results.append((out, *torch.autograd.grad(out, leaves, cotangent)))
        assert swap(module).entries[0].swapped
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


@pytest.mark.core
def test_values_and_gradients(family):
    same_values_and_gradients(MAKE[family]().double(), example(family, dtype=torch.float64))


def test_channels_last_and_autocast():
    module = coatnet_attention()
    x = example("coatnet").contiguous(memory_format=torch.channels_last)
    expected = module(x).detach()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        rounded = module(x)
        swap(module)
        half = module(x)
    torch.testing.assert_close(module(x), expected)
    assert half.dtype == rounded.dtype
    limit = 2 * float((rounded.float() - expected).abs().max()) + 1e-6
    assert float((half.float() - expected).abs().max()) <= limit


def test_biases_are_gathered_anew():
    """timm's own eval mode would keep those of the first call."""
    module = efficientformer_attention()
    x = example("efficientformer")
    swap(module)
    before = module(x)
    with torch.no_grad():
        module.attention_biases.add_(torch.randn_like(module.attention_biases))
    after = module(x)
    assert (after - before).abs().max() > 1e-3
    assert module.train() is None  # timm's own trap stays
    module.eval()
    torch.testing.assert_close(after, module.mvk_original.forward(module, x))


DECLINED = {
    "forward": (lambda: with_attribute(coatnet_attention(), "forward"), "it has a replaced forward"),
    "biases": (
        lambda: with_attribute(efficientformer_attention(), "get_attention_biases"),
        "it has a replaced get_attention_biases",
    ),
    "subclass": (
        lambda: subclassed(efficientformer_attention()),
        "a subclass of timm.models.efficientformer.Attention",
    ),
}


def with_attribute(module: nn.Module, name: str) -> nn.Module:
    module.__dict__[name] = lambda *args: None
    return module


def subclassed(module: nn.Module) -> nn.Module:
    module.__class__ = type("Other", (type(module),), {})
    return module


@pytest.mark.parametrize("change", DECLINED)
def test_declined(change):
    make, reason = DECLINED[change]
    module = make()
    kind = type(module)
    entry = swap(module).entries[0]
    assert not entry.swapped and reason in entry.reason
    assert type(module) is kind


def test_a_swap_goes_before_a_parametrization():
    module = efficientformer_attention()
    parametrize.register_parametrization(module, "attention_biases", nn.Tanh())
    kind = type(module)
    (entry,) = swap(module).entries
    assert not entry.swapped and type(module) is kind
    assert entry.reason == (
        "its attention_biases is parametrized (torch.nn.utils.parametrize): swap the model first, then parametrize it"
    )


def test_what_changes_later_is_left_to_the_original(caplog):
    module = coatnet_attention("none", attn_drop=0.5)
    swap(module)
    x = example("coatnet")
    with caplog.at_level(logging.WARNING, logger="mvkernels"):
        shared = torch.randn(1, 2, 12, 12)
        torch.testing.assert_close(module(x, shared), module.mvk_original.forward(module, x, shared))
        module.train()(x)
    assert "shared_rel_pos is given" in caplog.text and "is active in training mode" in caplog.text
    tokens = efficientformer_attention()
    swap(tokens)
    with pytest.raises(RuntimeError):  # as the original's: there are 12 places
        tokens(torch.randn(2, 10, 24))


def test_copies_and_pickles(family):
    module = MAKE[family]()
    x = example(family)
    with torch.no_grad():  # EfficientFormer's keeps what it gathers, which with a graph could not be copied
        expected = module(x)
    swap(module)
    twin = pickle.loads(pickle.dumps(copy.deepcopy(module)))
    torch.testing.assert_close(twin(x), expected)
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    fresh = MAKE[family]()
    fresh.load_state_dict(torch.load(buffer))
    torch.testing.assert_close(fresh(x), expected)


def test_compiles(family):
    module = MAKE[family]().double()
    swap(module)
    compiles_for_all_sizes(module, [example(family, batch, dtype=torch.float64) for batch in (2, 3, 5)])
