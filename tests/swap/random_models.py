"""Drawing of random models of all swapped families."""

from __future__ import annotations

import functools

import pytest
from hypothesis import strategies as st
from torch import nn

from tests import cvnets_layout, efficientvit_layout, mobile_former_layout
from tests.swap import random_windows
from tests.swap.conftest import timm_block, transformers_config
from tests.swap.drawn import Draw, Drawn, sides
from tests.swap.linear_attention import dc_ae_attention, sana_attention, timm_attention


def transformers_mobilevit(draw: Draw) -> Drawn:
    config = transformers_config(
        num_attention_heads=draw(st.sampled_from((1, 2, 4))),
        qkv_bias=draw(st.booleans()),
        patch_size=draw(st.sampled_from((1, 2, 3))),
        attention_probs_dropout_prob=draw(st.sampled_from((0.0, 0.5))),
        hidden_dropout_prob=0.0,
        hidden_act=draw(st.sampled_from(("silu", "gelu"))),
    )
    from transformers.models.mobilevit.modeling_mobilevit import MobileViTLayer

    stride = draw(st.sampled_from((1, 2)))
    block = MobileViTLayer(config, in_channels=6, out_channels=6, stride=stride, hidden_size=8, num_stages=1)
    after = ("conv_projection.normalization", "conv_projection.activation", "fusion")
    return Drawn(block, 6, sides(draw, stride), free=("downsampling_layer", "conv_kxk", *after))


def timm_mobilevit(draw: Draw) -> Drawn:
    pytest.importorskip("timm")
    from timm.layers import ConvNormAct
    from timm.models.byobnet import LayerFn

    activation = draw(st.sampled_from((nn.SiLU, nn.ELU)))  # without a kink, which rounding in half types may pass
    block = timm_block(
        in_chs=6,
        transformer_dim=8,
        transformer_depth=draw(st.integers(1, 2)),
        num_heads=draw(st.sampled_from((1, 2, 4))),
        patch_size=draw(st.sampled_from((1, 2, 3))),
        mlp_ratio=draw(st.sampled_from((1.0, 2.0))),
        no_fusion=draw(st.booleans()),
        drop_path_rate=draw(st.sampled_from((0.0, 0.5))),
        attn_drop=draw(st.sampled_from((0.0, 0.5))),
        layers=LayerFn(conv_norm_act=functools.partial(ConvNormAct, act_layer=activation), act=activation),
    )
    return Drawn(block, 6, sides(draw), free=("conv_kxk", "conv_proj.bn", "conv_fusion"))


# What stands beside the convolution of a LiteMLA's projection, under the names of either package.
NOT_THE_CONVOLUTIONS = tuple(f"{of}.{part}" for of in ("qkv", "proj") for part in ("dropout", "norm", "act"))


def timm_efficientvit(draw: Draw) -> Drawn:
    scales = draw(st.sampled_from(((), (3,), (5,), (3, 5))))
    return Drawn(timm_attention(scales), 16, sides(draw), rounds=True, free=NOT_THE_CONVOLUTIONS)


def timm_efficientformer(draw: Draw) -> Drawn:
    pytest.importorskip("timm")
    from timm.models.efficientformer import Attention

    resolution = sides(draw)
    heads, ratio = draw(st.integers(1, 3)), draw(st.sampled_from((1, 2)))
    block = Attention(dim=8, key_dim=draw(st.integers(1, 6)), num_heads=heads, attn_ratio=ratio, resolution=resolution)
    return Drawn(block, 8, (resolution[0] * resolution[1],), free=("qkv", "proj"))


def timm_coatnet(draw: Draw) -> Drawn:
    pytest.importorskip("timm")
    from timm.layers import RelPosBias
    from timm.models.maxxvit import Attention2d

    size = sides(draw)
    position = (lambda **given: RelPosBias(window_size=size, **given)) if draw(st.booleans()) else None
    block = Attention2d(
        dim=8,
        dim_out=draw(st.sampled_from((8, 12))),
        dim_head=4,
        bias=draw(st.booleans()),
        head_first=draw(st.booleans()),
        rel_pos_cls=position,
        attn_drop=draw(st.sampled_from((0.0, 0.5))),
    )
    return Drawn(block, 8, size, free=("qkv", "proj", "proj_drop"))


def diffusers_dc_ae(draw: Draw) -> Drawn:
    norm = draw(st.sampled_from(("rms_norm", "batch_norm")))
    scales = draw(st.sampled_from(((), (3,), (5,))))
    residual = draw(st.booleans())
    block = dc_ae_attention(scales, norm_type=norm, residual_connection=residual)
    return Drawn(block, 16, sides(draw), rounds=True, free=("norm_out",))


def diffusers_sana(draw: Draw) -> Drawn:
    block = sana_attention(
        bias=draw(st.booleans()), kv_heads=2, qk_norm=draw(st.sampled_from((None, "rms_norm_across_heads")))
    )
    return Drawn(block, 16, (draw(st.integers(1, 40)),), rounds=True, free=("norm_q", "norm_k"))


def authors_mobile_former(draw: Draw) -> Drawn:
    kind = draw(st.sampled_from((mobile_former_layout.Local2Global, mobile_former_layout.Global2Local)))
    tokens = draw(st.integers(1, 4)), draw(st.sampled_from((4, 6)))
    heads, dynamic, drop = draw(st.sampled_from((1, 2, 4))), draw(st.booleans()), draw(st.sampled_from((0.0, 0.5)))
    block = kind(8, tokens[1], tokens[0], heads=heads, dynamic=dynamic, drop_path=drop)
    return Drawn(block, 8, sides(draw), tokens, free=("q", "k", "proj", "alpha", "layer_norm"))


def authors_efficientvit(draw: Draw) -> Drawn:
    scales = draw(st.sampled_from(((), (3,), (5,), (3, 5))))
    block = efficientvit_layout.LiteMLA(8, 8, dim=4, scales=scales)
    return Drawn(block, 8, sides(draw), free=NOT_THE_CONVOLUTIONS)


def cvnets_mobilevit(draw: Draw) -> Drawn:
    block = cvnets_layout.MobileViTBlock(
        channels=6,
        dim=8,
        ffn_dim=draw(st.sampled_from((8, 12))),
        layers=draw(st.integers(1, 2)),
        heads=draw(st.sampled_from((1, 2, 4))),
        patch=draw(st.sampled_from(((2, 2), (1, 2), (3, 3)))),
        no_fusion=draw(st.booleans()),
        attn_dropout=draw(st.sampled_from((0.0, 0.5))),
        stochastic=draw(st.sampled_from((0.0, 0.5))),
    )
    free = ("local_rep.conv_3x3", "conv_proj.block.norm", "conv_proj.block.act", "fusion")
    return Drawn(block, 6, sides(draw), free=free)


DRAW = {
    function.__name__: function
    for function in (
        transformers_mobilevit,
        timm_mobilevit,
        timm_efficientvit,
        timm_efficientformer,
        timm_coatnet,
        diffusers_dc_ae,
        diffusers_sana,
        authors_mobile_former,
        authors_efficientvit,
        cvnets_mobilevit,
        *random_windows.DRAWN,
    )
}
