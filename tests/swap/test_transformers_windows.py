"""Swin's layers of transformers: values, gradients, the state that calls change, and the original's calls."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import pytest
import torch
from torch import nn

from mvkernels.swap import swap, verify_swap
from tests.swap.conftest import compiles_for_all_sizes, randomise
from tests.swap.transformers_windows import SWIN, agree, config, drawn, layer, layer_of_tokens, named, pair

RESIZING = ("swin", "donut")  # whose window and shift a call may change, for good


def on_map(module: nn.Module, twin: nn.Module, size: tuple[int, int], **settings: Any) -> None:
    agree(module, twin, drawn(2, size[0] * size[1], 12), size, **settings)


@pytest.mark.core
@pytest.mark.parametrize("family", SWIN)
@pytest.mark.parametrize(
    ("size", "window", "shift"),
    [
        ((8, 12), 4, 2),
        ((8, 12), 4, 0),
        ((14, 7), 7, 3),
        ((7, 14), 7, 3),
        ((7, 7), 7, 3),
        ((15, 11), 7, 3),
        ((9, 10), 4, 1),
    ],
    ids=str,
)
def test_windows_of_any_map(family, size, window, shift, falls_back):
    for qkv_bias in (True, False):
        module, twin = pair(layer, family, size, shift, window_size=window, qkv_bias=qkv_bias)
        on_map(module, twin, size)
        on_map(module, twin, size)
        if family in RESIZING:
            module, twin = pair(layer, family, size, shift, window_size=window, qkv_bias=qkv_bias)
            on_map(module, twin, size, always_partition=True)
    assert not falls_back()


@pytest.mark.parametrize("family", SWIN)
@pytest.mark.parametrize("size", [(5, 9), (5, 5), (4, 20)], ids=str)
def test_maps_smaller_than_the_window(family, size, falls_back):
    """They are padded; but where a call changes the window, the biases do not fit it, and the original raises."""
    module, twin = pair(layer, family, size, 3, window_size=7)
    settings = {"always_partition": True} if family in RESIZING else {}
    on_map(module, twin, size, **settings)
    assert not falls_back()
    if family in RESIZING:
        messages = []
        for each in (module, twin):
            with pytest.raises(RuntimeError) as raised:
                each(drawn(1, size[0] * size[1], 12), size)
            messages.append(str(raised.value))
            assert (each.window_size, each.shift_size) == (min(size), 0)
        assert messages[0] == messages[1] and "its position biases are for another" in falls_back()[0]
        for each in (module, twin):  # its window stays 5, and no biases fit it any more
            with pytest.raises(RuntimeError):
                each(drawn(1, 14 * 14, 12), (14, 14))


@pytest.mark.parametrize("family", SWIN)
def test_a_call_changes_later_calls(family, falls_back):
    module, twin = pair(layer, family, (14, 14), 3, window_size=7)
    first = drawn(1, 14 * 14, 12)
    before = module(first, (14, 14))[0]
    for size in ((14, 14), (7, 7), (14, 14), (15, 20), (7, 14), (8, 8)):
        on_map(module, twin, size)
        assert (module.window_size, module.shift_size) == (twin.window_size, twin.shift_size)
    after = module(first, (14, 14))[0]
    assert (float((after - before).detach().abs().max()) > 1e-3) == (family in RESIZING)
    assert not falls_back()


@pytest.mark.parametrize("family", SWIN)
def test_in_training(family, falls_back):
    """Drop path and hidden dropout are the layer's own; with dropout on probabilities it runs its original forward."""
    module, twin = pair(layer, family, drop_path=0.5, attention_probs_dropout_prob=0.0)
    results = []
    for each in (module, twin):
        each.train()
        torch.manual_seed(0)
        results.append(each(drawn(8, 96, 12), (8, 12))[0])
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)
    assert not falls_back()
    module, twin = pair(layer, family, attention_probs_dropout_prob=0.5)
    on_map(module, twin, (8, 12))
    assert not falls_back()
    results = []
    for each in (module, twin):
        each.train()
        torch.manual_seed(0)
        results.append(each(drawn(2, 96, 12), (8, 12))[0])
    assert torch.equal(*results) and "(p=0.5) is active in training mode" in falls_back()[0]


