"""EfficientViT, DC-AE, Sana: modules that swap() leaves alone, and changes that send a swapped one to its original."""

from __future__ import annotations

import copy
import functools
import logging
import re

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from mvkernels.swap import eligibility, swap
from mvkernels.swap.report import restore_module
from tests import efficientvit_layout as layout

from .linear_attention import FAMILIES, Family, mit_attention, randomised, spy, timm_attention

MULTISCALE = [name for name in FAMILIES if name != "sana"]


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


def restored(module: nn.Module) -> nn.Module:
    """A copy of a swapped module, with what it had before."""
    twin = copy.deepcopy(module)
    restore_module(twin)
    return twin


def replace(module: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(parent), leaf, new)


def adapt(module: nn.Module, family: Family) -> None:
    """A LoRA wrapper: what was there, and a little more."""
    old = module.get_submodule(family.linear)

    class Adapter(type(old)):  # type: ignore[misc]
        def forward(self, x):
            return super().forward(x) + 0.1 * x.mean()

    twin = copy.deepcopy(old)
    twin.__class__ = Adapter
    replace(module, family.linear, twin)


def replace_forward(module: nn.Module, family: Family) -> None:
    part = module.get_submodule(family.linear)
    part.forward = lambda x, forward=part.forward: 2 * forward(x)


