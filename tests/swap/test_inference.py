"""swap(model, inference=True): packed weights, what follows their changes, and when they are not used."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from unittest import mock

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import mvkernels
from mvkernels.dispatch import extension
from mvkernels.swap import swap, verify_swap
from mvkernels.swap.engine import unswap
from mvkernels.swap.packing import plans
from tests.swap.conftest import randomise
from tests.swap.inference import average, logits, make, packings, picture

pytestmark = pytest.mark.skipif(extension.module is None, reason=extension.reason)
timm = pytest.importorskip("timm")


@pytest.mark.core
def test_whole_models_and_their_blocks_are_as_exact_as_the_original(model):
    report = swap(model, inference=True)
    assert report.folded and packings(model, picture(model)) > 5
    result = verify_swap(model, picture(model))
    assert result.ok, str(result)
    assert any(row.name.startswith("inference: output") for row in result.rows)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("side", [60, 96])
def test_other_sizes(small, side, batch):
    """A side of 60 is resized in the blocks; the algorithm of some convolutions depends on the size."""
    x = picture(small, side, batch)
    exact = logits(copy.deepcopy(small).double(), x.double())
    plain = logits(small, x)
    swap(small, inference=True)
    found = logits(small, x)
    assert (found - exact).abs().max() <= 4 * (plain - exact).abs().max() + 1e-6 * exact.abs().max()


def test_weights_are_packed_once_and_nothing_of_the_model_shows_it(model):
    names = list(model.state_dict())
    attributes = [sorted(module.__dict__) for module in model.modules()]
    report = swap(model, inference=True)
    x = picture(model)
    assert packings(model, x) and not packings(model, x)
    assert report.packed_bytes > 0 and "MiB of packed weights" in str(report)
    assert list(model.state_dict()) == names
    assert [sorted(module.__dict__) for module in model.modules()] == attributes


@pytest.mark.parametrize("name", ["mobilevit_xxs", "efficientvit_b0"])
def test_all_dense_convolutions_are_packed(name):
    model = make(name)
    swap(model, inference=True)

    class Convolutions(TorchDispatchMode):
        dense = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.convolution.default and args[8] == 1:
                self.dense += 1
            return func(*args, **(kwargs or {}))

    with Convolutions() as mode:
        logits(model, picture(model))
    assert mode.dense == 0


def test_another_instruction_set(small):
    swap(small, inference=True)
    x = picture(small)
    wanted = logits(small, x)
    sets = extension.module.instruction_sets()
    before = extension.module.set_instruction_set(sets[-1])
    try:
        torch.testing.assert_close(logits(small, x), wanted, rtol=1e-3, atol=1e-4)
    finally:
        extension.module.set_instruction_set(before)


def test_copies_and_pickles_pack_for_themselves(small):
    swap(small, inference=True)
    x = picture(small)
    wanted = logits(small, x)
    for other in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        assert plans.size(other) == 0
        assert torch.equal(logits(other, x), wanted) and plans.size(other) > 0
        with torch.no_grad():
            next(other.parameters()).mul_(2)
        assert not torch.equal(logits(other, x), wanted)
        assert torch.equal(logits(small, x), wanted)


def test_swapped_again_nothing_changes(model):
    """Also by another report, and after folding."""
    x = picture(model)
    swap(model, fold_norms=True)
    swap(model, inference=True)
    kinds = [type(module) for module in model.modules()]
    wanted = logits(model, x)
    assert swap(model, inference=True).folded == 0
    assert [type(module) for module in model.modules()] == kinds and torch.equal(logits(model, x), wanted)


def test_restored_or_deleted_the_packed_weights_are_freed_at_once(model):
    """And not when the garbage collector comes by."""
    x = picture(model)
    made = []

    def noting(weights, packed):
        made.append(weakref.ref(packed))
        weights.append(packed)
        return packed

    with mock.patch.object(plans, "note", noting):
        report = swap(model, inference=True)
        gc.disable()
        try:
            logits(model, x)
            assert made and all(w() is not None for w in made)
            average(model)
            count = len(made)
            logits(model, x)
            assert len(made) == 2 * count and not [w for w in made[:count] if w() is not None]
            report.restore()
            assert not [w for w in made if w() is not None]
        finally:
            gc.enable()


@pytest.mark.parametrize("name", ["efficientvit_b0", "mvmodels:efficientvit_b0"])
def test_a_hook_on_an_identity_is_called(name):
    if name.startswith("mvmodels"):
        import mvmodels

        model = randomise(mvmodels.create_model("efficientvit_b0", num_classes=10)).eval()
    else:
        model = make(name)
    swap(model, inference=True)
    x = picture(model)
    logits(model, x)
    norms = [m for n, m in model.named_modules() if n.endswith(".norm") and isinstance(m, nn.Identity)]
    assert norms
    seen = []
    for norm in norms:
        norm.register_forward_hook(lambda m, given, out: seen.append(m))
    logits(model, x)
    assert len({*seen}) == len(norms)


def test_what_does_not_fit_is_said_as_the_original_says_it(model):
    swap(model, inference=True)
    x = picture(model)
    logits(model, x)
    with pytest.raises((RuntimeError, ValueError, AssertionError)) as swapped:
        logits(model, x.repeat(1, 2, 1, 1))
    unswap(model)
    with pytest.raises((RuntimeError, ValueError, AssertionError)) as original:
        logits(model, x.repeat(1, 2, 1, 1))
    assert str(swapped.value) == str(original.value)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_restored_it_is_what_it_was_and_holds_nothing(small, order):
    """Also where another call has swapped before."""
    kinds = [type(module) for module in small.modules()]
    x = picture(small)
    plain = logits(small, x)
    reports = [swap(small), swap(small, inference=True)]
    fused = [type(module) for module in small.modules()]
    assert swap(small, inference=True).folded == 0 and [type(module) for module in small.modules()] == fused
    assert packings(small, x) > 5
    for i in order:
        reports[i].restore()
    assert [type(module) for module in small.modules()] == kinds
    assert plans.size(small) == 0 and torch.equal(logits(small, x), plain)


def test_a_gradient_training_autocast_and_other_dtypes_take_the_originals(small):
    x = picture(small)
    plain = copy.deepcopy(small)
    swap(plain, fold_norms=True)
    swap(small, inference=True)

    def nothing_packed(call):
        with mock.patch.object(plans, "Plan", side_effect=AssertionError):
            found = call(small)
        wanted = call(plain)
        assert torch.equal(found, wanted) and found.dtype == wanted.dtype

    nothing_packed(lambda m: m(x))

    def autocast(m):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            return m(x)

    nothing_packed(autocast)
    nothing_packed(lambda m: logits(m.double(), x.double()))
    nothing_packed(lambda m: logits(m.bfloat16(), x.bfloat16()))
    small.float(), plain.float()
    with mvkernels.use_backend("reference"):
        nothing_packed(lambda m: logits(m, x))


def test_hooks_are_called_and_see_the_originals_maps(small):
    swap(small, inference=True)
    x = picture(small)
    before = logits(small, x)
    seen = []
    parts = [small.stages[0][0].conv2_kxk, small.stages[0][0].conv1_1x1.conv, small.stages[2][1].transformer[0].mlp]
    handles = [part.register_forward_hook(lambda m, given, out: seen.append(out.shape)) for part in parts]
    torch.testing.assert_close(logits(small, x), before, rtol=1e-3, atol=1e-4)
    assert len(seen) == len(parts)
    for handle in handles:
        handle.remove()
    assert torch.equal(logits(small, x), before)


def test_the_export_is_the_plain_graph(small):
    swap(small, inference=True)
    x = picture(small)
    with torch.no_grad():
        exported = torch.export.export(small, (x,))
    assert not [n for n in exported.graph.nodes if "mvkernels" in str(n.target)]
    torch.testing.assert_close(exported.module()(x), logits(small, x), rtol=1e-3, atol=1e-4)


def test_the_same_bits_on_threads_and_in_a_batch(small):
    swap(small, inference=True)
    x = picture(small, batch=3)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(logits(small, x))
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)
