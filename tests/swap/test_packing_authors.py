"""Mobile-Former's blocks in a model laid out as its authors' code, on packed weights: swap(model, inference=True)."""

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
from tests import mobile_former_layout as layout
from tests.swap.conftest import randomise
from tests.swap.inference import packings
from tests.swap.test_packing_mobile import check_copies_and_restore, close, convolutions, epsilon, statistics, weights

pytestmark = pytest.mark.skipif(extension.module is None, reason=extension.reason)
Given = tuple[torch.Tensor, torch.Tensor]


class OtherActivation(layout.DyReLU):
    def forward(self, x):
        return super().forward(x) + 1e-3


class Another(layout.DnaBlock):
    def add_bridge(self, *args, **settings):
        super().add_bridge(*args, **settings)
        self.act = OtherActivation()


class Twice(layout.ConvBlock):
    def forward(self, x):
        return super().forward(x)[0] * 2, x[1]


CASES: dict[str, Callable[[], nn.Module]] = {
    "block": lambda: layout.DnaBlock(12, 12, 3, 16, 3, drop_path=0.1),
    "block widens": lambda: layout.DnaBlock(12, 20, 2, 16, 3, hyper_token_id=1, dynamic=False),
    "block halves": lambda: layout.DnaBlock3(12, 20, 16, 3, drop_path=0.1),
    "first": lambda: layout.ConvBlock(12, 12, 2, 1, 1),
    "first halves": lambda: layout.ConvBlock(12, 8, 3, 2, 1),
}


def make(case: str, batch: int = 2) -> tuple[nn.Module, Given]:
    torch.manual_seed(0)
    return randomise(CASES[case]()), (torch.randn(batch, 12, 7, 9), torch.randn(3, batch, 16))


def call(module: nn.Module, given: Given) -> torch.Tensor:
    """The map, and the tokens behind it."""
    with torch.no_grad():
        x, tokens = module(given)
    return torch.cat([x.flatten(), tokens.flatten()])


def exact(module: nn.Module, given: Given) -> torch.Tensor:
    """In float64, in which no weights are packed."""
    return call(copy.deepcopy(module).double(), (given[0].double(), given[1].double()))


@pytest.mark.core
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("batch", [1, 3])
def test_results_are_as_exact_as_the_originals(case, batch):
    module, given = make(case, batch)
    wanted, plain = exact(module, given), call(module, given)
    names, attributes = list(module.state_dict()), [sorted(m.__dict__) for m in module.modules()]
    assert swap(module, inference=True).folded
    for form in (torch.contiguous_format, torch.channels_last):
        changed = (given[0].contiguous(memory_format=form), given[1])
        found = call(module, changed)
        assert (found - wanted).abs().max() <= 4 * (plain - wanted).abs().max() + 1e-6 * wanted.abs().max()
        with torch.no_grad():
            assert module(changed)[0].is_contiguous(memory_format=form)
    assert convolutions(module, (given,)) == 0 and plans.size(module) > 0
    assert list(module.state_dict()) == names and [sorted(m.__dict__) for m in module.modules()] == attributes


@pytest.mark.parametrize("case", CASES)
def test_changes_are_followed(case):
    module, given = make(case)
    original = copy.deepcopy(module)
    swap(module, inference=True)
    before = call(module, given)
    for change in (weights, statistics, epsilon):
        for each in (module, original):
            change(each)
        found = call(module, given)
        close(found, exact(original, given))
        assert not torch.equal(found, before)
    assert plans.size(module)


def per_pixel(block):
    block.hyper_token_id = block.hyper1.sel_token_id = -1
    (block.hyper2 if hasattr(block, "hyper2") else block.hyper3).sel_token_id = -1


def another_token(block):
    block.hyper1.sel_token_id = 2


def not_added(block):
    block.identity = not getattr(block, "identity", True)


def another_activation(block):
    block.act = OtherActivation()


@pytest.mark.parametrize("case", ["block", "block halves"])
@pytest.mark.parametrize("change", [per_pixel, another_token, not_added, another_activation])
def test_changed_settings_are_followed(case, change):
    module, given = make(case)
    original = copy.deepcopy(module)
    swap(module, inference=True)
    call(module, given)
    for each in (module, original):
        change(each)
    close(call(module, given), exact(original, given))


