"""Blocks recognised by what they hold, and Sana's attention, on packed weights: swap(model, inference=True)."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from mvkernels.dispatch import extension
from mvkernels.swap import swap, verify_swap
from mvkernels.swap.packing import plans
from tests import cpubone_layout, cvnets_layout
from tests import efficientvit_layout as mit
from tests.swap import linear_attention
from tests.swap.conftest import randomise
from tests.swap.inference import packings
from tests.swap.test_packing_mobile import (
    call,
    check_copies_and_restore,
    close,
    convolutions,
    epsilon,
    exact,
    statistics,
    weights,
)

pytestmark = pytest.mark.skipif(extension.module is None, reason=extension.reason)


class Conv2d(nn.Conv2d):
    """The classes of ml-cvnets derive from torch's and have their forwards."""


class BatchNorm2d(nn.BatchNorm2d):
    """Another one."""


class Swish(nn.SiLU):
    """Another one."""


def cvnets(**settings) -> nn.Module:
    block = randomise(cvnets_layout.MobileViTBlock(**settings))
    for part in block.modules():
        for kind in (Conv2d, BatchNorm2d, Swish):
            if type(part) is kind.__mro__[1]:
                part.__class__ = kind
    return block


class OtherNorm(cvnets_layout.LayerNorm):
    """Which adds eps to the deviation on rows too."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        deviation, mean = torch.std_mean(x, dim=-1, keepdim=True, unbiased=False)
        return (x - mean) / (deviation + 10 * self.eps) * self.weight + self.bias


def other_norm() -> nn.Module:
    block = randomise(cvnets_layout.MobileViTBlock())
    for part in block.modules():
        if isinstance(part, cvnets_layout.LayerNorm):
            part.__class__ = OtherNorm
    return block


class OtherLayer(mit.ConvLayer):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2


def other_layer() -> nn.Module:
    block = randomise(mit.LiteMLA(16, 16))
    block.qkv.__class__ = OtherLayer
    return block


# A module, its input, and how many weights its calls pack.
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "cvnets": (cvnets, (2, 12, 8, 6), 12),
    "cvnets, resized": (lambda: cvnets(heads=1, patch=(3, 2)), (1, 12, 7, 9), 13),
    "cvnets, no fusion": (lambda: cvnets(no_fusion=True, layers=1), (2, 12, 8, 8), 7),
    "cvnets, another norm": (other_norm, (2, 12, 8, 6), 0),
    "mit": (lambda: randomise(mit.LiteMLA(16, 16)), (2, 16, 7, 9), 2),
    "mit, another layer": (other_layer, (2, 16, 7, 9), 2),  # its convolutions, called by the layers
    "cpubone": (lambda: randomise(cpubone_layout.ConvAttention()), (2, 16, 8, 6), 2),
    "sana": (lambda: randomise(linear_attention.sana_attention()), (2, 30, 16), 4),
}


def make(case: str) -> tuple[nn.Module, tuple[torch.Tensor]]:
    torch.manual_seed(0)
    build, shape, _ = CASES[case]
    x = torch.randn(*shape)
    return build(), (x.to(memory_format=torch.channels_last) if len(shape) == 4 else x,)


@pytest.mark.core
@pytest.mark.parametrize("case", CASES)
def test_results_are_as_exact_as_the_originals(case):
    module, given = make(case)
    wanted, plain = exact(module, given), call(module, given)
    names, attributes = list(module.state_dict()), [sorted(m.__dict__) for m in module.modules()]
    assert swap(module, inference=True).count == 1
    assert packings(module, given[0]) == CASES[case][2] and not packings(module, given[0])
    for x in (given[0], given[0].contiguous()):
        found = call(module, (x,))
        assert found.shape == plain.shape
        # Divided by sums of products, which may be small.
        allowed = 1e-4 if case.startswith(("mit", "sana")) else 1e-6
        assert (found - wanted).abs().max() <= 4 * (plain - wanted).abs().max() + allowed * wanted.abs().max()
        if case.startswith(("cvnets", "mit")) and CASES[case][2]:
            assert found.is_contiguous() == x.is_contiguous()
    assert list(module.state_dict()) == names and [sorted(m.__dict__) for m in module.modules()] == attributes


@pytest.mark.parametrize("case", [case for case, (*_, count) in CASES.items() if count])
def test_changes_are_followed(case):
    module, given = make(case)
    original = copy.deepcopy(module)
    swap(module, inference=True)
    before = call(module, given)
    for change in (weights, statistics, epsilon):
        for each in (module, original):
            change(each)
        found, wanted = call(module, given), exact(original, given)
        torch.testing.assert_close(found.double(), wanted.double(), rtol=1e-3, atol=1e-5 * float(wanted.abs().max()))
    assert not torch.equal(found, before) and plans.size(module)


@pytest.mark.parametrize("case", ["cvnets", "cvnets, resized"])
def test_hooks_of_parts_are_called_as_in_a_swapped_module(case):
    module, given = make(case)
    plain = copy.deepcopy(module)
    swap(module, inference=True)
    swap(plain)
    packed = call(module, given)
    assert convolutions(module, given) == 0
    for (name, part), (_, other) in zip(module.named_modules(), plain.named_modules()):
        seen: list[bool] = []
        for each, packs in ((part, True), (other, False)):
            each.register_forward_hook(lambda m, given, out, seen=seen, packs=packs: seen.append(packs))
        close(call(module, given), call(plain, given))
        assert seen.count(True) == seen.count(False), name
        for each in (part, other):
            each._forward_hooks.clear()
    assert torch.equal(call(module, given), packed)


def test_where_the_axis_of_cvnets_norm_is_ambiguous_the_original_runs(falls_back):
    module, given = make("cvnets")
    swap(module, inference=True)
    call(module, given)
    x = torch.randn(1, 12, 8, 12)  # 24 patches and 24 features
    wanted = exact(module, (x,))
    close(call(module, (x,)), wanted)
    assert any("as many patches as features" in said for said in falls_back())


@pytest.mark.parametrize("case", CASES)
def test_gradients_training_and_other_dtypes_take_the_original(case):
    module, given = make(case)
    plain = copy.deepcopy(module)
    swap(module, inference=True)
    swap(plain)
    found, wanted = (torch.autograd.grad(m(*given).square().sum(), next(m.parameters()))[0] for m in (module, plain))
    close(found, wanted)
    for each in (module, plain):
        each.train()
    close(call(module, given), call(plain, given))
    double = (given[0].double(),)
    close(call(module.double().eval(), double), call(plain.double().eval(), double))
    assert not packings(module, double[0])


@pytest.mark.parametrize("case", [case for case, (*_, count) in CASES.items() if count])
def test_copies_pickles_and_restored_modules(case):
    check_copies_and_restore(*make(case), call)


@pytest.mark.parametrize("case", ["cvnets", "mit"])
def test_exports_and_compiled_calls(case):
    module, given = make(case)
    wanted = call(module, given)
    swap(module, inference=True)
    with torch.no_grad():
        exported = torch.export.export(module, given)
    assert not [n for n in exported.graph.nodes if "mvkernels" in str(n.target)]
    torch.testing.assert_close(call(exported.module(), given), wanted, rtol=1e-3, atol=1e-4)
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(call(compiled, given), wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("build", [mit.Net, cvnets_layout.Network, linear_attention.sana_model])
def test_whole_models(build):
    torch.manual_seed(0)
    model = randomise(build())
    inputs = linear_attention.latents() if build is linear_attention.sana_model else torch.randn(2, 3, 24, 20)
    report = swap(model, inference=True)
    with torch.no_grad():
        linear_attention.run(model, inputs)
    assert report.packed_bytes > 0
    result = verify_swap(model, inputs)
    assert result.ok, str(result)
    report.restore()
    assert not plans.size(model)
