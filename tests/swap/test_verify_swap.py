"""verify_swap passes a good swap, fails a wrong kernel, and leaves the model alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mvkernels.nn import patch_transformer
from mvkernels.swap import swap, verify_swap


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_good_swap_is_ok(family, dtype):
    model = family.model().to(dtype)
    result = verify_swap(model, torch.randn(1, 3, 96, 64).to(dtype))
    assert result.ok, str(result)
    assert result.swapped == 3
    text = str(result)
    assert "ok (3 swapped)" in text and "d parameter" in text
    assert all(name in text for name in family.blocks)
    assert not any(hasattr(type(m), "mvk_original") for m in model.modules())


def injected(monkeypatch, change):
    original = patch_transformer.patch_attention
    monkeypatch.setattr(patch_transformer, "patch_attention", lambda *args, **kw: change(original, *args, **kw))


def wrong_scale(attention, q, k, v, patch, *, scale=None, backend=None):
    return attention(q, k, v, patch, scale=1.02 * q.shape[2] ** -0.5, backend=backend)


def transposed_patch(attention, q, k, v, patch, *, scale=None, backend=None):
    return attention(q.flip(-1), k.flip(-1), v, patch, scale=scale, backend=backend)


def one_bad_pixel(attention, q, k, v, patch, *, scale=None, backend=None):
    out = attention(q, k, v, patch, scale=scale, backend=backend)
    change = torch.zeros_like(out)
    change[0, 0, 0, 0, 0] = 1e-2
    return out + change


def wrong_gradient(attention, q, k, v, patch, *, scale=None, backend=None):
    k = k.detach() + 0.9 * (k - k.detach())
    return attention(q, k, v, patch, scale=scale, backend=backend)


@pytest.mark.parametrize("change", [wrong_scale, transposed_patch, one_bad_pixel, wrong_gradient])
def test_a_wrong_kernel_is_found(family, change, monkeypatch):
    injected(monkeypatch, change)
    result = verify_swap(family.model(), torch.randn(1, 3, 64, 64))
    assert not result.ok
    assert "WRONG" in str(result)


def test_rtol_allows_more(family, monkeypatch):
    injected(monkeypatch, wrong_scale)
    assert verify_swap(family.model(), torch.randn(1, 3, 64, 64), rtol=10.0).ok


def test_a_model_that_is_swapped_already(family, monkeypatch):
    model = family.model()
    swap(model, only=family.blocks[1])
    result = verify_swap(model, torch.randn(1, 3, 64, 64))
    assert result.ok and result.swapped == 1
    assert [e.swapped for e in result.report.entries] == [False, True, False]
    injected(monkeypatch, wrong_scale)
    assert not verify_swap(model, torch.randn(1, 3, 64, 64)).ok


def test_the_model_is_not_touched(family):
    model = family.model().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    x = torch.randn(2, 3, 64, 64, requires_grad=True)
    assert verify_swap(model, x).ok
    assert model.training and all(m.training for m in model.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert x.grad is None and all(p.grad is None for p in model.parameters())


def test_forms_of_input_and_output():
    from .conftest import transformers_model

    model = transformers_model()
    x = torch.randn(1, 3, 64, 64)
    inputs = {"pixel_values": x, "output_hidden_states": True, "labels": torch.tensor([1])}
    result = verify_swap(model, inputs)
    assert result.ok, str(result)
    names = [row.name for row in result.rows]
    assert "output .logits" in names and "output .loss" in names and "output .hidden_states[4]" in names
    assert "d input pixel_values" in names
    assert verify_swap(model, (x,)).ok


def test_a_block_itself(family):
    assert verify_swap(family.block(), torch.randn(2, 12, 14, 10)).ok


def test_nothing_swapped_is_said():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
    result = verify_swap(model, torch.randn(1, 3, 4, 4))
    assert result.ok and result.swapped == 0
    assert "nothing was swapped" in str(result)


def test_frozen_parameters(family):
    model = family.model().requires_grad_(False)
    result = verify_swap(model, torch.randn(1, 3, 64, 64))
    assert result.ok and not any("d parameter" in row.name for row in result.rows)


def test_not_a_module():
    with pytest.raises(TypeError, match="verify_swap"):
        verify_swap(torch.nn.functional.relu, torch.zeros(1))


def test_gradients_that_are_exactly_zero(family):
    model = family.model()
    for parameter in list(model.parameters())[-2:]:  # the classifier
        torch.nn.init.zeros_(parameter)
    assert verify_swap(model, torch.randn(1, 3, 64, 64)).ok


def test_nothing_to_compare_is_not_ok():
    assert not verify_swap(nn.Identity(), torch.arange(3)).ok