CHANGES = {
    "adapter": (adapt, f"is a {__name__}.adapt.<locals>.Adapter, want a plain torch.nn."),
    "parametrization": (
        lambda m, f: parametrizations.weight_norm(m.get_submodule(f.linear)),
        "is a torch.nn.utils.parametrize.Parametrized",
    ),
    "pruning": (lambda m, f: prune.l1_unstructured(m.get_submodule(f.linear), "weight", 0.5), "hook"),
    "forward hook": (lambda m, f: m.get_submodule(f.linear).register_forward_hook(lambda m, i, o: 2 * o), "hook"),
    "backward hook": (
        lambda m, f: m.get_submodule(f.linear).register_full_backward_hook(lambda *a: None),
        "hook",
    ),
    "forward of the instance": (replace_forward, "replaced forward"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_declined_when_swapped(family, change):
    module = family.attention()
    alter, reason = CHANGES[change]
    alter(module, family)
    kind, x = type(module), family.example(5, 7)
    expected = module(x)
    report = swap(module)
    assert report.count == 0 and reason in report.entries[0].reason
    assert type(module) is kind
    assert torch.equal(module(x), expected)


@pytest.mark.core
@pytest.mark.parametrize("change", CHANGES)
def test_changed_after_the_swap(family, change, monkeypatch, caplog):
    """The original is taken, with whatever was changed in it, and said once."""
    module = family.attention()
    swap(module)
    seen, x = spy(family, monkeypatch), family.example(5, 7)
    module(x)
    assert len(seen) == 1
    alter, reason = CHANGES[change]
    twin = restored(module)
    for each in (module, twin):
        alter(each, family)
    with caplog.at_level(logging.WARNING, logger="mvkernels"):
        out = module(x)
        assert torch.equal(module(x), out)
    assert len(seen) == 1
    assert torch.equal(out, twin(x))
    assert [reason in r.getMessage() for r in caplog.records] == [True]


def test_a_hook_that_is_removed_again(family, monkeypatch):
    module = family.attention()
    swap(module)
    seen, heard = spy(family, monkeypatch), []
    handle = module.get_submodule(family.linear).register_forward_hook(lambda m, i, o: heard.append(1))
    module(family.example(5, 7))
    assert not seen and heard == [1]
    handle.remove()
    module(family.example(5, 7))
    assert len(seen) == 1 and heard == [1]


def test_hooks_of_the_module_itself_still_fire(family, monkeypatch):
    module = family.attention()
    fired = []
    module.register_forward_pre_hook(lambda m, i: fired.append("pre"))
    module.register_forward_hook(lambda m, i, o: fired.append("forward"))
    module.register_full_backward_hook(lambda m, i, o: fired.append("backward"))
    assert swap(module).count == 1
    seen = spy(family, monkeypatch)
    module(family.example(5, 7).requires_grad_()).sum().backward()
    assert fired == ["pre", "forward", "backward"] and len(seen) == 1


def _set(name, value):
    return lambda module: setattr(module, name, value)


def _replace(name, new):
    return lambda module: replace(module, name, new)


def _conv(**settings):
    return nn.Conv2d(48, 48, **{"kernel_size": 5, "padding": 2, "groups": 48, "bias": False, **settings})


# By family: how a module is changed, and the reason that its report gives.
DECLINED = {
    "timm": {
        "another activation": (_replace("kernel_func", nn.GELU()), "kernel_func is a torch.nn.GELU"),
        "its subclass": (_replace("kernel_func", nn.ReLU6()), "kernel_func is a torch.nn.ReLU6"),
        "a hook on it": (lambda m: m.kernel_func.register_forward_hook(lambda *a: None), "kernel_func has a hook"),
        "bias": (_replace("qkv.conv", nn.Conv2d(16, 48, 1)), "qkv.conv has a bias"),
        "norm": (_replace("qkv.norm", nn.BatchNorm2d(48)), "qkv.norm is a torch.nn.BatchNorm2d"),
        "activation of qkv": (_replace("qkv.act", nn.Hardswish()), "qkv.act is a torch.nn.Hardswish"),
        "another projection": (_replace("qkv", nn.Conv2d(16, 48, 1)), "qkv is a torch.nn.Conv2d"),
        "three convolutions": (lambda m: m.aggreg[0].append(nn.Identity()), "a scale of aggreg has 3 modules, want 2"),
        "unequal scales": (lambda m: m.aggreg.append(nn.Conv2d(48, 48, 1)), "aggreg is a torch.nn.Conv2d"),
        "bias of a scale": (_replace("aggreg.0.0", _conv(bias=True)), "aggreg has a bias"),
        "stride": (_replace("aggreg.0.0", _conv(stride=2)), "changes the number of channels or pixels"),
        "dilation": (_replace("aggreg.0.0", _conv(dilation=2, padding=4)), "not a depthwise convolution"),
        "padding": (_replace("aggreg.0.0", _conv(padding_mode="reflect")), "not a depthwise convolution"),
        "full": (_replace("aggreg.0.0", _conv(groups=1)), "not a depthwise convolution"),
        "groups": (_replace("aggreg.0.1", _conv(kernel_size=1, padding=0, groups=2)), "in groups of 8"),
        "weights of their own kind": (
            lambda m: setattr(m.aggreg[0][0], "weight", nn.Parameter(m.aggreg[0][0].weight.as_subclass(Odd))),
            f"the weight of aggreg is a {__name__}.Odd",
        ),
        "_attn": (_set("_attn", lambda q, k, v: v), "a replaced _attn"),
        "learned eps": (_set("eps", torch.tensor(1e-5)), "eps is a torch.Tensor, want a number"),
        "forward": (_set("forward", lambda x: x), "replaced forward"),
    },
    "mit": {
        "another activation": (_replace("kernel_func", nn.GELU()), "kernel_func is a torch.nn.GELU"),
        "bias": (_replace("qkv.conv", nn.Conv2d(16, 48, 1)), "qkv.conv has a bias"),
        "norm": (lambda m: setattr(m.qkv, "norm", nn.BatchNorm2d(48)), "qkv.norm is a torch.nn.BatchNorm2d"),
        "bias of a scale": (_replace("aggreg.0.1", nn.Conv2d(48, 48, 1, groups=6)), "aggreg has a bias"),
        "dim": (_set("dim", 5), "want a multiple of 3 * dim"),
        "learned eps": (_set("eps", torch.tensor(1e-5)), "eps is a torch.Tensor, want a number"),
        "method": (_set("relu_linear_att", lambda qkv: qkv), "cannot be compared|something other|replaced"),
    },
    "dc-ae": {
        "another activation": (_replace("nonlinearity", nn.SiLU()), "nonlinearity is a torch.nn.SiLU"),
        "processor": (_set("processor", lambda attn, x: x), "its processor is a function"),
        "bias": (_replace("to_k", nn.Linear(16, 16)), "to_k has a bias"),
        "bias of to_out": (_replace("to_out", nn.Linear(32, 16)), "to_out has a bias"),
        "bias of a scale": (_replace("to_qkv_multiscale.0.proj_in", _conv(bias=True)), "to_qkv_multiscale has a bias"),
        "dtype": (lambda m: m.to_v.bfloat16(), "another dtype or device"),
        "head_dim": (_set("attention_head_dim", 5), "heads of 5 channels"),
        "learned eps": (_set("eps", torch.tensor(1e-5)), "eps is a torch.Tensor, want a number"),
        "method": (_set("apply_quadratic_attention", lambda q, k, v: v), "a replaced apply_quadratic_attention"),
        "forward": (_set("forward", lambda x: x), "replaced forward"),
    },
    "sana": {
        "processor": (lambda m: m.set_processor(Other()), f"its processor is a {__name__}.Other"),
        "dropout": (lambda m: m.to_out.__setitem__(1, nn.Identity()), "to_out.1 is a torch.nn.Identity"),
        "heads": (_set("heads", 3), "split into 3 heads"),
        "keys of another width": (_replace("to_k", nn.Linear(16, 8)), "do not have equal outputs"),
    },
}


class Odd(torch.Tensor):
    pass


class Other:
    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        return hidden_states


@pytest.mark.parametrize("name, change", [(name, change) for name in DECLINED for change in DECLINED[name]])
def test_options(name, change):
    module = FAMILIES[name].attention()
    alter, reason = DECLINED[name][change]
    alter(module)
    kind = type(module)
    report = swap(module)
    assert report.count == 0 and type(module) is kind
    assert re.search(re.escape(reason) if "|" not in reason else reason, report.entries[0].reason)


@pytest.mark.parametrize("name", MULTISCALE)
def test_eps_that_becomes_a_tensor(name, caplog):
    """It may have a gradient, which the fused op has not for it."""
    module = FAMILIES[name].attention()
    x = FAMILIES[name].example(5, 7)
    assert swap(module).count == 1
    module.eps = torch.tensor(1e-3, requires_grad=True)
    with caplog.at_level(logging.WARNING, logger="mvkernels"):
        out = module(x)
    assert torch.equal(out, restored(module)(x)) and out.requires_grad
    assert torch.autograd.grad(out.square().sum(), module.eps)[0] != 0


@pytest.mark.parametrize("name", FAMILIES)
def test_a_swap_goes_before_fully_shard(name, one_process):
    module = FAMILIES[name].attention()
    one_process(module)
    (entry,) = swap(module).entries
    assert entry.reason == "fully_shard has sharded it: swap the model first, then shard it"


@pytest.mark.parametrize("name", MULTISCALE)
def test_a_subclass(name):
    module = FAMILIES[name].attention()

    class Mine(type(module)):
        def forward(self, x):
            return super().forward(x) + 1.0

    module.__class__ = Mine
    report = swap(module)
    assert report.count == 0 and type(module) is Mine
    assert ("something other" if name == "mit" else "subclass") in report.entries[0].reason


class Extra(layout.LiteMLA):
    def relu_linear_att(self, qkv):
        return super().relu_linear_att(qkv) * (1 + 1e-6)


class ExtraOnSmallMaps(layout.LiteMLA):
    def relu_quadratic_att(self, qkv):
        return super().relu_quadratic_att(qkv) + 1e-6


class AnotherEps(layout.LiteMLA):
    def relu_linear_att(self, qkv):
        eps, self.eps = self.eps, 1e-3
        try:
            return super().relu_linear_att(qkv)
        finally:
            self.eps = eps


class Contiguous(layout.LiteMLA):
    """All queries, then all keys, then all values, as to_q, to_k and to_v of DC-AE are not."""

    def split(self, qkv):
        q, k, v = qkv.flatten(2).unflatten(1, (3, -1, self.dim)).unbind(1)
        return self.kernel_func(q), self.kernel_func(k), v


class Fails(layout.LiteMLA):
    def forward(self, x):
        raise RuntimeError("not today\nnor tomorrow")


class MoreArguments(layout.LiteMLA):
    def forward(self, x, mask=None):
        return super().forward(x)


@pytest.mark.parametrize(
    "kind, reason",
    [
        (Extra, "computes something other"),
        (ExtraOnSmallMaps, "computes something other"),
        (AnotherEps, "computes something other"),
        (Contiguous, "computes something other"),
        (Fails, "cannot be compared with the known formula: not today"),
        (MoreArguments, "takes other arguments"),
    ],
)
def test_the_same_structure_that_computes_something_else(kind, reason):
    module = randomised(kind(16, 16, scales=()))
    before = {k: v.clone() for k, v in module.state_dict().items()}
    report = swap(module)
    assert type(module) is kind and not report.entries[0].swapped
    assert reason in report.entries[0].reason
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


def test_another_name_and_the_same_computation():
    """Structure and behaviour decide, not the class; and without an eps it is something else."""
    module = randomised(type("Attend", (layout.LiteMLA,), {})(16, 16))
    assert swap(module).count == 1 and type(module).__name__ == "Attend"
    module = mit_attention()
    del module.eps
    assert [e.reason for e in swap(module).entries] == ["no fused form of this class is known"]


def test_a_norm_that_runs_elsewhere():
    """DC-AE's norm in MIT's code is a kernel for CUDA; the module is asked on the CPU."""

    class OnCUDA(nn.BatchNorm2d):
        def forward(self, x):
            if not x.is_cuda:
                raise AssertionError("Torch not compiled with CUDA enabled")
            return super().forward(x)

    module = mit_attention()
    module.proj.norm = OnCUDA(16)
    assert swap(module).count == 1


@pytest.mark.parametrize("method", ["forward", "_attn"])
@pytest.mark.parametrize("when", ["before", "after", "before the library met it"])
def test_a_method_of_timms_class_replaced(method, when, monkeypatch):
    module, x = timm_attention(), torch.randn(2, 16, 5, 7)
    kind = type(module)
    written = getattr(kind, method)

    @functools.wraps(written)
    def twice(self, *args, **kwargs):
        return 2 * written(self, *args, **kwargs)

    if when == "after":
        assert swap(module).count == 1
        module(x)
    if when == "before the library met it":
        monkeypatch.setattr(eligibility, "_written", eligibility._Written())
    monkeypatch.setattr(kind, method, twice)
    if when != "after":
        report = swap(module)
        assert report.count == 0 and f"has a replaced {method}" in report.entries[0].reason
    assert torch.equal(module(x), twice_of(module, kind)(x))


def twice_of(module: nn.Module, kind: type) -> nn.Module:
    twin = copy.deepcopy(module)
    twin.__class__ = kind
    return twin


def test_odd_calls_go_to_the_original(family, monkeypatch):
    module = family.attention()
    swap(module)
    seen, x = spy(family, monkeypatch), family.example(5, 7)
    with pytest.raises((TypeError, ValueError, RuntimeError, IndexError)):
        module(x[0, 0])
    assert not seen
    torch.jit.trace(module, x, check_trace=False)
    assert not seen
    handle = nn.modules.module.register_module_forward_hook(lambda *a: None)
    try:
        module(x)
    finally:
        handle.remove()
    assert not seen
    torch.func.grad(lambda x: module(x).sum())(x)
    assert not seen
    module(x)
    assert len(seen) == 1


def test_scripting_compiles_timms_original():
    module, x = timm_attention(), torch.randn(2, 16, 5, 7)
    expected = module(x)
    assert swap(module).count == 1
    scripted = torch.jit.script(module)
    assert "mvkernels" not in str(scripted.inlined_graph)
    torch.testing.assert_close(scripted(x), expected, rtol=1e-4, atol=1e-4)


def test_modules_without_memory(family):
    """Swapping does not read the weights, so that they may not be there yet."""
    module = family.attention().to("meta")
    assert swap(module).count == 1
    assert next(module.parameters()).is_meta
