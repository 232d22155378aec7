"""Swin of torchvision and Swin V2 of timm on packed weights: swap(model, inference=True)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from mvkernels.dispatch import extension
from mvkernels.swap import swap, verify_swap
from mvkernels.swap.packing import plans
from tests.swap.conftest import randomise
from tests.swap.inference import packings
from tests.swap.test_packing_mobile import call, check_copies_and_restore, close, exact, weights
from tests.swap.timm_windows import swin_v2
from tests.swap.torchvision_windows import attention

pytestmark = pytest.mark.skipif(extension.module is None, reason=extension.reason)


def block(kind: str) -> nn.Module:
    from torchvision.models import swin_transformer

    return randomise(getattr(swin_transformer, kind)(12, 3, [4, 4], [2, 2], dropout=0.1, stochastic_depth_prob=0.1))


def model(kind: str) -> nn.Module:
    from torchvision.models import swin_transformer

    parts = {"": (None, None), "V2": (swin_transformer.SwinTransformerBlockV2, swin_transformer.PatchMergingV2)}[kind]
    sizes: dict[str, Any] = {"embed_dim": 12, "depths": [2, 2], "num_heads": [2, 3], "window_size": [4, 4]}
    merging = {} if parts[1] is None else {"downsample_layer": parts[1]}
    return randomise(swin_transformer.SwinTransformer([4, 4], **sizes, num_classes=5, block=parts[0], **merging))


def timm_model() -> nn.Module:
    from timm.models.swin_transformer_v2 import SwinTransformerV2

    sizes: dict[str, Any] = {"img_size": 32, "embed_dim": 12, "depths": (2, 2), "num_heads": (2, 3), "window_size": 4}
    return randomise(SwinTransformerV2(**sizes, num_classes=5))


V2 = "ShiftedWindowAttentionV2"
# A module, and how many weights and biases of positions its calls pack.
CASES: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "timm v2": (swin_v2, 5),
    "timm v2, no bias": (lambda: swin_v2(qkv_bias=False, shift_size=0), 5),
    "attention": (attention, 3),
    "attention, no bias": (lambda: attention(qkv_bias=False, proj_bias=False), 3),
    "attention v2": (lambda: attention(V2), 3),
    "attention v2, no bias": (lambda: attention(V2, qkv_bias=False), 3),
    "block": (lambda: block("SwinTransformerBlock"), 5),
    "block v2": (lambda: block("SwinTransformerBlockV2"), 5),
}


def make(case: str, *sides: int) -> tuple[nn.Module, tuple[torch.Tensor]]:
    torch.manual_seed(0)
    return CASES[case][0](), (torch.randn(2, *(sides or (8, 12)), 12),)


@pytest.mark.core
@pytest.mark.parametrize("case", CASES)
def test_results_are_as_exact_as_the_originals(case):
    for sides in ((8, 12), (7, 10), (3, 4))[: 1 if case == "timm v2" else 3]:  # its mask is for one size
        module, given = make(case, *sides)
        wanted, plain = exact(module, given), call(module, given)
        names, attributes = list(module.state_dict()), [sorted(m.__dict__) for m in module.modules()]
        swap(module, inference=True)
        found = call(module, given)
        assert found.shape == plain.shape
        assert (found - wanted).abs().max() <= 4 * (plain - wanted).abs().max() + 1e-6 * wanted.abs().max()
        assert list(module.state_dict()) == names and [sorted(m.__dict__) for m in module.modules()] == attributes
    module, given = make(case)
    swap(module, inference=True)
    assert packings(module, given[0]) == CASES[case][1] and not packings(module, given[0])


def biases(module):
    """Of the positions and of the products alone."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if any(part in name for part in ("table", "cpb_mlp", "bias", "logit_scale")):
                parameter.mul_(1.2).add_(0.01)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("change", [weights, biases])
def test_changes_are_followed(case, change):
    module, given = make(case)
    original = copy.deepcopy(module)
    swap(module, inference=True)
    before = call(module, given)
    for each in (module, original):
        change(each)
    found = call(module, given)
    close(found, exact(original, given))
    assert not torch.equal(found, before) and not packings(module, given[0])