def test_hidden_dropout_drops_as_many():
    module, twin = pair(layer, "swin", hidden_dropout_prob=0.5)
    with torch.no_grad():
        for each in (module, twin):
            each.mlp.fc2.weight.zero_()
            each.mlp.fc2.bias.zero_()
            each.train()
    x = drawn(8, 96, 12)
    kept = [float(((each(x, (8, 12))[0] - x).detach() != 0).double().mean()) for each in (module, twin)]
    assert all(abs(share - 0.5) < 0.02 for share in kept)


@pytest.mark.parametrize("family", SWIN)
def test_probabilities_that_are_asked_for(family, falls_back):
    module, twin = pair(layer, family)
    on_map(module, twin, (8, 12), output_attentions=False)
    assert not falls_back()
    on_map(module, twin, (8, 12), output_attentions=True)
    assert "output_attentions is given" in falls_back()[0]
    assert len(module(drawn(1, 96, 12), (8, 12), output_attentions=True)) == 2


def test_attention_implementations(falls_back):
    for chosen in ("eager", "flex_attention", None):
        module = layer("swin")
        module.attention.config._attn_implementation_internal = chosen
        (entry,) = swap(module).entries
        assert not entry.swapped and f"implementation is {chosen or 'eager'}, want sdpa" in entry.reason
    module, twin = pair(layer, "swin")
    for each in (module, twin):
        each.attention.config._attn_implementation_internal = "eager"
    x = drawn(2, 96, 12)
    torch.testing.assert_close(module(x, (8, 12)), twin(x, (8, 12)), rtol=0, atol=0)
    assert module(x, (8, 12))[1].shape == (12, 3, 16, 16) and "implementation is eager" in falls_back()[0]


INSIDE = {
    "swin": ("attention", "attention.q_proj", "attention.o_proj", "attention.relative_position_bias", "dropout"),
    **dict.fromkeys(
        ("swin_v2", "donut", "maskformer"),
        ("attention", "attention.self", "attention.self.key", "attention.self.dropout", "attention.output.dense"),
    ),
}


@pytest.mark.parametrize("family", SWIN)
def test_hooks_and_changes_inside(family, falls_back):
    """Of what the fused form does not call as the original does; the rest it calls, hooks included."""
    x = drawn(2, 96, 12)
    for name in INSIDE[family]:
        for when in ("before", "after"):
            module, ran = layer(family).double(), []
            twin = copy.deepcopy(module)
            if when == "after":
                assert swap(module).count == 1
            handle = module.get_submodule(name).register_forward_hook(lambda *_, ran=ran: ran.append(1))
            if when == "before":
                (entry,) = swap(module).entries
                assert not entry.swapped and entry.reason == f"{name} has a hook"
                continue
            assert torch.equal(module(x, (8, 12))[0], twin(x, (8, 12))[0]) and ran
            handle.remove()
            on_map(module, twin, (8, 12))
    assert len(falls_back()) == len(INSIDE[family])
    module, twin = pair(layer, family)
    seen: list[list[Any]] = [[], []]
    for each, shapes in zip((module, twin), seen):
        for name, part in each.named_modules():
            if name and not name.startswith("attention") and name != "dropout":
                part.register_forward_hook(
                    lambda _, given, out, name=name, shapes=shapes: shapes.append((name, given[0].shape, out.shape))
                )
    on_map(module, twin, (8, 12))
    assert seen[0] == seen[1] and len(seen[0]) >= 6 and len(falls_back()) == len(INSIDE[family])


@pytest.mark.parametrize("family", SWIN)
def test_methods_of_its_own(family):
    module = layer(family)
    module.maybe_pad = lambda *given: None
    (entry,) = swap(module).entries
    assert not entry.swapped and entry.reason == "it has a replaced maybe_pad"


@pytest.mark.parametrize("family", SWIN)
def test_parts_of_another_version(family):
    module = layer(family)
    holder, name = (module.attention, "k_proj") if family == "swin" else (module.attention.self, "key")
    delattr(holder, name)
    (entry,) = swap(module).entries
    assert not entry.swapped and f"is missing: '{type(holder).__name__}' object has no attribute" in entry.reason


@pytest.mark.parametrize("family", SWIN)
def test_errors_are_the_originals(family, falls_back):
    module, twin = pair(layer, family)
    messages = []
    for each in (module, twin):
        with pytest.raises(RuntimeError) as raised:
            each(drawn(1, 95, 12), (8, 12))
        messages.append(str(raised.value))
    assert messages[0] == messages[1] and "there are 95 tokens" in falls_back()[0]


