"""Sana's linear attention in diffusers: a processor in the place of another."""

from __future__ import annotations

import copy
import logging

import pytest
import torch

from mvkernels.swap import swap

from .linear_attention import FAMILIES, spy
from .test_linear_attention import gradients


class Other:
    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        return hidden_states


@pytest.mark.parametrize(
    "settings", [{}, {"bias": False}, {"qk_norm": "rms_norm_across_heads", "kv_heads": 2}], ids=str
)
def test_values_and_gradients_of_sana(settings):
    family = FAMILIES["sana"]
    module = family.attention(**settings)
    for size in ((5, 7), (1, 1)):
        x = family.example(*size)
        expected = gradients(module, x)
        report = swap(module)
        assert report.count == 1
        actual = gradients(module, x)
        report.restore()
        for name, value in expected.items():
            atol = 1e-4 * max(1.0, float(value.abs().max()))
            torch.testing.assert_close(actual[name], value, rtol=1e-4, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def test_eps_of_sana_is_the_processors():
    module = FAMILIES["sana"].attention()
    swap(module)
    assert module.processor.eps == 1e-15


def test_the_processor_keeps_its_name():
    module = FAMILIES["sana"].attention()
    kind = type(module.processor)
    report = swap(module)
    swapped = type(module.processor)
    assert swapped is not kind and isinstance(module.processor, kind)
    for name in ("__name__", "__qualname__", "__module__"):
        assert getattr(swapped, name) == getattr(kind, name)
    for other in (copy.copy(module.processor), copy.deepcopy(module.processor)):
        assert type(other) is swapped and other.eps == module.processor.eps
    report.restore()
    assert type(module.processor) is kind


def test_a_subclass_of_sanas_attention_or_processor():
    module = FAMILIES["sana"].attention()
    processor = type("Mine", (type(module.processor),), {})()
    module.set_processor(processor)
    report = swap(module)
    assert f"its processor is a {__name__}.Mine" in report.entries[0].reason and module.processor is processor
    module = FAMILIES["sana"].attention()
    module.__class__ = type("Mine", (type(module),), {})
    assert "subclass of diffusers.models.attention_processor.Attention" in swap(module).entries[0].reason


def test_other_processors_of_diffusers_are_left_alone():
    pytest.importorskip("diffusers")
    from diffusers.models import attention_processor as processors

    for kind in ("AttnProcessor2_0", "PAGCFGSanaLinearAttnProcessor2_0", "PAGIdentitySanaLinearAttnProcessor2_0"):
        module = FAMILIES["sana"].attention()
        module.set_processor(getattr(processors, kind)())
        report = swap(module)
        assert report.count == 0 and f"its processor is a {processors.__name__}.{kind}" in report.entries[0].reason
        assert type(module.processor).__name__ == kind


def test_masks_and_other_keys_are_left_to_sanas_original(monkeypatch, caplog):
    family = FAMILIES["sana"]
    module, x = family.attention(), family.example(5, 7)
    twin = copy.deepcopy(module)
    swap(module)
    seen = spy(family, monkeypatch)
    others = {
        "encoder_hidden_states": {"encoder_hidden_states": torch.randn(2, 11, 16)},
        "attention_mask": {"attention_mask": torch.ones(2, 35)},
    }
    for reason, arguments in others.items():
        with caplog.at_level(logging.WARNING, logger="mvkernels"):
            assert torch.equal(module(x, **arguments), twin(x, **arguments))
        assert reason in caplog.records[-1].getMessage()
    assert not seen
    module(x)
    assert len(seen) == 1


def test_dropout_of_sana():
    """Called where it was: in training the same elements go with the same seed."""
    module = FAMILIES["sana"].attention(dropout=0.5).train()
    twin = copy.deepcopy(module)
    assert swap(module).count == 1
    x, outputs = FAMILIES["sana"].example(5, 7), []
    for each in (module, twin):
        torch.manual_seed(3)
        outputs.append(each(x))
    assert 0.2 < float((outputs[0] == 0).float().mean()) < 0.8
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)


def test_a_processor_set_later_stays(monkeypatch):
    module = FAMILIES["sana"].attention()
    report = swap(module)
    other = Other()
    module.set_processor(other)
    report.restore()
    assert module.processor is other


def test_a_changed_version_of_sanas_processor_is_declined(monkeypatch):
    pytest.importorskip("diffusers")
    from diffusers.models.attention_processor import SanaLinearAttnProcessor2_0

    from mvkernels.swap.families import diffusers_sana

    def with_eps(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, eps=1e-3, factor=1.0):
        q = attn.to_q(hidden_states).unflatten(-1, (attn.heads, -1)).transpose(1, 2).relu()
        k = attn.to_k(hidden_states).unflatten(-1, (attn.heads, -1)).transpose(1, 2).relu()
        v = attn.to_v(hidden_states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        scores = q @ k.mT
        return factor * (scores @ v / (scores.sum(-1, keepdim=True) + eps)).transpose(1, 2).flatten(2)

    monkeypatch.setattr(SanaLinearAttnProcessor2_0, "__call__", with_eps)
    eps, reason = diffusers_sana._asked.__wrapped__()
    assert eps == 1e-3 and not reason  # it says so itself
    monkeypatch.setattr(
        SanaLinearAttnProcessor2_0, "__call__", lambda *args: with_eps(*args, factor=1.0 + 0.01 * args[2].shape[1])
    )
    assert "something other" in diffusers_sana._asked.__wrapped__()[1]