def test_lists_that_are_changed_in_place_are_followed():
    module, given = make("attention")
    original = copy.deepcopy(module)
    swap(module, inference=True)
    call(module, given)
    for each in (module, original):
        each.shift_size[0] = 0
        each.shift_size[1] = 1
    close(call(module, given), exact(original, given))
    assert not packings(module, given[0])
    for each in (module, original):
        each.window_size[:] = [2, 8]  # for which the biases do not lie so
        each.shift_size[:] = [0, 0]
    close(call(module, given), call(original, given))


def test_another_input_size_is_followed(falls_back):
    """With a mask for maps of another size the original runs, until the size is set."""
    module, given = make("timm v2")
    original = copy.deepcopy(module)
    swap(module, inference=True)
    call(module, given)
    other = (torch.randn(2, 12, 8, 12),)
    close(call(module, other), call(original, other))
    assert any("its mask is for maps of (8, 12)" in said for said in falls_back())
    for each in (module, original):
        each.set_input_size((12, 8), (4, 4))
    assert packings(module, other[0])
    close(call(module, other), exact(original, other))


@pytest.mark.parametrize("case", CASES)
def test_hooks_of_parts_are_called_as_in_a_swapped_module(case):
    module, given = make(case)
    plain = copy.deepcopy(module)
    swap(module, inference=True)
    swap(plain)
    packed = call(module, given)
    for (name, part), (_, other) in zip(module.named_modules(), plain.named_modules()):
        if not name or type(part).__name__ in ("Dropout", "StochasticDepth", "Identity"):
            continue
        seen: list[bool] = []
        for each, packs in ((part, True), (other, False)):
            each.register_forward_hook(lambda m, given, out, seen=seen, packs=packs: seen.append(packs))
        close(call(module, given), call(plain, given))
        assert seen.count(True) == seen.count(False), name
        for each in (part, other):
            each._forward_hooks.clear()
    assert torch.equal(call(module, given), packed)


@pytest.mark.parametrize("case", CASES)
def test_gradients_training_autocast_and_other_dtypes_take_the_original(case):
    module, given = make(case)
    plain = copy.deepcopy(module)
    swap(module, inference=True)
    swap(plain)

    def same(of: Callable[[Any], torch.Tensor]) -> None:
        results = []
        for each in (module, plain):
            torch.manual_seed(1)
            results.append(of(each))
        close(*results)

    def trained(m):
        m.train()
        out = call(m, given)
        m.eval()
        return out

    same(lambda m: torch.autograd.grad(m(*given).square().sum(), next(m.parameters()))[0])
    same(trained)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(call(module, given), call(plain, given), rtol=0.1, atol=0.1)
    same(lambda m: call(m.double(), (given[0].double(),)))
    assert not packings(module, given[0].double())


@pytest.mark.parametrize("case", CASES)
def test_copies_pickles_and_restored_modules(case):
    check_copies_and_restore(*make(case), call)


@pytest.mark.parametrize("case", ["timm v2", "attention", "block v2"])
def test_exports_and_compiled_calls(case):
    module, given = make(case)
    wanted = call(module, given)
    swap(module, inference=True)
    with torch.no_grad():
        exported = torch.export.export(module, given)
    assert not [n for n in exported.graph.nodes if "mvkernels" in str(n.target)]
    close(call(exported.module(), given), wanted)
    torch._dynamo.reset()
    close(call(torch.compile(module, backend="aot_eager", fullgraph=True), given), wanted)


@pytest.mark.parametrize("make", [lambda: model(""), lambda: model("V2"), timm_model], ids=["tv", "tv v2", "timm v2"])
def test_whole_models(make):
    torch.manual_seed(0)
    whole, x = make(), torch.randn(2, 3, 32, 32)
    report = swap(whole, inference=True)
    assert packings(whole, x) > 20 and not packings(whole, x)
    result = verify_swap(whole, x)
    assert result.ok, str(result)
    report.restore()
    assert not plans.size(whole)
