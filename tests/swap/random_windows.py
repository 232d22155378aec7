"""Drawing of random models with windows, grids, maps of two sizes and gathered position biases."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st
from torch import nn

from tests.swap import timm_windows, torchvision_windows, transformers_windows
from tests.swap.drawn import Draw, Drawn, sides
from tests.swap.test_cpubone import attention as cpubone_attention

RATES = st.sampled_from((0.0, 0.5))


def sdpa_or_not(draw: Draw, block: nn.Module) -> nn.Module:
    """timm's modules attend by scaled_dot_product_attention, or by two products and a softmax."""
    fused = draw(st.booleans())
    for module in block.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused
    return block


def window_and_shift(draw: Draw) -> tuple[tuple[int, int], tuple[int, int]]:
    window = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    return window, (draw(st.integers(0, window[0] - 1)), draw(st.integers(0, window[1] - 1)))


def _swin_block(draw: Draw) -> dict[str, Any]:
    """What timm's blocks of Swin and of Swin V2 take."""
    window, shift = window_and_shift(draw)
    return {
        "dim": 6,
        "num_heads": draw(st.integers(1, 3)),
        "input_resolution": sides(draw),
        "window_size": window,
        "shift_size": shift,
        "always_partition": draw(st.booleans()),
        "dynamic_mask": draw(st.booleans()),
        "mlp_ratio": 1.0,
        "qkv_bias": draw(st.booleans()),
        "attn_drop": draw(RATES),
        "drop_path": draw(RATES),
    }


def _with_windows(draw: Draw, block: nn.Module, channels: int, size: tuple[int, int], *free: str) -> Drawn:
    """A block on maps (B, H, W, C)."""
    return Drawn(block, channels, size, free=free, last=True, turned=draw(st.booleans()))


BESIDE = ("norm1", "drop_path1", "norm2", "mlp", "drop_path2", "ls1", "ls2")


def timm_swin(draw: Draw) -> Drawn:
    settings = _swin_block(draw)
    block = timm_windows.swin(head_dim=draw(st.sampled_from((None, 1, 5))), **settings)
    return _with_windows(draw, sdpa_or_not(draw, block), 6, settings["input_resolution"], *BESIDE)


def timm_swin_v2(draw: Draw) -> Drawn:
    settings = _swin_block(draw)
    block = timm_windows.swin_v2(pretrained_window_size=draw(st.sampled_from((0, 3))), **settings)
    block.attn.qkv_bias_separate = draw(st.booleans())
    return _with_windows(draw, block, 6, settings["input_resolution"], *BESIDE, "attn.cpb_mlp")


def timm_maxvit(draw: Draw) -> Drawn:
    kinds = ("PartitionAttentionCl", "PartitionAttention2d", "ParallelPartitionAttention")
    kind = draw(st.sampled_from(kinds))
    size = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    block = timm_windows.maxvit(
        kind,
        draw(st.sampled_from(("block", "grid"))),
        dim=12,
        dim_head=draw(st.sampled_from((3, 4, 6))),
        window_size=size,
        grid_size=size,
        rel_pos_type=draw(st.sampled_from(("bias", "bias_tf", "mlp", ""))),
        head_first=draw(st.booleans()),
        attn_bias=draw(st.booleans()),
        init_values=draw(st.sampled_from((None, 0.5))),
        expand_ratio=1.0,
        attn_drop=draw(RATES),
        drop_path=draw(RATES),
    )
    block = sdpa_or_not(draw, block)
    whole = size[0] * draw(st.integers(1, 3)), size[1] * draw(st.integers(1, 3))  # others raise
    positions = [f"{attention}.rel_pos" for attention in ("attn", "attn_block", "attn_grid")]
    free = (*BESIDE, *(f"{position}.{part}" for position in positions for part in ("mlp", "bias_act")))
    if kind == "PartitionAttention2d":
        return Drawn(block, 12, whole, free=free)
    return _with_windows(draw, block, 12, whole, *free)


