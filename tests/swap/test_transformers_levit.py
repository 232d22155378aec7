"""LeViT of transformers: values, gradients, its cache, and calls that are left to it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mvkernels.swap import swap, verify_swap
from tests.swap.conftest import compiles_for_all_sizes, randomise
from tests.swap.transformers_windows import agree, drawn, levit, pair


def fresh(module: nn.Module) -> nn.Module:
    """LeViT's attention keeps gathered biases in eval mode, with their graph."""
    for part in module.modules():
        if hasattr(part, "attention_bias_cache"):
            part.attention_bias_cache = {}
    return module


@pytest.mark.core
@pytest.mark.parametrize("kind", ["LevitAttention", "LevitAttentionSubsample"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_levit(kind, training, falls_back):
    for settings in ({}, {"attention_ratio": 1, "key_dim": 5}):
        module, twin = pair(levit, kind, **settings)
        assert module.train(training) is None and twin.train(training) is None  # the trap of the original stays
        agree(module, twin, drawn(2, 25, 12))
    if kind == "LevitAttentionSubsample":
        agree(*pair(levit, kind, resolution_in=6), drawn(2, 36, 12))
    assert not falls_back()
    messages = []
    for each in (module, fresh(twin)):
        with pytest.raises(RuntimeError) as raised:
            each(drawn(1, 24, 12))
        messages.append(str(raised.value))
    assert messages[0] == messages[1] and "its biases are for 25 tokens" in falls_back()[0]


def test_levits_biases_are_gathered_anew(falls_back):
    """The original's eval mode would keep those of the first call."""
    module, twin = pair(levit)
    x = drawn(1, 25, 12)
    before = module(x)
    for each in (module, twin):
        with torch.no_grad():
            each.attention_biases.mul_(-1.0)
    after = module(x)
    assert float((after - before).detach().abs().max()) > 1e-3
    torch.testing.assert_close(after, twin(x), rtol=1e-10, atol=1e-10)
    module.get_attention_biases = lambda device: None
    with pytest.raises(TypeError):
        module(x)
    assert "it has a replaced get_attention_biases" in falls_back()[0]


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_models_of_levit(training):
    from transformers import LevitConfig, LevitModel

    settings = {"image_size": 64, "hidden_sizes": [16, 24, 32], "num_attention_heads": [2, 3, 4], "depths": [1, 2, 1]}
    settings |= {"key_dim": [4, 4, 4], "drop_path_rate": 0}
    settings["down_ops"] = [["Subsample", 4, 4, 4, 2, 2], ["Subsample", 4, 6, 4, 2, 2]]
    model = randomise(LevitModel(LevitConfig(**settings)))
    model.train(training)
    result = verify_swap(model, torch.randn(2, 3, 64, 64))
    assert result.ok and result.swapped == 6, str(result)


@pytest.mark.parametrize("kind", ["LevitAttention", "LevitAttentionSubsample"])
def test_levit_compiles(kind):
    module = levit(kind).double()
    swap(module)
    compiles_for_all_sizes(module, [drawn(batch, 25, 12) for batch in (2, 3, 5)])