@pytest.mark.parametrize("case", CASES)
def test_hooks_and_replaced_forwards_of_parts_are_called(case):
    module, given = make(case)
    wanted = call(module, given)
    swap(module, inference=True)
    packed = call(module, given)
    for name, part in module.named_modules():
        if not name or type(part).__name__ in ("DropPath", "ModuleList"):
            continue
        seen = []
        with part.register_forward_hook(lambda m, given, out, seen=seen: seen.append(out)):
            close(call(module, given), wanted)
        assert seen, name
        part.forward = lambda *a, part=part, seen=seen: (seen.append(part), type(part).forward(part, *a))[1]
        close(call(module, given), wanted)
        assert seen[-1] is part, name
        del part.forward
    assert torch.equal(call(module, given), packed)


@pytest.mark.parametrize("case", CASES)
def test_gradients_training_autocast_and_other_dtypes_take_the_original(case):
    module, given = make(case)
    original = copy.deepcopy(module)
    swap(original)
    swap(module, inference=True)

    def same(of: Callable[[Any], torch.Tensor]) -> None:
        torch.manual_seed(1)
        found = of(module)
        torch.manual_seed(1)
        close(found, of(original))

    def gradient(m):
        m.zero_grad()
        sum(t.square().sum() for t in m(given)).backward()
        return torch.cat([p.grad.flatten() for p in m.parameters() if p.grad is not None])

    def trained(m):
        m.train()
        out = call(m, given)
        m.eval()
        return out

    same(gradient)
    same(trained)  # which changes running statistics
    same(lambda m: call(m, given))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(call(module, given), call(original, given), rtol=0.1, atol=0.1)
    same(lambda m: call(m.double(), (given[0].double(), given[1].double())))


@pytest.mark.parametrize("case", CASES)
def test_copies_pickles_and_restored_modules(case):
    check_copies_and_restore(*make(case), call)


@pytest.mark.parametrize("case", ["block", "block halves", "first"])
def test_exports_and_compiled_calls(case):
    module, given = make(case)
    wanted = call(module, given)
    swap(module, inference=True)
    with torch.no_grad():
        exported = torch.export.export(module, (given,))
    assert not [n for n in exported.graph.nodes if "mvkernels" in str(n.target)]
    close(call(exported.module(), given), wanted)
    torch._dynamo.reset()
    close(call(torch.compile(module, backend="aot_eager", fullgraph=True), given), wanted)


@pytest.mark.parametrize(
    "block",
    [
        layout.DnaBlock(12, 12, 3, 16, 3, group_num=2),
        layout.DnaBlock(12, 12, 3, 16, 3, hyper_token_id=-1),
        layout.ConvBlock(12, 12, 3, 1, 4),
        Another(12, 12, 3, 16, 3),
        Twice(12, 12, 3, 1, 1),
    ],
    ids=["groups", "slopes of pixels", "groups at first", "another activation", "another formula"],
)
def test_blocks_that_compute_something_else_stay(block):
    kind = type(block)
    swap(randomise(block), inference=True)
    assert type(block) is kind


def test_calls_of_another_kind_take_the_original():
    module, (x, tokens) = make("block")
    wanted = call(module, (x, tokens))
    swap(module, inference=True)
    with torch.no_grad():
        out, _ = module([x, tokens])
    torch.testing.assert_close(out.flatten(), wanted[: out.numel()], rtol=1e-4, atol=1e-4)
    for given in ((x[:, 1:], tokens), (x, tokens[..., 1:])):
        with pytest.raises(RuntimeError):
            call(module, given)


def test_a_whole_model():
    torch.manual_seed(0)
    model = randomise(layout.MobileFormer("52m", num_classes=5))
    report = swap(model, inference=True)
    x = torch.randn(1, 3, 64, 64)
    assert packings(model, x) > 40 and not packings(model, x)
    result = verify_swap(model, x)
    assert result.ok, str(result)
    kinds = {type(m).__name__ for m, _ in report._folded}
    assert {"ConvBlock", "DnaBlock", "DnaBlock3"} <= kinds
    report.restore()
    assert not plans.size(model)
