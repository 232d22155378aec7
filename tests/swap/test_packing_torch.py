"""swap(model, inference=True): PyTorch's own Linears and convolutions, whoever calls them."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from mvkernels.dispatch import extension
from mvkernels.swap import swap
from mvkernels.swap.packing import plans
from tests.swap.conftest import randomise
from tests.swap.every_family import EVERY, tensor
from tests.swap.inference import packings

pytestmark = pytest.mark.skipif(extension.module is None, reason=extension.reason)


class Calls(nn.Module):
    """Calls a module that is not the model itself, and keeps a second name of it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = self.again = module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.module(x)


def called(module: nn.Module) -> Calls:
    return randomise(Calls(module)).eval()


def run(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(x)


def as_exact(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The call packs, and its result is as near to float64 as the original's, of the same strides."""
    plain = run(model, x)
    exact = run(copy.deepcopy(model).double(), x.double())
    swap(model, inference=True)
    assert packings(model, x) == 1 and not packings(model, x)
    found = run(model, x)
    assert found.shape == plain.shape and found.stride() == plain.stride()
    assert (found - exact).abs().max() <= 2 * (plain - exact).abs().max() + 1e-6 * exact.abs().max()
    return found


def tokens(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


INPUTS: dict[str, Callable[[], torch.Tensor]] = {
    "one": lambda: tokens(1, 13),
    "rows": lambda: tokens(37, 13),
    "tokens": lambda: tokens(3, 17, 13),
    "map": lambda: tokens(2, 5, 3, 13),
    "windows": lambda: tokens(2, 3, 4, 5, 13),
    "channels first": lambda: tokens(2, 13, 19).transpose(1, 2),
    "every other": lambda: tokens(2, 18, 13)[:, ::2],
    "slice": lambda: tokens(2, 9, 29)[..., 3:16],
    "expanded": lambda: tokens(1, 9, 13).expand(3, 9, 13),
    "windows of a map": lambda: tokens(2, 6, 8, 13).unflatten(1, (2, 3)).unflatten(3, (2, 4)).transpose(2, 3),
}


@pytest.mark.core
@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_of_any_tokens(name, bias):
    as_exact(called(nn.Linear(13, 21, bias=bias)), INPUTS[name]())


@pytest.mark.parametrize("shape", [(13,), (0, 13), (2, 0, 13), (4, 12), (2, 3, 1)])
def test_what_is_left_to_pytorch(shape):
    """A vector, nothing, and what does not fit, with PyTorch's words for it."""
    model = called(nn.Linear(13, 21))
    x = tokens(*shape)
    plain = copy.deepcopy(model)
    swap(model, inference=True)
    try:
        wanted = run(plain, x)
    except RuntimeError as error:
        with pytest.raises(RuntimeError) as found:
            run(model, x)
        assert str(found.value) == str(error)
    else:
        assert torch.equal(run(model, x), wanted)


@pytest.mark.parametrize("kernel, stride", [(1, 1), (3, 1), (3, 2)])
@pytest.mark.parametrize("size", [(2, 9, 7), (1, 5, 11), (1, 1, 1)])
def test_a_convolution_of_a_channels_last_map(kernel, stride, size):
    batch, *sides = size
    x = tokens(batch, 6, *sides).to(memory_format=torch.channels_last)
    model = called(nn.Conv2d(6, 10, kernel, stride, kernel // 2, bias=stride == 1))
    if x.is_contiguous():
        swap(model, inference=True)
        assert not packings(model, x)
    else:
        as_exact(model, x)


def test_a_convolution_of_another_layout_or_kind_is_pytorchs():
    x = tokens(2, 6, 9, 7)
    last = x.to(memory_format=torch.channels_last)
    model = called(nn.Conv2d(6, 10, 3, padding=1))
    wanted, unbatched = run(model, x), run(model, x[0])
    swap(model, inference=True)
    assert torch.equal(run(model, x), wanted) and torch.equal(run(model, x[0]), unbatched)
    assert not plans.size(model)
    run(model, last)
    assert plans.size(model)
    with pytest.raises(RuntimeError, match="expected input"):
        run(model, last[:, :5])
    for other in (nn.Conv2d(6, 10, 3), nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.Conv2d(6, 10, 2, 2)):
        model = called(other)
        assert swap(model, inference=True).folded == 0


@pytest.fixture
def linear():
    return called(nn.Linear(13, 21))


X = tokens(4, 13)


def test_nothing_of_the_module_shows_it(linear):
    attributes, names = sorted(linear.module.__dict__), list(linear.state_dict())
    report = swap(linear, inference=True)
    run(linear, X)
    assert report.folded == 1 and report.packed_bytes > 0 and "packed" in str(report)
    assert type(linear.module).__name__ == "Linear" and isinstance(linear.module, nn.Linear)
    assert sorted(linear.module.__dict__) == attributes and list(linear.state_dict()) == names
    report.restore()
    assert type(linear.module) is nn.Linear and plans.size(linear) == 0


def test_it_follows_a_change_of_its_weights(linear):
    swap(linear, inference=True)
    before = run(linear, X)
    with torch.no_grad():
        linear.module.weight.mul_(2)
        linear.module.bias.mul_(2)
    torch.testing.assert_close(run(linear, X), 2 * before)


@pytest.mark.parametrize(
    "make", [lambda: nn.Linear(4, 8), lambda: nn.Conv2d(4, 8, 1), lambda: nn.Conv2d(4, 8, 3, 1, 1)]
)
def test_a_plan_does_not_keep_its_module(make):
    model = called(make())
    swap(model, inference=True)
    assert packings(model, tokens(2, 4, 4, 4).to(memory_format=torch.channels_last)) == 1
    gone = weakref.ref(model.module)
    del model
    gc.collect()
    assert gone() is None


def test_copies_and_pickles(linear):
    swap(linear, inference=True)
    wanted = run(linear, X)
    for other in (copy.deepcopy(linear), pickle.loads(pickle.dumps(linear))):
        assert plans.size(other) == 0 and packings(other, X) == 1
        assert torch.equal(run(other, X), wanted) and other.again is other.module


def test_hooks_parametrizations_and_replaced_forwards(linear):
    swap(linear, inference=True)
    wanted = run(linear, X)
    handle = linear.module.register_forward_hook(lambda m, given, out: out + 1)
    torch.testing.assert_close(run(linear, X), wanted + 1)
    handle.remove()
    assert torch.equal(run(linear, X), wanted)

    class Half(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return weight / 2

    with torch.no_grad():
        linear.module.bias.zero_()
    wanted = run(linear, X)
    parametrize.register_parametrization(linear.module, "weight", Half())
    torch.testing.assert_close(run(linear, X), wanted / 2)
    with torch.no_grad():
        linear.module.parametrizations.weight.original.mul_(4)
    torch.testing.assert_close(run(linear, X), wanted * 2)
    linear.module.forward = lambda x: x
    assert run(linear, X) is X


def test_gradients_other_dtypes_and_autocast_are_pytorchs(linear):
    plain = copy.deepcopy(linear)
    swap(linear, inference=True)
    linear(X).sum().backward()
    plain(X).sum().backward()
    assert torch.equal(linear.module.weight.grad, plain.module.weight.grad)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(run(linear, X), run(plain, X))
    assert torch.equal(run(linear.double(), X.double()), run(plain.double(), X.double()))
    assert plans.size(linear) == 0


def test_parameters_whose_changes_cannot_be_seen_are_not_packed():
    with torch.inference_mode():
        model = called(nn.Linear(13, 21))
        swap(model, inference=True)
        assert not packings(model, X)


def test_compiled_exported_traced_and_scripted_it_is_the_original(linear):
    wanted = run(linear, X)
    swap(linear, inference=True)
    with torch.no_grad():
        compiled = torch.compile(linear, backend="aot_eager", fullgraph=True)(X)
        exported = torch.export.export(linear, (X,))
        traced, scripted = torch.jit.trace(linear, (X,)), torch.jit.script(linear)
        assert not [n for n in exported.graph.nodes if "mvkernels" in str(n.target)]
        for found in (compiled, exported.module()(X), traced(X), scripted(X)):
            assert torch.equal(found, wanted)


@pytest.mark.parametrize("name", EVERY)
def test_fused_blocks_go_on_as_before(name, falls_back):
    """The same blocks are swapped, their calls are fused, and no part's form makes one run its original forward."""
    example = EVERY[name]
    model = nn.ModuleList([example.make()])
    model.eval()
    inputs = example.inputs()
    other = copy.deepcopy(model)
    assert swap(model).count == swap(other, inference=True).count == 1
    given = inputs if isinstance(inputs, tuple) and not name.startswith("authors_mobile") else (inputs,)
    with torch.no_grad():
        wanted, found = (torch.as_tensor(tensor(m[0](*given))) for m in (model, other))
    assert falls_back() == []
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=2e-5 * max(1.0, float(wanted.abs().max())))
