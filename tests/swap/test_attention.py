"""The report lists what mixes tokens by attention, whatever its class is called, and nothing else."""

from __future__ import annotations

import functools
import time

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as sdpa
from torch.utils._python_dispatch import TorchDispatchMode

import mvkernels
from mvkernels.swap import attention, swap
from mvkernels.swap.attention import mixes_tokens
from mvkernels.swap.engine import find
from tests.swap.attention_modules import LISTED, NOT_LISTED, Einsum, Operators, PackedMSA, Renamed

ATTENTION = [
    "botnet26t_256",
    "cait_xxs24_224",
    "coat_lite_tiny",
    "convit_tiny",
    "crossvit_tiny_240",
    "edgenext_xx_small",
    "efficientformerv2_s0",
    "efficientvit_m0",
    "fastvit_sa12",
    "gcvit_xxtiny",
    "halonet26t",
    "hiera_tiny_224",
    "lambda_resnet26t",
    "levit_128s",
    "maxvit_pico_rw_256",
    "mobilenetv4_hybrid_medium",
    "mobilevitv2_050",
    "mvitv2_tiny",
    "nextvit_small",
    "pvt_v2_b0",
    "shvit_s1",
    "swinv2_tiny_window8_256",
    "tiny_vit_5m_224",
    "twins_svt_small",
    "vit_pwee_patch16_reg1_gap_256",
    "xcit_nano_12_p8_224",
]
# Gates over channels, poolings, large kernels and mixing by products that no softmax weighs.
NO_ATTENTION = [
    "eca_resnet33ts",
    "focalnet_tiny_srf",
    "legacy_seresnet18",
    "mixer_s32_224",
    "poolformer_s12",
    "repvit_m0_9",
    "resnest14d",
    "skresnet18",
]


def on_meta(name: str) -> nn.Module:
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        return timm.create_model(name).eval()


def softmax_runs_in(model: nn.Module, *inputs: Tensor) -> set[int]:
    """The innermost modules in whose forward a softmax ran, by asking PyTorch's dispatcher."""
    stack: list[nn.Module] = []
    seen: set[int] = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "softmax" in str(func) or "scaled_dot_product" in str(func):
                seen.add(id(next(m for m in reversed(stack) if type(m) is not nn.Softmax)))
            return func(*args, **(kwargs or {}))

    def leave(module, given, result):
        stack.pop()

    for module in model.modules():
        module.register_forward_pre_hook(lambda module, given: stack.append(module))
        module.register_forward_hook(leave)
    with torch.no_grad(), Watch():
        model(*inputs)
    return seen


@pytest.mark.parametrize("name", ATTENTION)
def test_what_runs_a_softmax_in_timms_models_is_listed(name):
    model = on_meta(name)
    found = find(model)
    size = model.default_cfg["input_size"]
    ran = softmax_runs_in(model, torch.empty(1, *size, device="meta"))
    listed = [{id(part) for part in module.modules()} for _, module, _ in found]  # a block, or its attention
    assert ran and all(parts & ran for parts in listed) and ran <= set().union(*listed)


@pytest.mark.parametrize("name", NO_ATTENTION)
def test_gates_and_other_mixers_of_timm_are_not_listed(name):
    assert find(on_meta(name)) == []


def test_gates_over_channels_and_pixels_are_not_listed():
    timm = pytest.importorskip("timm")
    for layer in ("se", "ese", "eca", "ecam", "cbam", "lcbam", "sk"):
        gate = timm.layers.create_attn(layer, 32)
        assert gate is not None and find(nn.Sequential(nn.Conv2d(3, 32, 1), gate)) == [], layer


@pytest.mark.parametrize(
    "kind", ["detr", "segformer", "swin", "swinv2", "vit", "pvt_v2", "mobilevitv2", "hiera", "levit", "yolos"]
)
def test_transformers(kind):
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(kind)
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(config).eval()
    found = find(model)
    assert found and not any(module is model or isinstance(module, nn.ModuleList) for _, module, _ in found)
    # A block of a family is listed whole, and of others their attention.
    assert all(family or "attention" in type(module).__name__.lower() for _, module, family in found)
    if kind != "detr":  # looks at the values of a mask
        ran = softmax_runs_in(
            model, torch.empty(1, 3, 256 if "v2" in kind else 224, 256 if "v2" in kind else 224, device="meta")
        )
        listed = [{id(part) for part in module.modules()} for _, module, _ in found]
        assert ran and all(parts & ran for parts in listed) and ran <= set().union(*listed)