def test_swin_v2_clamps_its_logits(falls_back):
    module = layer("swin_v2", shift=0).double()  # with a shift, masks of -200 would let scores of +-100 through
    module.attention.self.logit_scale.data[0] = 6.0
    twin = copy.deepcopy(module)
    swap(module)
    on_map(module, twin, (8, 12))
    shrunken, twin = pair(layer, "swin_v2", (3, 12), 2)  # along both axes, by the first
    assert (shrunken.window_size, shrunken.shift_size) == (3, 0)
    on_map(shrunken, twin, (3, 12))
    on_map(shrunken, twin, (7, 8))
    assert not falls_back()


@pytest.mark.parametrize("family", SWIN)
def test_autocast(family, falls_back):
    module = layer(family)
    x = drawn(2, 96, 12).float()
    with torch.no_grad():
        expected = module(x, (8, 12))[0]
        with torch.autocast("cpu", torch.bfloat16):
            rounded = module(x, (8, 12))[0]
            swap(module)
            half = module(x, (8, 12))[0]
    assert half.dtype == rounded.dtype and not falls_back()
    ours, its = (float((out.float() - expected).square().mean().sqrt()) for out in (half, rounded))
    assert 0 < ours <= 1.25 * its


@pytest.mark.parametrize("family", SWIN)
def test_compiles(family):
    module = layer_of_tokens(family).double()
    swap(module)
    compiles_for_all_sizes(First(module), [drawn(batch, 96, 12) for batch in (2, 3, 5)])


class First(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.module(x)[0]


SMALL = {"image_size": 32, "patch_size": 2, "embed_dim": 12, "depths": [2, 2], "num_heads": [2, 3], "window_size": 4}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("family", SWIN)
def test_models(family, training):
    settings = {**SMALL, "mlp_ratio": 2.0, "drop_path_rate": 0.0, "hidden_dropout_prob": 0.0}
    model = randomise(named(family, "Model")(config(family, **settings)))
    model.train(training)
    images = torch.randn(2, 3, 40, 36)
    result = verify_swap(model, images)
    assert result.ok and result.swapped == 4, str(result)
    model.double()
    twin, keys = copy.deepcopy(model), list(model.state_dict())
    assert swap(model).count == 4 and list(model.state_dict()) == keys
    for size in ((40, 36), (32, 32), (40, 36)):
        images = drawn(2, 3, *size)
        outputs = []
        for each in (model, twin):
            each.zero_grad()
            out = each(images, output_hidden_states=True)
            (out.last_hidden_state if hasattr(out, "last_hidden_state") else out[0]).square().sum().backward()
            outputs.append([*out.hidden_states, *(p.grad for p in each.parameters() if p.grad is not None)])
        torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("home", "name", "setup"),
    [
        ("swin", "SwinBackbone", "SwinConfig"),
        ("swinv2", "Swinv2Backbone", "Swinv2Config"),
        ("maskformer", "MaskFormerSwinBackbone", "MaskFormerSwinConfig"),
    ],
)
def test_backbones(home, name, setup, falls_back):
    home = importlib.import_module(f"transformers.models.{home}")
    model = getattr(home, name)(getattr(home, setup)(**SMALL, out_features=["stage1", "stage2"]))
    randomise(model).double()
    twin = copy.deepcopy(model)
    assert swap(model).count == 4
    for size in ((32, 32), (16, 16), (40, 44)):
        images = drawn(1, 3, *size)
        found, expected = (each(images).feature_maps for each in (model, twin))
        assert len(found) == 2
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert not falls_back()


def test_gradient_checkpointing(falls_back):
    model = randomise(named("swin", "Model")(config("swin", **SMALL, drop_path_rate=0.0))).double()
    twin = copy.deepcopy(model)
    swap(model)
    gradients = []
    for each in (model, twin):
        each.gradient_checkpointing_enable()
        each.train()
        each(drawn(1, 3, 32, 32)).last_hidden_state.square().sum().backward()
        gradients.append([p.grad for p in each.parameters() if p.grad is not None])
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)
    assert len(gradients[0]) > 20 and not falls_back()
