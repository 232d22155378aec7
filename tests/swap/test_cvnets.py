"""Apple's MobileViT block, recognised by structure in a module laid out as theirs."""

from __future__ import annotations

import copy
import logging
import pickle

import pytest
import torch
from torch import nn

from mvkernels import third_party
from mvkernels.swap import swap, verify_swap
from mvkernels.swap.families import cvnets_mobilevit
from tests import cvnets_layout as layout


class OtherFormula(layout.MobileViTBlock):
    def forward(self, x, *args, **kwargs):
        return super().forward(x) + 1e-3 * x


def block(kind=layout.MobileViTBlock, **settings) -> nn.Module:
    module = kind(**settings)
    third_party.randomise(module)
    return module.eval()


def network(**settings) -> nn.Module:
    module = layout.Network(**settings)
    third_party.randomise(module)
    return module.eval()


@pytest.fixture
def calls(monkeypatch):
    """How often the fused transformer runs."""
    seen: list[str | None] = []
    original = cvnets_mobilevit.transform

    def spy(*args):
        seen.append(args[-1])
        return original(*args)

    monkeypatch.setattr(cvnets_mobilevit, "transform", spy)
    return seen


def test_every_block_is_found_and_swapped(calls):
    model = network().double()
    x = torch.randn(2, 3, 20, 28, dtype=torch.float64)
    expected = model(x)
    keys = list(model.state_dict())
    report = swap(model, backend="reference")
    assert [e.name for e in report.entries] == ["layer_3.1", "layer_4.1"] and report.count == 2
    assert {e.module_class for e in report.entries} == {"MobileViTBlock"}
    assert list(model.state_dict()) == keys
    calls.clear()
    torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)
    assert calls == ["reference", "reference"]
    report.restore()
    assert torch.equal(model(x), expected)
    assert type(model.layer_3[1]) is layout.MobileViTBlock


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_verify_swap(dtype):
    result = verify_swap(network().to(dtype), torch.randn(2, 3, 20, 22, dtype=dtype))
    assert result.ok and result.swapped == 2, str(result)


@pytest.mark.core
@pytest.mark.parametrize("settings", [{}, {"no_fusion": True}, {"patch": (3, 2)}, {"heads": 1}, {"layers": 0}], ids=str)
@pytest.mark.parametrize("size", [(8, 8), (7, 9), (1, 1)], ids=str)
def test_values(settings, size):
    module = block(**settings).double()
    x = torch.randn(2, 12, *size, dtype=torch.float64)
    for layout_of_memory in (torch.contiguous_format, torch.channels_last):
        x = x.contiguous(memory_format=layout_of_memory)
        expected = module(x)
        assert swap(module).entries[0].swapped
        torch.testing.assert_close(module(x), expected, rtol=1e-9, atol=1e-9)
        module.__class__ = layout.MobileViTBlock


@pytest.mark.parametrize("size", [(8, 12), (7, 11), (12, 8)], ids=str)
def test_as_many_patches_as_features(size, calls, caplog):
    """24 of each: the original's LayerNorm then normalizes over the patches, which the fused block does not."""
    module = block().double()
    x = torch.randn(2, 12, *size, dtype=torch.float64)
    expected = module(x)
    swap(module)
    calls.clear()
    with caplog.at_level(logging.WARNING, logger="mvkernels"):
        assert torch.equal(module(x), expected)
    assert not calls and "normalizes over the patches" in caplog.text
    module(torch.randn(2, 12, 8, 8, dtype=torch.float64))
    assert len(calls) == 1
    # As high as there are features: the original normalizes patches, never the map.
    x = torch.randn(1, 12, 24, 6, dtype=torch.float64)
    torch.testing.assert_close(module(x), module.mvk_original.forward(module, x), rtol=1e-9, atol=1e-9)


DECLINED = {
    "coreml": (lambda: changed("global_rep.0.pre_norm_mha.1", coreml_compatible=True), "layout for CoreML"),
    "channels first": (lambda: changed("global_rep.0.pre_norm_ffn.1", channel_first=True), "takes channels first"),
    "group norm": (lambda: replaced("global_rep.2", nn.GroupNorm(1, 24)), "want a LayerNorm"),
    "adapter": (
        lambda: replaced("global_rep.0.pre_norm_ffn.1", nn.Sequential(nn.Linear(24, 48))),
        "plain torch.nn.Linear",
    ),
    "softmax": (lambda: replaced("global_rep.0.pre_norm_ffn.2", nn.Softmax(-1)), "not known to be element-wise"),
    "scale": (lambda: changed("", patch_h=3, unfolding=None), "it has a replaced method"),
    "formula": (lambda: block(kind=OtherFormula), "computes something other"),
}


def changed(name: str, **attributes) -> nn.Module:
    module = block()
    module.get_submodule(name).__dict__.update(attributes)
    return module


def replaced(name: str, part: nn.Module) -> nn.Module:
    module = block()
    parent, _, child = name.rpartition(".")
    module.get_submodule(parent)._modules[child] = part
    return module.eval()


@pytest.mark.parametrize("change", DECLINED)
def test_declined(change):
    make, reason = DECLINED[change]
    module = make()
    kind = type(module)
    entry = swap(module).entries[0]
    assert not entry.swapped and reason in entry.reason, entry.reason
    assert type(module) is kind


def test_what_changes_later_is_left_to_the_original(calls):
    module = block(attn_dropout=0.5, dropout=0.5)
    swap(module)
    calls.clear()
    x = torch.randn(2, 12, 8, 8)
    module(x)
    assert len(calls) == 1
    module.train()(x)
    module.eval()((x, "previous"))
    handle = module.global_rep[0].pre_norm_mha[1].qkv_proj.register_forward_hook(lambda *_: None)
    module(x)
    assert len(calls) == 1
    handle.remove()
    module(x)
    assert len(calls) == 2


def test_copies_pickles_and_compiles():
    module = block().double()
    x = torch.randn(1, 12, 8, 10, dtype=torch.float64)
    with torch.no_grad():
        expected = module(x)
        swap(module)
        twin = pickle.loads(pickle.dumps(copy.deepcopy(module)))
        torch.testing.assert_close(twin(x), expected)
        torch.testing.assert_close(torch.compile(module, fullgraph=True, backend="eager")(x), expected)
