"""torchvision's Swin: values and gradients of its windows, and the calls that are left to it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from mvkernels.swap import swap, verify_swap
from tests.swap.conftest import compiles_for_all_sizes, randomise
from tests.swap.torchvision_windows import attention
from tests.swap.transformers_windows import agree, drawn, pair

KINDS = ("ShiftedWindowAttention", "ShiftedWindowAttentionV2")


@pytest.mark.core
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("size", "window", "shift"),
    [
        ((8, 12), (4, 4), (2, 2)),
        ((8, 12), (4, 4), (0, 0)),
        ((8, 12), (4, 6), (0, 3)),
        ((7, 14), (7, 7), (3, 3)),  # a shift along one axis
        ((5, 9), (7, 7), (3, 3)),
        ((5, 5), (7, 7), (3, 3)),
        ((15, 11), (7, 4), (3, 1)),
        ((3, 20), (4, 8), (2, 4)),
    ],
    ids=str,
)
def test_windows_of_any_map(kind, size, window, shift, falls_back):
    for settings in ({}, {"qkv_bias": False}, {"proj_bias": False}):
        module, twin = pair(attention, kind, window, shift, **settings)
        agree(module, twin, drawn(2, *size, 12))
        assert (module.window_size, module.shift_size) == ([*window], [*shift])
    assert not falls_back()


def test_v2_clamps_its_logits_and_drops_the_bias_of_keys():
    module = attention(KINDS[1], shift=(0, 0)).double()  # with a shift, masks would let scores of +-100 through
    module.logit_scale.data[0] = 6.0
    twin = copy.deepcopy(module)
    swap(module)
    agree(module, twin, drawn(2, 8, 12, 12))
    module.qkv.bias.data[12:24].fill_(float("inf"))
    assert bool(module(drawn(2, 8, 12, 12)).isfinite().all())


@pytest.mark.parametrize("kind", KINDS)
def test_hooks_of_what_the_original_does_not_call(kind, falls_back):
    """They do not run there, and so they do not run here."""
    module, twin = pair(attention, kind)
    ran: list[str] = []
    for each in (module, twin):
        for name in ("qkv", "proj"):
            getattr(each, name).register_forward_hook(lambda *_, name=name: ran.append(name))
        for part in each.modules():
            if isinstance(part, nn.ReLU):
                part.register_forward_hook(lambda *_: ran.append("relu"))
    agree(module, twin, drawn(2, 8, 12, 12))
    assert ran == (["relu", "relu"] if kind == KINDS[1] else []) and not falls_back()


@pytest.mark.parametrize("kind", KINDS)
def test_in_training(kind, falls_back):
    module, twin = pair(attention, kind, attention_dropout=0.5)
    agree(module, twin, drawn(2, 8, 12, 12))
    assert not falls_back()
    results = []
    for each in (module, twin):
        each.train()
        torch.manual_seed(0)
        results.append(each(drawn(2, 8, 12, 12)))
    assert torch.equal(*results) and "(p=0.5) is active in training mode" in falls_back()[0]
    module, twin = pair(attention, kind, dropout=0.5)
    for each in (module, twin):
        dropped = float((each.train()(drawn(4, 8, 12, 12)) == 0).double().mean())
        assert abs(dropped - 0.5) < 0.05
    assert len(falls_back()) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_left_to_the_original(kind, falls_back):
    module = attention(kind)
    module.get_relative_position_bias = lambda: 0.0
    (entry,) = swap(module).entries
    assert not entry.swapped and entry.reason == "it has a replaced get_relative_position_bias"
    module, twin = pair(attention, kind)
    for each in (module, twin):
        each.shift_size = [5, 1]
    agree(module, twin, drawn(1, 8, 12, 12))
    assert "its shift (5, 1) is not less than its window (4, 4)" in falls_back()[0]
    messages = []
    for each in (module, twin):
        each.window_size, each.shift_size = [2, 2], [1, 1]
        with pytest.raises(RuntimeError) as raised:
            each(drawn(1, 8, 12, 12))
        messages.append(str(raised.value))
    assert messages[0] == messages[1] and "its position biases are for another" in falls_back()[1]


@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind, falls_back):
    module, x = attention(kind), drawn(2, 9, 12, 12).float()
    with torch.no_grad():
        expected = module(x)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = module(x)
            swap(module)
            half = module(x)
    assert half.dtype == rounded.dtype and not falls_back()
    ours, its = (float((out.float() - expected).square().mean().sqrt()) for out in (half, rounded))
    assert 0 < ours <= 1.25 * its


@pytest.mark.parametrize("kind", KINDS)
def test_compiles(kind):
    module = attention(kind).double()
    swap(module)
    compiles_for_all_sizes(module, [drawn(batch, 9, 12, 12) for batch in (2, 3, 5)])


def model(version: int) -> nn.Module:
    from torchvision.models import swin_transformer as home

    made = {1: (home.SwinTransformerBlock, home.PatchMerging), 2: (home.SwinTransformerBlockV2, home.PatchMergingV2)}
    block, downsample = made[version]
    settings = {"patch_size": [2, 2], "embed_dim": 12, "depths": [2, 2], "num_heads": [2, 3], "window_size": [4, 4]}
    settings |= {"stochastic_depth_prob": 0.0, "num_classes": 5}
    return randomise(home.SwinTransformer(**settings, block=block, downsample_layer=downsample))


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("version", [1, 2])
def test_models(version, training):
    whole = model(version)
    whole.train(training)
    result = verify_swap(whole, torch.randn(2, 3, 36, 28))
    assert result.ok and result.swapped == 4, str(result)
    twin = copy.deepcopy(whole.double())
    keys = list(whole.state_dict())
    assert swap(whole).count == 4 and list(whole.state_dict()) == keys
    agree(whole, twin, drawn(2, 3, 36, 28))


def test_features_and_scripts(falls_back):
    """Both take the module apart, and it is the original that they take apart."""
    from torchvision.models.feature_extraction import create_feature_extractor

    whole = model(1).double()
    twin, x = copy.deepcopy(whole), drawn(1, 3, 32, 32)
    swap(whole)
    expected = create_feature_extractor(twin, ["features.1", "features.3"])(x)
    found = create_feature_extractor(whole, ["features.1", "features.3"])(x)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert all("torch.fx is tracing it" in said for said in falls_back())
    module, twin = pair(attention)
    torch.testing.assert_close(torch.jit.script(module)(drawn(1, 8, 8, 12)), twin(drawn(1, 8, 8, 12)))