@pytest.mark.parametrize("make", LISTED, ids=lambda make: getattr(make, "__name__", "partial"))
def test_what_attends_is_listed(make):
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Identity(), make()))
    (entry,) = swap(model).entries
    assert (entry.name, entry.module_class, entry.swapped) == ("1.1", type(make()).__name__, False)
    assert entry.reason == "no fused form of this class is known"


@pytest.mark.parametrize("kind", NOT_LISTED)
def test_what_does_not_is_not_listed(kind):
    assert find(nn.Sequential(nn.Linear(8, 8), kind())) == []


def test_the_innermost_where_they_nest():
    class Outer(Operators):
        def __init__(self):
            super().__init__()
            self.inner, self.beside = Einsum(), nn.Sequential(PackedMSA())

        def forward(self, x):
            return self.inner(x).softmax(-1) @ self.beside(x)

    names = [name for name, _, _ in find(nn.Sequential(Outer(), Outer()))]
    assert names == ["0.inner", "0.beside.0", "1.inner", "1.beside.0"]
    layer = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, batch_first=True), 2)
    assert [name for name, _, _ in find(layer)] == ["layers.0.self_attn", "layers.1.self_attn"]


def test_shared_modules_are_listed_once():
    shared = Operators()
    assert [name for name, _, _ in find(nn.Sequential(shared, nn.Sequential(shared), Einsum()))] == ["0", "2"]


def test_this_librarys_modules_are_not_listed():
    from mvmodels import create_model

    assert find(nn.Sequential(mvkernels.nn.LiteMLA(32, head_dim=8), mvkernels.nn.PatchTransformer(8, 1, 2))) == []
    assert find(create_model("mobile_former_26m")) == []


def test_odd_modules():
    class NeverInitialised(nn.Module):
        def __init__(self):
            pass

    class Secretive(nn.Module):
        def __getattr__(self, name):
            raise RuntimeError(f"{name} is nobody's business")

    class Uncallable(nn.Module):
        forward = 3

    class Callable(nn.Module):
        forward = functools.partial(sdpa)

    class Property(nn.Module):
        @property
        def forward(self):
            raise RuntimeError("not now")

    class Truthless(nn.Module):
        def __bool__(self):
            raise RuntimeError("neither")

        def __eq__(self, other):
            raise RuntimeError("nor")

        __hash__ = nn.Module.__hash__

    scripted = torch.jit.script(nn.Sequential(nn.Linear(8, 8), PackedMSA()))
    traced = torch.jit.trace(Operators(), torch.randn(1, 3, 8))
    odd = (NeverInitialised, Secretive, Uncallable, Callable, Property, Truthless)
    model = nn.Module()
    for i, make in enumerate(odd):
        model._modules[f"odd{i}"] = make()
    model._modules |= {"lazy": nn.LazyLinear(3), "none": None, "scripted": scripted, "traced": traced}
    model._modules |= {"compiled": torch.compile(Einsum()), "parallel": nn.DataParallel(Renamed())}
    found = [name for name, _, _ in find(model)]
    assert [name for name in found if not name.startswith(("odd", "scripted"))] == [
        "compiled._orig_mod",
        "parallel.module",
    ]


def test_code_that_calls_in_circles_ends():
    class Circle(nn.Module):
        def first(self, x):
            return self.second(x)

        def second(self, x):
            return self.first(x)

        def forward(self, x):
            return self.first(x)

    assert not mixes_tokens(Circle())


def test_finding_is_fast(monkeypatch):
    """A model of 1500 modules, the code of whose classes was never read."""
    model = on_meta("maxvit_base_tf_224")
    monkeypatch.setattr(attention, "_known", type(attention._known)())
    begin = time.process_time()
    assert len(find(model)) == 48
    assert time.process_time() - begin < 0.1
