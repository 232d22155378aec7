"""swap(model, inference=True): blocks that pool, with norms over whole pictures, on maps that are hard to normalise."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from mvkernels.dispatch import extension
from mvkernels.swap import swap
from mvmodels.poolformer import PoolFormerBlock
from tests.swap.conftest import randomise
from tests.swap.inference import logits as run
from tests.swap.inference import packings
from tests.swap.test_packing_torch import Calls, tokens

pytestmark = pytest.mark.skipif(extension.module is None, reason=extension.reason)
timm = pytest.importorskip("timm")

from timm.layers import GroupNorm1  # noqa: E402
from timm.models import metaformer  # noqa: E402


def poolformer_layer(channels: int) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    from transformers.models.poolformer.modeling_poolformer import PoolFormerLayer

    config = transformers.PoolFormerConfig()
    return PoolFormerLayer(config, channels, 3, channels, 2 * channels, 0.0)  # type: ignore[no-any-return]


BLOCKS: dict[str, Callable[[int], nn.Module]] = {
    "timm": lambda c: metaformer.MetaFormerBlock(c, mlp_act=nn.GELU, norm_layer=GroupNorm1, layer_scale_init_value=0.5),
    "own": lambda c: PoolFormerBlock(c, 2.0, 0.0, 0.5),
    "transformers": poolformer_layer,
}
NORMS = {"timm": ("norm1", "norm2"), "own": ("norm1", "norm2"), "transformers": ("before_norm", "after_norm")}
LAYOUTS = [torch.contiguous_format, torch.channels_last]


def peaked(x: torch.Tensor) -> torch.Tensor:
    x = x.clone()
    x[:, 3, 5, 5] = 1e4
    return x


MAPS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "3.3": lambda x: torch.full_like(x, 3.3),
    "103": lambda x: torch.full_like(x, 103.0),
    "12345": lambda x: torch.full_like(x, 12345.0),
    "far from 0": lambda x: x + 1e4,
    "farther for their spread": lambda x: x * 0.01 + 100,
    "a peak": peaked,
    "a peak among zeros": lambda x: peaked(torch.zeros_like(x)),
    "pictures of two kinds": lambda x: x + torch.tensor([0.0, 1e4]).view(2, 1, 1, 1),
}


def block(name: str, channels: int = 12) -> nn.Module:
    torch.manual_seed(0)
    return randomise(Calls(BLOCKS[name](channels)))


@pytest.mark.core
@pytest.mark.parametrize("kind", MAPS)
@pytest.mark.parametrize("channels", [12, 64])
@pytest.mark.parametrize("name", BLOCKS)
def test_maps_that_are_hard_to_normalise(name, channels, kind):
    """A factor and a shift that are rounded apart cancel where the mean is large."""
    plain = block(name, channels)
    packed, exact = copy.deepcopy(plain), copy.deepcopy(plain).double()
    swap(packed, inference=True)
    x = MAPS[kind](tokens(2, channels, 14, 11))
    assert packings(packed, x)
    wanted = run(exact, x.double())
    # Of PyTorch's norm that is the more exact layout: the other one may lose all that matters.
    error = float((run(plain, x) - wanted).abs().max())
    for layout in LAYOUTS:
        found = run(packed, x.contiguous(memory_format=layout))
        assert float((found - wanted).abs().max()) <= 3 * error + 4e-7 * float(wanted.abs().max())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("parameter", ["weight", "bias"])
@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("name", BLOCKS)
def test_parameters_that_are_not_finite(name, at, parameter, value):
    """The pooling cancels the bias of the norm before it, though not if that is NaN or infinite."""
    plain = block(name)
    packed = copy.deepcopy(plain)
    swap(packed, inference=True)
    x = tokens(2, 12, 7, 9)
    torch.testing.assert_close(run(packed, x), run(plain, x), rtol=1e-4, atol=1e-5)
    norms = [getattr(each.module, NORMS[name][at]) for each in (plain, packed)]
    for bad in (value, 0.5):  # and back
        for norm in norms:
            with torch.no_grad():
                getattr(norm, parameter)[2] = bad
        found, wanted = run(packed, x), run(plain, x)
        assert wanted.isfinite().all() == (bad == 0.5)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", BLOCKS)
def test_maps_that_are_not_finite(name, value):
    plain = block(name)
    packed = copy.deepcopy(plain)
    swap(packed, inference=True)
    x = tokens(2, 12, 7, 9)
    x[1, 2, 3, 4] = value
    found, wanted = run(packed, x), run(plain, x)
    assert wanted[0].isfinite().all() and not wanted[1].isfinite().any()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5, equal_nan=True)