def timm_tiny_vit(draw: Draw) -> Drawn:
    block = timm_windows.tiny_vit(
        dim=6,
        num_heads=draw(st.integers(1, 3)),
        window_size=draw(st.integers(1, 4)),
        mlp_ratio=1.0,
        drop=draw(RATES),
        drop_path=draw(RATES),
        local_conv_size=draw(st.sampled_from((1, 3))),
    )
    free = ("drop_path1", "local_conv", "mlp", "drop_path2")
    return _with_windows(draw, sdpa_or_not(draw, block), 6, sides(draw), *free)


def timm_levit(draw: Draw) -> Drawn:
    kind = draw(st.sampled_from(("Attention", "AttentionDownsample")))
    size, convolutions = sides(draw), draw(st.booleans())
    settings = {"use_pool": draw(st.booleans()), "stride": draw(st.integers(1, 3))}
    block = timm_windows.levit(
        kind,
        key_dim=draw(st.integers(1, 5)),
        num_heads=draw(st.integers(1, 3)),
        attn_ratio=draw(st.sampled_from((1.0, 1.5, 2.0))),
        resolution=size,
        use_conv=convolutions,
        **(settings if kind == "AttentionDownsample" else {}),
    )
    free = ("qkv", "kv", "q", "proj")
    if convolutions:
        return Drawn(block, 12, size, free=free)
    return Drawn(block, 12, (size[0] * size[1],), free=free, turned=draw(st.booleans()))


def timm_efficientformer_v2(draw: Draw) -> Drawn:
    size = sides(draw)
    block = timm_windows.efficientformer_v2(
        dim=6,
        key_dim=draw(st.integers(1, 5)),
        num_heads=draw(st.integers(1, 3)),
        attn_ratio=draw(st.integers(1, 2)),
        resolution=size,
        out_dim=draw(st.sampled_from((None, 5))),
    )
    return Drawn(block, 6, size, free=("q", "k", "v", "v_local", "act", "proj"))


def timm_attention2d(draw: Draw) -> Drawn:
    heads, drop, wider = draw(st.integers(1, 3)), draw(RATES), draw(st.sampled_from((None, 9)))
    if draw(st.booleans()):
        block = timm_windows.attention2d(
            dim=6,
            dim_out=wider and 12,
            num_heads=heads,
            bias=draw(st.booleans()),
            expand_first=draw(st.booleans()),
            head_first=draw(st.booleans()),
            attn_drop=drop,
        )
        return Drawn(sdpa_or_not(draw, block), 6, sides(draw), free=("qkv", "proj", "proj_drop"))
    stride = draw(st.integers(1, 2))
    block = timm_windows.multi_query(
        dim=6,
        dim_out=wider,
        num_heads=heads,
        key_dim=draw(st.integers(1, 5)),
        value_dim=draw(st.integers(1, 5)),
        query_strides=stride,
        kv_stride=draw(st.integers(1, 3)),
        padding=draw(st.sampled_from(("", "same"))),
        use_bias=draw(st.booleans()),
        attn_drop=drop,
    )
    whole = stride * draw(st.integers(1, 4)), stride * draw(st.integers(1, 4))  # others raise
    return Drawn(sdpa_or_not(draw, block), 6, whole, free=("query", "key", "value", "output"))


def timm_conv_attention(draw: Draw) -> Drawn:
    package, width = draw(st.sampled_from(("cpubone", "lowformer"))), draw(st.sampled_from((7, 12, 60)))
    settings: dict[str, Any] = {
        "head_dim_mul": draw(st.sampled_from((0.5, 1.0))),
        "att_stride": draw(st.integers(1, 4)),
        "att_kernel": draw(st.sampled_from((3, 5))),
        "fuse_out_proj": draw(st.booleans()),
    }
    if package == "cpubone":
        settings["small_kernels"] = draw(st.booleans())
        settings["upsample_mode"] = draw(st.sampled_from(("transpose", "nearest")))
    block = sdpa_or_not(draw, timm_windows.conv_attention(package, input_dim=width, **settings))
    return Drawn(block, width, sides(draw), free=("conv_proj", "pwise", "o_proj", "upsampling"))


