"""Blocks that swap() leaves alone, and changes after which a swapped block calls its original forward again."""

from __future__ import annotations

import copy
import functools
import logging

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from mvkernels.nn import patch_transformer
from mvkernels.swap import eligibility, swap

from .conftest import FAMILIES, timm_block


class Adapter(nn.Linear):
    """A Linear by name and shape, which computes more."""

    def forward(self, x):
        return super().forward(x) + 0.1 * x.mean()


def replace(block: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(block.get_submodule(parent), leaf, new)


def adapt(block, family):
    old = block.get_submodule(family.linear)
    new = Adapter(old.in_features, old.out_features)
    new.load_state_dict(old.state_dict())
    replace(block, family.linear, new)


def parametrize(block, family):
    parametrizations.weight_norm(block.get_submodule(family.linear))


def mix_dtypes(block, family):
    block.get_submodule(family.linear).bfloat16()


def replace_forward(block, family):
    linear = block.get_submodule(family.linear)
    linear.forward = lambda x, forward=linear.forward: 2 * forward(x)


CHANGES = {
    "adapter": (adapt, "Adapter"),
    "parametrization": (parametrize, "ParametrizedLinear"),
    "pruning": (lambda b, f: prune.l1_unstructured(b.get_submodule(f.linear), "weight", 0.5), "hook"),
    "forward hook": (lambda b, f: b.get_submodule(f.linear).register_forward_hook(lambda m, i, o: 2 * o), "hook"),
    "forward pre-hook": (
        lambda b, f: b.get_submodule(f.container).register_forward_pre_hook(lambda m, i: (2 * i[0],)),
        "hook",
    ),
    "backward hook": (lambda b, f: b.get_submodule(f.attention).register_full_backward_hook(lambda *a: None), "hook"),
    "forward of the instance": (replace_forward, "replaced forward"),
    "softmax": (lambda b, f: replace(b, f.activation, nn.Softmax(-1)), "not known to be element-wise"),
    "activation with parameters": (lambda b, f: replace(b, f.activation, nn.PReLU()), "not known to be element-wise"),
}


def calls_of_attention(monkeypatch) -> list[int]:
    """Grows by one whenever the fused attention is called."""
    seen: list[int] = []
    original = patch_transformer.patch_attention

    def spy(*args, **kwargs):
        seen.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(patch_transformer, "patch_attention", spy)
    return seen


@pytest.mark.parametrize("when", ["before", "after", "before the library met it"])
@pytest.mark.parametrize(
    ("part", "method"), [("attention", "forward"), ("block", "forward"), ("block", "unfolding"), ("block", "folding")]
)
def test_a_method_replaced_in_a_class(family, part, method, when, monkeypatch):
    block = family.block()
    kind = type(block.get_submodule(family.attention) if part == "attention" else block)
    if not hasattr(kind, method):
        pytest.skip("it has none")
    written, x = getattr(kind, method), torch.randn(1, 12, 8, 8)

    @functools.wraps(written)
    def twice(self, *args, **kwargs):
        out = written(self, *args, **kwargs)
        return tuple(2 * o if isinstance(o, torch.Tensor) else o for o in out) if isinstance(out, tuple) else 2 * out

    if when == "after":
        assert swap(block).count == 1
        block(x)
    if when == "before the library met it":
        monkeypatch.setattr(eligibility, "_written", eligibility._Written())
        when = "before"
    monkeypatch.setattr(kind, method, twice)
    if when == "before":
        report = swap(block)
        assert report.count == 0 and f"has a replaced {method}" in report.entries[0].reason
    twin = copy.deepcopy(block)
    twin.__class__ = getattr(type(twin), "mvk_original", type(twin))
    torch.testing.assert_close(block(x), twin(x), rtol=0, atol=0)


def test_settings_of_timms_attention_changed_after_a_call():
    block = FAMILIES["timm"].block()
    twin, x = copy.deepcopy(block), torch.randn(1, 12, 8, 8)
    assert swap(block).count == 1
    for setting, value in (("scale", 1.0), ("fused_attn", False), ("scale", 0.5)):
        for module in (block, twin):
            for layer in module.transformer:
                setattr(layer.attn, setting, value)
        torch.testing.assert_close(block(x), twin(x))


@pytest.mark.parametrize("setting", ["padding", "stride", "groups", "normalized_shape"])
def test_settings_of_convolutions_and_norms_changed_after_a_call(family, setting):
    block = family.block()
    twin, x = copy.deepcopy(block), torch.randn(1, 12, 8, 8)
    assert swap(block).count == 1
    block(x)
    for module in (block, twin):
        hugging = family.class_name == "MobileViTLayer"
        into, norm = (module.conv_1x1.convolution, module.layernorm) if hugging else (module.conv_1x1, module.norm)
        if setting == "groups":
            into.groups, into.weight = 2, nn.Parameter(into.weight[:, : into.in_channels // 2])
        elif setting == "normalized_shape":
            size = 2 if hugging else 4  # of the map, in patches: a downsampling comes first
            norm.normalized_shape, norm.weight, norm.bias = (size * size, into.out_channels), None, None
        else:
            setattr(into, setting, (2, 2))
    if setting in ("padding", "stride"):  # the map no longer fits what it is joined with
        for module in (block, twin):
            with pytest.raises(RuntimeError, match="Sizes of tensors"):
                module(x)
    else:
        assert torch.equal(block(x), twin(x))


def test_a_part_of_another_kind_added_after_a_call():
    block = FAMILIES["timm"].block()
    twin, x = copy.deepcopy(block), torch.randn(1, 12, 8, 8)
    assert swap(block).count == 1
    block(x)
    for module in (block, twin):
        module.transformer.append(nn.Tanh())
    assert torch.equal(block(x), twin(x))


def test_scripting_compiles_the_original():
    block, x = FAMILIES["timm"].block(), torch.randn(1, 12, 8, 8)
    expected = block(x)
    assert swap(block).count == 1
    scripted = torch.jit.script(block)
    assert "mvkernels" not in str(scripted.inlined_graph)
    torch.testing.assert_close(scripted(x), expected)
    torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize("change", CHANGES)
def test_declined_when_swapped(family, change):
    block = family.block()
    alter, reason = CHANGES[change]
    alter(block, family)
    original, x = type(block), torch.randn(1, 12, 8, 8)
    expected = block(x)
    report = swap(block)
    assert report.count == 0 and not report.entries[0].swapped
    assert reason in report.entries[0].reason
    assert type(block) is original
    assert torch.equal(block(x), expected)


@pytest.mark.core
@pytest.mark.parametrize("change", CHANGES)
def test_changed_after_the_swap(family, change, monkeypatch, caplog):
    """The original forward is taken, with whatever was changed in it, and said once."""
    block = family.block()
    swap(block)
    x = torch.randn(1, 12, 8, 8)
    seen = calls_of_attention(monkeypatch)
    block(x)
    assert len(seen) == 2
    alter, reason = CHANGES[change]
    twin = copy.deepcopy(block)
    twin.__class__ = type(twin).mvk_original
    for module in (block, twin):
        torch.manual_seed(1)
        alter(module, family)
    with caplog.at_level(logging.WARNING, logger="mvkernels"):
        out = block(x)
        assert torch.equal(block(x), out)
    assert len(seen) == 2
    assert torch.equal(out, twin(x))
    assert [reason in r.getMessage() for r in caplog.records] == [True]


def test_reasons_name_foreign_classes_in_full(family):
    """LoRA's Linear and that of quantization-aware training are called Linear too."""
    block = family.block()
    foreign = type("Linear", (nn.Linear,), {"__module__": "peft.tuners.lora.layer"})
    block.get_submodule(family.linear).__class__ = foreign
    name = family.linear.removeprefix("transformer.0.").rpartition("attention.")[2]
    reason = swap(block).entries[0].reason
    assert f"{name} is a peft.tuners.lora.layer.Linear, want a plain torch.nn.Linear" in reason
    block = family.block()
    convolution = next(n for n, m in block.named_modules() if type(m) is nn.Conv2d and "conv_1x1" in n)
    block.get_submodule(convolution).__class__ = torch.ao.nn.qat.Conv2d
    reason = swap(block).entries[0].reason
    assert f"{convolution} is a torch.ao.nn.qat.modules.conv.Conv2d, want a plain torch.nn.Conv2d" in reason


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (nn.Linear, "torch.nn.Linear"),
        (nn.Parameter, "torch.nn.Parameter"),
        (torch.Tensor, "torch.Tensor"),
        (float, "float"),
        (Adapter, f"{__name__}.Adapter"),
        (parametrizations.weight_norm(nn.Linear(2, 2)).__class__, "torch.nn.utils.parametrize.ParametrizedLinear"),
    ],
)
def test_class_name(kind, name):
    assert eligibility.class_name(kind) == name


@pytest.mark.parametrize("root", [False, True], ids=["the block", "the model"])
def test_a_swap_goes_before_fully_shard(family, root, one_process):
    block = family.block()
    model = nn.Sequential(block)
    one_process(model if root else block)
    kind = type(block)
    (entry,) = swap(model).entries
    assert not entry.swapped and type(block) is kind
    assert "sharded" in entry.reason and entry.reason.endswith("swap the model first, then shard it")


def test_hook_removed_again(family, monkeypatch):
    block = family.block()
    swap(block)
    x = torch.randn(1, 12, 8, 8)
    seen = calls_of_attention(monkeypatch)
    recorded = []
    handle = block.get_submodule(family.linear).register_forward_hook(lambda m, i, o: recorded.append(i[0].shape))
    block(x)
    assert not seen and recorded[0][0] == 4  # the tokens of four groups, as in the original
    handle.remove()
    block(x)
    assert len(seen) == 2 and len(recorded) == 1


def test_hooks_of_the_block_itself_still_fire(family):
    block = family.block()
    fired = []
    block.register_forward_pre_hook(lambda m, i: fired.append("pre"))
    block.register_forward_hook(lambda m, i, o: fired.append("forward"))
    block.register_full_backward_hook(lambda m, i, o: fired.append("backward"))
    assert swap(block).count == 1
    block(torch.randn(1, 12, 8, 8, requires_grad=True)).sum().backward()
    assert fired == ["pre", "forward", "backward"]


def test_attention_dropout(family, monkeypatch):
    block = family.block(**family.attention_dropout)
    assert swap(block).count == 1
    seen = calls_of_attention(monkeypatch)
    x = torch.randn(2, 12, 8, 8)
    block(x)
    assert len(seen) == 2
    twin = copy.deepcopy(block).train()
    twin.__class__ = type(twin).mvk_original
    block.train()
    outputs = []
    for module in (block, twin):
        torch.manual_seed(3)
        outputs.append(module(x))
    assert torch.equal(*outputs)
    assert len(seen) == 2


def test_replaced_forward_of_the_block(family):
    """accelerate and others put a forward on the instance, which a class cannot replace."""
    block = family.block()
    block.forward = lambda x: x
    report = swap(block)
    assert not report.entries[0].swapped and "replaced forward" in report.entries[0].reason


def test_more_arguments_go_to_the_original(family):
    block = family.block()
    swap(block)
    with pytest.raises(TypeError):
        block(torch.randn(1, 12, 8, 8), torch.ones(1))
    with pytest.raises(TypeError):
        block(torch.randn(1, 12, 8, 8), output_attentions=True)


def test_keyword_input(family):
    block = family.block()
    x = torch.randn(1, 12, 8, 8)
    expected = block(x)
    swap(block)
    name = "features" if family.class_name == "MobileViTLayer" else "x"
    torch.testing.assert_close(block(**{name: x}), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda a, layer: setattr(a, "q_norm", nn.LayerNorm(6)), "q_norm"),
        (lambda a, layer: setattr(a, "norm", nn.LayerNorm(24)), "attn.norm"),
        (lambda a, layer: setattr(a, "gate", nn.Linear(24, 24)), "gate"),
        (lambda a, layer: setattr(layer, "ls1", nn.Linear(24, 24)), "ls1"),
        (lambda a, layer: setattr(layer, "norm2", nn.RMSNorm(24)), "norm2"),
        (lambda a, layer: setattr(layer.mlp, "norm", nn.LayerNorm(48)), "mlp.norm"),
    ],
    ids=["qk-norm", "scale-norm", "gate", "layer-scale", "rms-norm", "mlp-norm"],
)
def test_timm_options(change, reason):
    block = timm_block()
    change(block.transformer[1].attn, block.transformer[1])
    report = swap(block)
    assert not report.entries[0].swapped
    assert reason in report.entries[0].reason


def test_timm_norm_layer_subclass():
    timm_layers = pytest.importorskip("timm.layers")
    block = timm_block(transformer_norm_layer=timm_layers.LayerNorm)
    assert "LayerNorm" in swap(block).entries[0].reason


def test_timm_drop_path(monkeypatch):
    block = timm_block(drop_path_rate=0.2)
    assert swap(block).count == 1
    seen = calls_of_attention(monkeypatch)
    x = torch.randn(2, 12, 8, 8)
    block(x)
    assert len(seen) == 2
    block.train()(x)
    assert len(seen) == 2


def test_head_counts_that_do_not_fit_or_change():
    family = FAMILIES["transformers"]
    x = torch.randn(1, 12, 8, 8)
    block, twin = family.block(), family.block()
    twin.load_state_dict(block.state_dict())
    swap(block)
    block(x)
    for module in (block, twin):
        attention = module.get_submodule(family.attention)
        attention.num_attention_heads //= 2
        attention.attention_head_size *= 2
    torch.testing.assert_close(block(x), twin(x), atol=1e-5, rtol=1e-4)
    bad = family.block()
    bad.get_submodule(family.attention).num_attention_heads = 1
    assert "do not add up" in swap(bad).entries[0].reason
