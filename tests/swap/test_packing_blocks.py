"""swap(model, inference=True): MLPs, and the blocks and stems of timm's and transformers' models."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from mvkernels.dispatch import extension
from mvkernels.swap import swap, verify_swap
from mvkernels.swap.packing import plans
from tests.swap import linear_attention
from tests.swap.conftest import randomise
from tests.swap.inference import assert_every_parameter_is_followed, packings
from tests.swap.test_packing_torch import Calls, run, tokens

pytestmark = pytest.mark.skipif(extension.module is None, reason=extension.reason)
timm = pytest.importorskip("timm")

from timm.layers import ConvMlp, GroupNorm1, Mlp, RelPosBias, RelPosMlp  # noqa: E402
from timm.models import (  # noqa: E402
    efficientformer,
    efficientformer_v2,
    levit,
    maxxvit,
    metaformer,
    swin_transformer,
    tiny_vit,
)


def poolformer() -> nn.Module:
    return metaformer.MetaFormer(
        depths=(1, 2),
        dims=(8, 12),
        downsample_norm=None,
        mlp_act=nn.GELU,
        mlp_bias=True,
        norm_layers=GroupNorm1,
        layer_scale_init_values=0.5,
        res_scale_init_values=None,
        use_mlp_head=False,
        num_classes=5,
        drop_path_rate=0.1,
    )


def coatnet_block(outputs: int, stride: int, size: tuple[int, int] | None, **settings: Any) -> nn.Module:
    """From 12 channels, with position biases for maps of this size."""
    position = None if size is None else functools.partial(RelPosBias, window_size=size)
    cfg = maxxvit.MaxxVitTransformerCfg(dim_head=4, norm_layer="layernorm2d", **settings)
    return maxxvit.TransformerBlock2d(12, outputs, stride, rel_pos_cls=position, cfg=cfg)


def swin() -> nn.Module:
    return swin_transformer.SwinTransformer(
        img_size=32, embed_dim=12, depths=(2, 2), num_heads=(2, 3), window_size=4, num_classes=5
    )


def transformers_levit() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes: dict[str, Any] = {"hidden_sizes": [16, 24, 32], "num_attention_heads": [2, 2, 2], "key_dim": [8, 8, 8]}
    down = [["Subsample", 8, 2, 4, 2, 2], ["Subsample", 8, 3, 4, 2, 2]]
    config = transformers.LevitConfig(image_size=64, depths=[1, 1, 1], num_labels=5, **sizes)
    config.down_ops = [*down, [""]]
    return transformers.LevitForImageClassification(config)


MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "poolformer": (poolformer, 33),
    "efficientformer": (
        lambda: efficientformer.EfficientFormer((1, 2, 2), (8, 12, 16), num_vit=1, num_classes=5, img_size=112),
        112,
    ),
    "levit": (
        lambda: levit.Levit(64, embed_dim=(16, 24), key_dim=8, depth=(1, 2), num_heads=(2, 3), num_classes=5),
        64,
    ),
    "swin": (swin, 32),
    "transformers_levit": (transformers_levit, 64),
    "dc_ae": (linear_attention.dc_ae_model, 64),
    "dc_ae, interpolated": (
        lambda: linear_attention.dc_ae_model(downsample_block_type="Conv", upsample_block_type="interpolate"),
        64,
    ),
}


@pytest.mark.core
@pytest.mark.parametrize("name", MODELS)
def test_whole_models_are_as_exact_as_the_originals(name):
    make, side = MODELS[name]
    torch.manual_seed(0)
    model = randomise(make())
    x = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    names, kinds = list(model.state_dict()), [type(m) for m in model.modules()]
    report = swap(model, inference=True)
    assert packings(model, x) > 5 and not packings(model, x)
    result = verify_swap(model, x)
    assert result.ok, str(result)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert plans.size(other) == 0 and packings(other, x) > 5
    assert list(model.state_dict()) == names
    report.restore()
    assert [type(m) for m in model.modules()] == kinds and plans.size(model) == 0


Config = functools.partial(maxxvit.MaxxVitConvCfg, norm_eps=1e-3)
SEQUENCE, MAP, ODD = (2, 11, 12), (2, 12, 8, 6), (1, 12, 7, 9)
BLOCKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "Mlp": (lambda: Mlp(12, 20), SEQUENCE, 2),
    "Mlp, no bias": (lambda: Mlp(12, 20, 9, act_layer=nn.ReLU, bias=False), (5, 12), 2),
    "Mlp of windows": (lambda: Mlp(12, 20, act_layer=nn.Hardswish), (2, 3, 4, 5, 12), 2),
    "Mlp of convolutions": (lambda: Mlp(12, 20, use_conv=True), ODD, 2),
    "Mlp with a norm": (lambda: Mlp(12, 20, norm_layer=nn.LayerNorm), SEQUENCE, 2),
    "Mlp with another activation": (lambda: Mlp(12, 20, act_layer=nn.Mish), SEQUENCE, 2),
    "ConvMlp": (lambda: ConvMlp(12, 20), ODD, 2),
    "ConvMlp with a batch norm": (lambda: ConvMlp(12, 20, norm_layer=nn.BatchNorm2d), MAP, 2),
    "NormMlp": (lambda: tiny_vit.NormMlp(12, 20), SEQUENCE, 2),
    "LevitMlp": (lambda: levit.LevitMlp(12, 20, act_layer=nn.Hardswish), SEQUENCE, 2),
    "LevitMlp of convolutions": (lambda: levit.LevitMlp(12, 20, use_conv=True), ODD, 2),
    "LinearNorm": (lambda: levit.LinearNorm(12, 20), SEQUENCE, 1),
    "LeViT's ConvNorm": (lambda: levit.ConvNorm(12, 20, 3, 2, 1), ODD, 1),
    "TinyViT's ConvNorm": (lambda: tiny_vit.ConvNorm(12, 20, 3, 1, 1), ODD, 1),
    "EfficientFormerV2's ConvNorm": (lambda: efficientformer_v2.ConvNorm(12, 20), ODD, 1),
    "Stem16": (lambda: levit.Stem16(12, 32, nn.Hardswish), (1, 12, 33, 17), 4),
    "Stem4": (lambda: efficientformer.Stem4(12, 20), ODD, 2),
    "MetaBlock2d": (lambda: efficientformer.MetaBlock2d(12, layer_scale_init_value=0.5), ODD, 2),
    "MetaFormerBlock": (lambda: metaformer.MetaFormerBlock(12, mlp_act=nn.GELU, norm_layer=GroupNorm1), ODD, 2),
    "MetaFormerBlock, StarReLU": (lambda: metaformer.MetaFormerBlock(12, res_scale_init_value=1.0), MAP, 2),
    "MbConvBlock": (lambda: maxxvit.MbConvBlock(12, 12, cfg=Config()), ODD, 2),
    "MbConvBlock, strided": (lambda: maxxvit.MbConvBlock(12, 20, 2, cfg=Config(stride_mode="dw")), MAP, 3),
    "TransformerBlock2d": (lambda: coatnet_block(12, 1, (8, 6), init_values=0.5), MAP, 5),
    "TransformerBlock2d of half the size": (lambda: coatnet_block(20, 2, (4, 3)), MAP, 6),
    "TransformerBlock2d without biases": (lambda: coatnet_block(12, 1, None, proj_drop=0.1), ODD, 4),
    "MbConvBlock, strided at first": (lambda: maxxvit.MbConvBlock(12, 20, 2, cfg=Config(stride_mode="1x1")), MAP, 4),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_are_as_exact_as_the_originals(name):
    make, shape, count = BLOCKS[name]
    torch.manual_seed(0)
    model = randomise(Calls(make()))
    x = tokens(*shape)
    plain = run(model, x)
    exact = run(copy.deepcopy(model).double(), x.double())
    swap(model, inference=True)
    assert packings(model, x) == count and not packings(model, x)
    other = x.to(memory_format=torch.channels_last) if x.dim() == 4 else x.mT.contiguous().mT
    for given in (x, other):
        found = run(model, given)
        assert found.shape == plain.shape
        assert (found - exact).abs().max() <= 4 * (plain - exact).abs().max() + 1e-6 * exact.abs().max()


def test_tokens_are_laid_out_as_the_originals():
    model = randomise(Calls(Mlp(12, 20)))
    x = tokens(3, 4, 12)[:, ::2]
    wanted = run(model, x)
    swap(model, inference=True)
    assert run(model, x).stride() == wanted.stride()


def hooked(block: Any, seen: list[Any]) -> None:
    block.mlp.fc1.register_forward_hook(lambda m, given, out: seen.append(out.shape))


def replaced(block: Any, seen: list[Any]) -> None:
    forward = block.mlp.act.forward
    block.mlp.act.forward = lambda x: (seen.append(x.shape), forward(x))[1]


def exchanged(block: Any, seen: list[Any]) -> None:
    class Adapter(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(x.shape)
            return super().forward(x)

    fc2 = block.mlp.fc2
    block.mlp.fc2 = Adapter(fc2.in_features, fc2.out_features)
    block.mlp.fc2.load_state_dict(fc2.state_dict())


@pytest.mark.parametrize("change", [hooked, replaced, exchanged])
def test_a_changed_part_is_called(change):
    torch.manual_seed(0)
    block = randomise(efficientformer.MetaBlock1d(12, layer_scale_init_value=0.5))
    block.token_mixer = nn.Identity()
    swap(block, inference=True)
    x = tokens(2, 49, 12)
    before, seen = run(block, x), []
    change(block, seen)
    torch.testing.assert_close(run(block, x), before, rtol=1e-4, atol=1e-5)
    assert len(seen) == 1


@pytest.mark.parametrize("name", [name for name in BLOCKS if "Block" in name])
def test_every_parameter_of_a_block_is_followed(name):
    make, shape, _ = BLOCKS[name]
    torch.manual_seed(0)
    model = randomise(Calls(make()))
    x = tokens(*shape)
    swap(model, inference=True)
    assert_every_parameter_is_followed(model, x)


def test_maps_that_position_biases_are_not_for_are_the_originals():
    block = Calls(coatnet_block(12, 1, (8, 6)))
    swap(block, inference=True)
    with pytest.raises(RuntimeError, match=r"attn_mask|must match|expanded size|broadcast"):
        run(block, tokens(1, 12, 4, 6))


def test_hooks_of_what_makes_position_biases_see_every_call():
    position = functools.partial(RelPosMlp, window_size=(8, 6), hidden_dim=16)
    cfg = maxxvit.MaxxVitTransformerCfg(dim_head=4, norm_layer="layernorm2d")
    block = Calls(maxxvit.TransformerBlock2d(12, 12, 1, rel_pos_cls=position, cfg=cfg)).eval()
    swap(block, inference=True)
    x, seen = tokens(*MAP), []
    assert packings(block, x) > 4
    part = next(m for m in block.modules() if isinstance(m, RelPosMlp)).mlp.fc1
    part.register_forward_hook(lambda *_: seen.append(1))
    for _ in range(3):
        run(block, x)
    assert len(seen) == 3


def test_in_training_it_is_the_original():
    block = randomise(Calls(Mlp(12, 20, drop=0.5)))
    plain = copy.deepcopy(block)
    swap(block, inference=True)
    x = tokens(2, 5, 12)
    block.train(), plain.train()
    outs = []
    for model in (block, plain):
        torch.manual_seed(3)
        outs.append(run(model, x))
    assert torch.equal(*outs)
    block.eval()
    assert packings(block, x) == 2


def test_a_stem_that_has_more_in_it():
    stem = randomise(efficientformer.Stem4(3, 8))
    x = tokens(1, 3, 16, 16)
    swap(stem, inference=True)
    wanted = run(stem, x)
    stem.add_module("last", nn.Softplus())
    torch.testing.assert_close(run(stem, x), nn.functional.softplus(wanted), rtol=1e-4, atol=1e-5)
