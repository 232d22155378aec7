"""swap(model, inference=True): transformers' PoolFormer."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from mvkernels.dispatch import extension
from mvkernels.swap import swap, verify_swap
from mvkernels.swap.packing import plans
from tests.swap.conftest import randomise
from tests.swap.inference import assert_every_parameter_is_followed, packings
from tests.swap.inference import logits as run
from tests.swap.test_packing_torch import tokens

pytestmark = pytest.mark.skipif(extension.module is None, reason=extension.reason)
transformers = pytest.importorskip("transformers")

from transformers.models.poolformer import modeling_poolformer as poolformer  # noqa: E402

MAP, ODD = (2, 12, 8, 6), (1, 12, 7, 9)


def layer(drop_path: float = 0.1, pool_size: int = 3, **settings: Any) -> nn.Module:
    config = transformers.PoolFormerConfig(**settings)
    return poolformer.PoolFormerLayer(config, 12, pool_size, 12, 20, drop_path)  # type: ignore[no-any-return]


def model(**settings: Any) -> nn.Module:
    sizes = {"depths": [1, 2, 1, 1], "hidden_sizes": [8, 12, 16, 24], "num_labels": 5, "drop_path_rate": 0.1}
    made: nn.Module = transformers.PoolFormerForImageClassification(transformers.PoolFormerConfig(**sizes, **settings))
    return randomise(made)


# A layer, and how many weights its calls pack: both products, and the layer's scale times the norm's weight.
LAYERS: dict[str, tuple[dict[str, Any], int]] = {
    "as published": ({}, 3),
    "without drop path": ({"drop_path": 0.0}, 3),
    "without scales": ({"use_layer_scale": False}, 2),
    "relu": ({"hidden_act": "relu"}, 3),
    "wider windows": ({"pool_size": 5}, 2),  # which are pooled by the module
    "another activation": ({"hidden_act": "mish"}, 0),  # its convolutions, on channels-last maps
}


@pytest.mark.core
@pytest.mark.parametrize("shape", [MAP, ODD])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_as_exact_as_the_originals(name, shape):
    settings, count = LAYERS[name]
    plain = randomise(layer(**settings))
    packed, exact = copy.deepcopy(plain), copy.deepcopy(plain).double()
    swap(packed, inference=True)
    x = tokens(*shape)
    wanted, original = run(exact, x.double()), run(plain, x)
    if count:
        assert packings(packed, x) == count
    for given in (x, x.to(memory_format=torch.channels_last)):
        with torch.no_grad():
            out = packed(given)
        assert isinstance(out, tuple) and len(out) == 1 and out[0].shape == x.shape
        assert (out[0] - wanted).abs().max() <= 4 * (original - wanted).abs().max() + 1e-6 * wanted.abs().max()
    assert bool(plans.size(packed))
    assert count == 0 or not packings(packed, x)


@pytest.mark.parametrize("name", LAYERS)
def test_every_parameter_is_followed(name):
    packed = randomise(layer(**LAYERS[name][0]))
    x = tokens(*ODD)
    swap(packed, inference=True)
    assert_every_parameter_is_followed(packed, x)


@pytest.mark.parametrize("settings", [{}, {"use_layer_scale": False}])
def test_whole_models(settings):
    original = model(**settings)
    packed = copy.deepcopy(original)
    names, kinds = list(packed.state_dict()), [type(m) for m in packed.modules()]
    report = swap(packed, inference=True)
    x = torch.randn(2, 3, 64, 72, generator=torch.Generator().manual_seed(1))
    # Five layers of two products and perhaps the factors of a norm, the embeddings but for the first one, the head.
    assert packings(packed, x) == 5 * (3 if not settings else 2) + 3 + 1 and not packings(packed, x)
    result = verify_swap(packed, x)
    assert result.ok, str(result)
    with torch.no_grad():
        outs = [each(x, output_hidden_states=True) for each in (packed, original)]
    for found, wanted in zip(*(out.hidden_states for out in outs)):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
    for other in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert plans.size(other) == 0 and packings(other, x)
    assert list(packed.state_dict()) == names
    report.restore()
    assert [type(m) for m in packed.modules()] == kinds and plans.size(packed) == 0


class Derived(poolformer.PoolFormerLayer):
    """Which computes something else."""

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor]:
        return (2 * super().forward(hidden_states)[0],)


class Norm(poolformer.PoolFormerGroupNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class Adapter(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def derive(block: Any) -> None:
    block.output.conv2.__class__ = Adapter


def derive_norm(block: Any) -> None:
    block.before_norm.__class__ = Norm


def derive_last_norm(block: Any) -> None:
    block.after_norm.__class__ = Norm


def replace(block: Any) -> None:
    forward = block.output.forward
    block.output.forward = lambda x: 2 * forward(x)


def replace_pooling(block: Any) -> None:
    forward = block.pooling.forward
    block.pooling.forward = lambda x: 2 * forward(x)


def hook(block: Any) -> None:
    block.output.conv1.register_forward_hook(lambda m, given, out: 2 * out)


def hook_norm(block: Any) -> None:
    block.before_norm.register_forward_hook(lambda m, given, out: out + torch.arange(9.0))


def hook_dropped(block: Any) -> None:
    block.drop_path.register_forward_hook(lambda m, given, out: 2 * out)


def hook_dropped_inside(block: Any) -> None:
    block.output.drop.register_forward_hook(lambda m, given, out: 2 * out)


def activate(block: Any) -> None:
    block.output.act_fn = nn.Softplus()


def unscale(block: Any) -> None:
    block.use_layer_scale = False


@pytest.mark.parametrize(
    "change",
    [
        derive,
        derive_norm,
        derive_last_norm,
        replace,
        replace_pooling,
        hook,
        hook_norm,
        hook_dropped,
        hook_dropped_inside,
        activate,
        unscale,
    ],
)
def test_changed_parts_have_their_say(change):
    plain = randomise(layer())
    packed = copy.deepcopy(plain)
    swap(packed, inference=True)
    x = tokens(*ODD)
    before = run(packed, x)
    for each in (plain, packed):
        change(each)
    found, wanted = run(packed, x), run(plain, x)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(before, wanted, rtol=1e-3, atol=1e-3)


def test_a_derived_layer_is_left_as_it_is():
    plain = randomise(layer())
    plain.__class__ = Derived
    packed = copy.deepcopy(plain)
    swap(packed, inference=True)
    assert type(packed) is Derived
    x = tokens(*ODD)
    torch.testing.assert_close(run(packed, x), run(plain, x), rtol=1e-4, atol=1e-5)


def test_gradients_training_and_other_dtypes_take_the_original():
    plain = randomise(layer())
    packed = copy.deepcopy(plain)
    swap(packed, inference=True)
    x = tokens(*MAP)
    found, wanted = (torch.autograd.grad(m(x)[0].square().sum(), next(m.parameters()))[0] for m in (packed, plain))
    torch.testing.assert_close(found, wanted)
    outs = []
    for each in (packed, plain):
        torch.manual_seed(3)
        outs.append(run(each.train(), x))
    torch.testing.assert_close(*outs)
    for dtype in (torch.float64, torch.bfloat16):
        outs = [run(each.eval().to(dtype), x.to(dtype)) for each in (packed, plain)]
        assert torch.equal(*outs)
    assert not packings(packed, x.bfloat16())


def test_with_folded_norms_the_pooling_is_one_pass():
    pooling = poolformer.PoolFormerPooling(3)
    wider = poolformer.PoolFormerPooling(5)
    both = nn.Sequential(pooling, wider).eval()
    x = tokens(*ODD)
    wanted = run(both, x)
    report = swap(both, fold_norms=True)
    assert report.folded == 1 and type(wider) is poolformer.PoolFormerPooling
    torch.testing.assert_close(run(both, x), wanted, rtol=1e-5, atol=1e-6)
    report.restore()
    assert type(pooling) is poolformer.PoolFormerPooling


def test_compiled_and_exported():
    original = model()
    packed = copy.deepcopy(original)
    swap(packed, inference=True)
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = original(x).logits
        torch._dynamo.reset()
        compiled = torch.compile(packed, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x).logits, wanted, rtol=1e-4, atol=1e-4)
        exported = torch.export.export(packed, (x,))
        torch.testing.assert_close(exported.module()(x).logits, wanted, rtol=1e-4, atol=1e-4)
    assert not [n for n in exported.graph.nodes if "mvkernels" in str(n.target)]
