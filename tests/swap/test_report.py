"""swap(): what it finds, what it says, what it leaves alone, and the way back."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

from mvkernels.swap import swap

from .conftest import output


def test_report(family):
    model = family.model()
    report = swap(model)
    assert report.count == 3
    assert [e.name for e in report.entries] == list(family.blocks)
    assert all(e.module_class == family.class_name and e.swapped and not e.reason for e in report.entries)
    text = str(report)
    assert all(name in text for name in family.blocks)
    assert family.class_name in text and "3 of 3 swapped" in text


def test_restore_gives_the_original_back(family):
    model = family.model()
    x = torch.randn(1, 3, 64, 64)
    expected = output(model(x))
    before = [(type(m), set(m.__dict__)) for m in model.modules()]
    report = swap(model, backend="reference")
    assert before != [(type(m), set(m.__dict__)) for m in model.modules()]
    report.restore()
    report.restore()
    assert before == [(type(m), set(m.__dict__)) for m in model.modules()]
    assert torch.equal(output(model(x)), expected)
    assert report.count == 0


def test_state_dict_is_untouched(family):
    model = family.model()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    parameters = list(model.parameters())
    swap(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[k], v) for k, v in before.items())
    assert all(a is b for a, b in zip(model.parameters(), parameters))
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(0.5)
    x = torch.randn(1, 3, 64, 64)
    model.load_state_dict(other.state_dict())
    assert torch.equal(output(model(x)), output(other(x)))


def test_swapping_twice_changes_nothing(family):
    model = family.model()
    first = swap(model)
    types = [type(m) for m in model.modules()]
    second = swap(model)
    assert [type(m) for m in model.modules()] == types
    assert second.count == 0
    assert [(e.swapped, e.reason) for e in second.entries] == [(True, "already swapped")] * 3
    second.restore()
    assert [type(m) for m in model.modules()] == types
    first.restore()
    assert type(model.get_submodule(family.blocks[0])).__name__ == family.class_name


def test_a_block_on_its_own(family):
    block = family.block()
    report = swap(block)
    assert report.count == 1
    assert report.entries[0].name == ""
    assert "(the model)" in str(report)


@pytest.mark.parametrize(
    "only, count",
    [
        (lambda names: names[1], 1),
        (lambda names: [names[0], names[2]], 2),
        (set, 3),
        (lambda names: [], 0),
        (lambda names: lambda name, module: name == names[2] and isinstance(module, nn.Module), 1),
    ],
    ids=["name", "list", "set", "empty", "predicate"],
)
def test_only(family, only, count):
    model = family.model()
    report = swap(model, only=only(family.blocks))
    assert report.count == count
    assert len(report.entries) == 3
    assert sum(e.reason == "not chosen by only" for e in report.entries) == 3 - count


def test_only_with_an_unknown_name(family):
    model = family.model()
    with pytest.raises(ValueError, match=family.blocks[1].replace(".", r"\.")):
        swap(model, only=[family.blocks[0], family.blocks[1] + "x"])
    assert not any(hasattr(type(m), "mvk_original") for m in model.modules())


@pytest.mark.parametrize("only", [3, [3], object()], ids=["int", "list", "object"])
def test_only_of_the_wrong_type(family, only):
    with pytest.raises(TypeError, match="only"):
        swap(family.block(), only=only)


@pytest.mark.parametrize("model", [None, "mobilevit_s", nn.Linear, torch.zeros(1)], ids=lambda m: type(m).__name__)
def test_not_a_module(model):
    with pytest.raises(TypeError, match=r"swap: model is a .*, want a torch\.nn\.Module"):
        swap(model)


def test_unknown_backend(family):
    block = family.block()
    with pytest.raises(ValueError, match="backend"):
        swap(block, backend="fastest")
    assert type(block).__name__ == family.class_name


def test_backend_is_passed_on(family, monkeypatch):
    from mvkernels.nn import patch_transformer

    seen = []

    def spy(*args, backend=None, **kwargs):
        seen.append(backend)
        return original(*args, **kwargs)

    original = patch_transformer.patch_attention
    monkeypatch.setattr(patch_transformer, "patch_attention", spy)
    block = family.block()
    swap(block, backend="reference")
    block(torch.randn(1, 12, 8, 8))
    assert seen == ["reference"] * 2


def test_unavailable_backend_raises_at_the_call(family):
    import mvkernels

    block = family.block()
    swap(block, backend="cuda")
    with pytest.raises(mvkernels.BackendUnavailable):
        block(torch.randn(1, 12, 8, 8))


def test_nothing_to_swap():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
    report = swap(model)
    assert report.count == 0 and report.entries == []
    assert "nothing to swap" in str(report)
    report.restore()


def test_attention_without_a_fused_form_is_listed():
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=3).eval()
    x = torch.randn(1, 3, 224, 224)
    expected, types = model(x), [type(m) for m in model.modules()]
    report = swap(model)
    assert [type(m) for m in model.modules()] == types
    assert torch.equal(model(x), expected)
    assert [(e.name, e.module_class, e.swapped) for e in report.entries] == [
        (f"blocks.{i}.attn", "Attention", False) for i in range(2)
    ]
    assert "no fused form" in report.entries[0].reason
    assert "the model is unchanged" in str(report)


def test_a_subclass_is_declined(family):
    block = family.block()
    original = type(block)
    block.__class__ = type("Mine", (original,), {})
    report = swap(block)
    assert not report.entries[0].swapped
    assert "subclass" in report.entries[0].reason
    assert type(block).__name__ == "Mine"


def test_copy_and_pickle(family):
    model = family.model()
    x = torch.randn(1, 3, 64, 64)
    swap(model, backend="reference")
    expected = output(model(x))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)):
        assert torch.equal(output(other(x)), expected)
        assert swap(other).count == 0
        with torch.no_grad():
            for p in other.parameters():
                p.zero_()
        assert torch.equal(output(model(x)), expected)  # nothing is shared


def test_moves_and_modes(family):
    model = family.model()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = output(model(x))
        swap(model)
        torch.testing.assert_close(output(model.double()(x.double())), expected.double(), rtol=1e-3, atol=1e-3)
        assert output(model.bfloat16()(x.bfloat16())).dtype == torch.bfloat16
        model.float().train()
        assert all(m.training for m in model.modules())
        model.eval()
        assert output(model(x)).isfinite().all()


_LAZY = """
import sys
import torch, mvkernels
from mvkernels.swap import swap, verify_swap
print(swap(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.MultiheadAttention(4, 2))))
third = {"timm", "transformers", "torchvision", "diffusers"} & {name.split(".")[0] for name in sys.modules}
assert not third, third
"""

_ORDERS = """
import mvkernels.swap.report
from mvkernels.swap.engine import find
import mvkernels
from mvkernels.swap import swap, verify_swap
import mvkernels.swap.verification
from mvkernels.swap.report import SwapReport
if hasattr(mvkernels, "verify_swap"):
    assert mvkernels.swap is swap and mvkernels.verify_swap is verify_swap
assert swap.__module__ == "mvkernels.swap.engine"
"""


@pytest.mark.parametrize("script", [_LAZY, _ORDERS], ids=["lazy", "orders"])
def test_imports(script):
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, timeout=120)


def test_a_predicate_that_raises_leaves_the_model_as_it_was(family):
    model = family.model()
    before = [type(m) for m in model.modules()]

    def second_time_unlucky(name, module):
        if name != family.blocks[0]:
            raise KeyError(name)
        return True

    with pytest.raises(KeyError):
        swap(model, only=second_time_unlucky)
    assert [type(m) for m in model.modules()] == before