def authors_cpubone(draw: Draw) -> Drawn:
    heads = draw(st.integers(1, 3))
    width = heads * draw(st.integers(1, 5))
    block = cpubone_attention(input_dim=width, num_heads=heads, att_stride=draw(st.sampled_from((1, 2, 4))))
    return Drawn(block, width, sides(draw), free=("conv_proj", "pwise", "o_proj", "upsampling"))


def _layer(draw: Draw, family: str, *free: str, resizes: bool = False) -> Drawn:
    """A layer of transformers: it takes tokens and the size of their map."""
    window = draw(st.integers(1, 4))
    partition = resizes and draw(st.booleans())
    # Windows that shrink for good have position biases for another window: the layer raises.
    size = sides(draw, window if resizes and not partition else 1)
    block = transformers_windows.layer(
        family,
        size,
        shift=draw(st.integers(0, window - 1)),
        drop_path=draw(RATES),
        heads=draw(st.integers(1, 3)),
        window_size=window,
        mlp_ratio=1.0,
        qkv_bias=draw(st.booleans()),
        hidden_act=draw(st.sampled_from(("gelu", "silu"))),
        attention_probs_dropout_prob=draw(RATES),
    )
    given: dict[str, Any] = {"input_dimensions": size}
    if partition:
        given["always_partition"] = True
    free = ("layernorm_before", "layernorm_after", "drop_path", *free)
    return Drawn(block, 12, (size[0] * size[1],), free=free, turned=draw(st.booleans()), given=given)


def transformers_swin(draw: Draw) -> Drawn:
    return _layer(draw, "swin", "mlp", resizes=True)


def transformers_swin_v2(draw: Draw) -> Drawn:
    return _layer(draw, "swin_v2", "intermediate", "output", "attention.self.continuous_position_bias_mlp")


def transformers_donut_swin(draw: Draw) -> Drawn:
    return _layer(draw, "donut", "intermediate", "output", resizes=True)


def transformers_maskformer_swin(draw: Draw) -> Drawn:
    return _layer(draw, "maskformer", "intermediate", "output")


def transformers_levit(draw: Draw) -> Drawn:
    side, stride = draw(st.integers(1, 6)), draw(st.integers(1, 3))
    common: dict[str, Any] = {
        "key_dim": draw(st.integers(1, 5)),
        "num_attention_heads": draw(st.integers(1, 3)),
        "attention_ratio": draw(st.integers(1, 2)),
    }
    if draw(st.booleans()):
        block = transformers_windows.levit(resolution=side, **common)
    else:
        resolutions = {"resolution_in": side, "resolution_out": -(-side // stride)}
        block = transformers_windows.levit("LevitAttentionSubsample", stride=stride, **resolutions, **common)
    free = ("queries_keys_values", "queries_subsample", "queries", "keys_values", "activation", "projection")
    return Drawn(block, 12, (side * side,), free=free, turned=draw(st.booleans()))


def torchvision_swin(draw: Draw) -> Drawn:
    window, shift = window_and_shift(draw)
    block = torchvision_windows.attention(
        draw(st.sampled_from(("ShiftedWindowAttention", "ShiftedWindowAttentionV2"))),
        window,
        shift,
        heads=draw(st.integers(1, 3)),
        qkv_bias=draw(st.booleans()),
        proj_bias=draw(st.booleans()),
        attention_dropout=draw(RATES),
    )
    # The original calls neither of the first two: it reads their parameters.
    return _with_windows(draw, block, 12, sides(draw), "qkv", "proj", "cpb_mlp")


DRAWN = (
    timm_swin,
    timm_swin_v2,
    timm_maxvit,
    timm_tiny_vit,
    timm_levit,
    timm_efficientformer_v2,
    timm_attention2d,
    timm_conv_attention,
    authors_cpubone,
    transformers_swin,
    transformers_swin_v2,
    transformers_donut_swin,
    transformers_maskformer_swin,
    transformers_levit,
    torchvision_swin,
)
