"""timm's attention with windows, grids and maps of two sizes: values, gradients, and calls left to the original."""

from __future__ import annotations

import copy
import logging

import numpy as np
import pytest
import torch
from torch import nn

from mvkernels.swap import swap, verify_swap
from tests.swap.conftest import compiles_for_all_sizes, randomise
from tests.swap.timm_windows import (
    attention2d,
    conv_attention,
    efficientformer_v2,
    levit,
    maxvit,
    multi_query,
    swin,
    swin_v2,
    tiny_vit,
)

DOUBLE = torch.float64


def agree(module: nn.Module, x: torch.Tensor) -> None:
    """The swapped module against the original, in float64: the output and all gradients."""
    module.double()
    twin = copy.deepcopy(module)
    assert swap(twin).count == 1
    results = []
    for each in (module, twin):
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        out = each(leaf)
        cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(0), dtype=out.dtype)
        wanted = [leaf, *(p for p in each.parameters() if p.requires_grad)]
        results.append([out, *torch.autograd.grad(out, wanted, cotangent, allow_unused=True)])
    for expected, found in zip(*results):
        assert (expected is None) == (found is None)
        if expected is not None:
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.fixture
def falls_back(caplog):
    """Reasons why swapped modules ran their original forward."""
    from mvkernels.swap import eligibility

    eligibility._logged.clear()
    caplog.set_level(logging.WARNING, logger="mvkernels")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "mvkernels"]


def a_map(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)


@pytest.mark.core
@pytest.mark.parametrize("make", [swin, swin_v2])
@pytest.mark.parametrize(
    ("size", "window", "shift"),
    [
        ((8, 12), 4, 2),
        ((8, 12), 4, 0),
        ((14, 7), 7, 3),
        ((15, 11), (4, 5), (1, 3)),
        ((5, 9), 7, 3),
        ((10, 10), (7, 4), 2),
    ],
    ids=str,
)
def test_windows_of_any_map(make, size, window, shift, falls_back):
    """timm shrinks windows that do not fit, and pads a rolled map: another function than padding and rolling."""
    for more in ({}, {"qkv_bias": False}, {"always_partition": True}):
        block = make(input_resolution=size, window_size=window, shift_size=shift, **more)
        agree(block, a_map(2, *size, 12))
    assert not falls_back()


@pytest.mark.parametrize("make", [swin, swin_v2])
def test_a_shift_of_a_window_is_the_originals(make, falls_back):
    agree(make(shift_size=4), a_map(1, 8, 12, 12))
    assert "its shift (4, 4) is not less than its window (4, 4)" in falls_back()[0]


@pytest.mark.parametrize("make", [swin, swin_v2])
def test_a_mask_made_for_each_map(make, falls_back):
    block = make(dynamic_mask=True)
    for size in ((8, 12), (4, 8), (9, 7), (3, 3)):
        agree(block, a_map(1, *size, 12))
    assert not falls_back()


@pytest.mark.parametrize("make", [swin, swin_v2])
def test_a_mask_of_another_size_is_the_originals(make, falls_back):
    """Whose masks are then those of the wrong windows, or do not fit."""
    block = make().double()
    twin = copy.deepcopy(block)
    swap(block)
    x = a_map(1, 12, 8, 12)  # as many windows, at other places
    assert torch.equal(block(x), twin(x))
    assert "its mask is for maps of (8, 12), but the map is (12, 8)" in falls_back()[0]
    with pytest.raises(RuntimeError):
        block(a_map(1, 8, 8, 12))


@pytest.mark.parametrize("make", [swin, swin_v2])
def test_another_input_size_after_the_swap(make, falls_back):
    block = make().double()
    twin = copy.deepcopy(block)
    swap(block)
    for size, window in (((16, 12), (4, 4)), ((6, 10), (3, 5)), ((4, 20), (5, 5))):
        for each in (block, twin):
            each.set_input_size(size, window)
            each.double()
        x = a_map(2, *size, 12)
        torch.testing.assert_close(block(x), twin(x), rtol=1e-9, atol=1e-9)
    assert not falls_back() and block.state_dict().keys() == twin.state_dict().keys()


def test_heads_of_a_width_of_their_own_and_fused_attention():
    for fused in (False, True):
        block = swin(head_dim=5)
        block.attn.fused_attn = fused
        agree(block, a_map(2, 8, 12, 12))
    agree(swin_v2(pretrained_window_size=6), a_map(1, 8, 12, 12))
    clamped = swin_v2(shift_size=0)  # with a shift, masks of -100 would let scores of +-100 through
    clamped.attn.logit_scale.data[0] = 6.0
    agree(clamped, a_map(1, 8, 12, 12))
    separate = swin_v2()
    separate.attn.qkv_bias_separate = True
    agree(separate, a_map(1, 8, 12, 12))


def test_windows_of_numpys_numbers(falls_back):
    four = np.int64(4)
    agree(swin(window_size=(four, four)), a_map(1, 8, 12, 12))
    agree(swin_v2(window_size=(four, four)), a_map(1, 8, 12, 12))
    agree(tiny_vit(window_size=four), a_map(1, 7, 8, 12))
    agree(maxvit(window_size=(four, np.int64(3))), a_map(1, 8, 6, 16))
    assert not falls_back()


@pytest.mark.core
@pytest.mark.parametrize("kind", ["PartitionAttentionCl", "PartitionAttention2d", "ParallelPartitionAttention"])
@pytest.mark.parametrize("position", ["bias", "bias_tf", "mlp", ""])
@pytest.mark.parametrize("head_first", [False, True])
def test_blocks_and_grids(kind, position, head_first, falls_back):
    shape = (2, 16, 8, 9) if kind == "PartitionAttention2d" else (2, 8, 9, 16)
    for partition in ("block", "grid"):
        for fused in (False, True):
            block = maxvit(kind, partition, rel_pos_type=position, head_first=head_first)
            for module in block.modules():
                if hasattr(module, "fused_attn"):
                    module.fused_attn = fused
            agree(block, a_map(*shape))
    assert not falls_back()


def test_partitions_that_do_not_divide_the_map_are_the_originals(falls_back):
    block = maxvit()
    swap(block)
    with pytest.raises(AssertionError, match="divisible by window"):
        block(torch.randn(1, 9, 6, 16))
    assert "do not divide" in falls_back()[0]


def test_another_partition_after_the_swap():
    for kind in ("PartitionAttentionCl", "ParallelPartitionAttention"):
        block = maxvit(kind).double()
        twin = copy.deepcopy(block)
        swap(block)
        for each in (block, twin):
            each.set_partition_size((2, 3))
            each.double()
        x = a_map(1, 4, 6, 16)
        torch.testing.assert_close(block(x), twin(x), rtol=1e-9, atol=1e-9)


def test_the_positions_mlp_draws_its_dropout_once():
    block = maxvit(rel_pos_type="mlp")
    twin = copy.deepcopy(block)
    swap(block)
    outputs = []
    for each in (block, twin):
        each.train()
        torch.manual_seed(0)
        outputs.append(each(torch.ones(1, 8, 6, 16)))
    torch.testing.assert_close(*outputs)


@pytest.mark.core
@pytest.mark.parametrize("size", [(4, 4), (8, 12), (7, 9), (3, 5)], ids=str)
def test_tiny_vit_pads_before_its_norm(size, falls_back):
    for training in (False, True):
        block = tiny_vit()
        block.train(training)
        agree(block, a_map(2, *size, 12))
    assert not falls_back()


@pytest.mark.core
@pytest.mark.parametrize("convolutions", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_levit(convolutions, training, falls_back):
    x = a_map(2, 12, 3, 5) if convolutions else a_map(2, 15, 12)
    for kind, more in (("Attention", {}), ("AttentionDownsample", {}), ("AttentionDownsample", {"use_pool": True})):
        module = levit(kind, use_conv=convolutions, **more)
        module.train(training)
        agree(module, x)
    assert not falls_back()


def test_other_tokens_than_levits_biases_are_for(falls_back):
    module = levit()
    swap(module)
    with pytest.raises(RuntimeError):
        module(torch.randn(1, 14, 12))
    assert "its biases are for 15 tokens, but the input has 14" in falls_back()[0]


@pytest.mark.parametrize("make", [levit, tiny_vit, efficientformer_v2])
def test_biases_are_gathered_anew(make):
    """timm's own eval mode would keep those of the first call."""
    module = make()
    x = {levit: (1, 15, 12), tiny_vit: (1, 8, 4, 12), efficientformer_v2: (1, 12, 5, 6)}[make]
    x = torch.randn(x)
    swap(module)
    before = module(x)
    attention = getattr(module, "attn", module)
    with torch.no_grad():
        attention.attention_biases.copy_(torch.randn(attention.attention_biases.shape))
    assert not torch.allclose(module(x), before)


@pytest.mark.parametrize(
    "settings",
    [{}, {"kv_stride": 1}, {"kv_stride": 4}, {"query_strides": 2}, {"query_strides": 2, "padding": "same"},
     {"key_dim": 3, "value_dim": 6, "use_bias": True}],
    ids=str,
)  # fmt: skip
def test_multi_query_attention(settings, falls_back):
    for fused in (False, True):
        module = multi_query(**settings)
        module.fused_attn = fused
        agree(module, a_map(2, 12, 8, 6))
    assert not falls_back()


def test_attention_on_a_map_and_masks(falls_back):
    for head_first in (False, True):
        agree(attention2d(head_first=head_first), a_map(2, 12, 3, 4))
    assert not falls_back()
    for make, mask in ((attention2d, (12, 12)), (multi_query, (12, 4))):
        module = make().double()
        twin = copy.deepcopy(module)
        swap(module)
        x, given = a_map(1, 12, 3, 4), a_map(*mask)
        assert torch.equal(module(x, attn_mask=given), twin(x, attn_mask=given))
    module = multi_query()
    module.einsum = True
    assert "einsum" in swap(module).entries[0].reason


def test_efficientformers_downsampling(falls_back):
    for training in (False, True):
        module = efficientformer_v2()
        module.train(training)
        agree(module, a_map(2, 12, 5, 6))
    assert not falls_back()
    module = efficientformer_v2()
    swap(module)
    with pytest.raises(RuntimeError):
        module(torch.randn(1, 12, 6, 6))


@pytest.mark.parametrize(
    "settings", [{}, {"small_kernels": True}, {"fuse_out_proj": True}, {"upsample_mode": "nearest"}], ids=str
)
def test_conv_attention(settings, falls_back):
    for fused in (False, True):
        for size in ((4, 6), (7, 5)):
            module = conv_attention(**settings)
            module.fused_attn = fused
            agree(module, a_map(2, 60, *size))
    agree(conv_attention("lowformer"), a_map(2, 60, 7, 6))
    assert not falls_back()


INSIDE = {
    swin: ("attn", "attn.qkv", "attn.softmax", "attn.proj", "attn.attn_drop"),
    swin_v2: ("attn", "attn.qkv", "attn.softmax", "attn.proj"),
    maxvit: ("attn", "attn.qkv", "attn.rel_pos", "attn.proj"),
    tiny_vit: ("attn", "attn.norm", "attn.qkv", "attn.proj"),
}


@pytest.mark.parametrize("make", INSIDE)
def test_hooks_inside_see_windows(make, falls_back):
    """A swapped block calls its projections on the whole map: what listens there gets the original's windows."""
    for name in INSIDE[make]:
        block = make()
        twin = copy.deepcopy(block)
        swap(block)
        seen: list[torch.Size] = []
        for each in (block, twin):
            each.get_submodule(name).register_forward_hook(lambda m, given, out, seen=seen: seen.append(out.shape))
            each(torch.randn(1, 8, 12, 16 if make is maxvit else 12))
        half = len(seen) // 2
        assert seen[:half] == seen[half:]
    assert falls_back()


def test_autocast_and_half_types():
    for make in (swin, swin_v2, maxvit, tiny_vit):
        block = make()
        x = torch.randn(1, 8, 12, 16 if make is maxvit else 12)
        expected = block(x).detach()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            rounded = block(x)
            swap(block)
            half = block(x)
        torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-5)
        assert half.dtype == rounded.dtype
        limit = 2 * float((rounded.float() - expected).abs().max()) + 1e-6
        assert float((half.float() - expected).abs().max()) <= limit
        block.bfloat16()
        assert block(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("make", [swin, swin_v2, tiny_vit])
def test_one_compilation_for_all_sizes(make):
    settings = {"dynamic_mask": True} if make is not tiny_vit else {}
    block = make(**settings).double()
    swap(block)
    compiles_for_all_sizes(block, [a_map(b, h, w, 12) for b, h, w in ((2, 8, 12), (3, 16, 20), (5, 24, 28))])


MODELS = {
    "swin": (
        "SwinTransformer",
        "swin_transformer",
        {"img_size": 56, "patch_size": 4, "embed_dim": 12, "depths": (2, 2)},
        4,
    ),
    "swin_v2": ("SwinTransformerV2", "swin_transformer_v2", {"img_size": 64, "embed_dim": 12, "depths": (2, 2)}, 4),
}


@pytest.mark.parametrize("name", MODELS)
def test_whole_models(name):
    import importlib

    kind, module, settings, count = MODELS[name]
    sizes = {"num_heads": (2, 3), "window_size": 4 if name == "swin_v2" else 7, "num_classes": 5, **settings}
    model = randomise(getattr(importlib.import_module(f"timm.models.{module}"), kind)(**sizes))
    result = verify_swap(model, torch.randn(1, 3, sizes["img_size"], sizes["img_size"]))
    assert result.ok and result.swapped == count, str(result)


@pytest.mark.parametrize(
    ("name", "swapped", "all_of_them"),
    [
        ("swin_tiny_patch4_window7_224", 12, 12),
        ("swinv2_tiny_window8_256", 12, 12),
        ("maxvit_tiny_tf_224", 22, 22),
        ("maxvit_tiny_pm_256", 11, 11),
        ("coatnet_rmlp_nano_rw_224", 9, 9),
        ("tiny_vit_5m_224", 10, 10),
        ("levit_128", 14, 14),
        ("mobilenetv4_hybrid_medium", 8, 8),
        ("efficientformerv2_s0", 1, 5),
        ("lowformer_b0", 7, 7),
        ("mobilevitv2_050", 0, 9),
        ("swinv2_cr_tiny_224", 0, 12),
    ],
)
def test_every_attention_of_a_model_is_found(name, swapped, all_of_them):
    import timm

    with torch.device("meta"):
        model = timm.create_model(name)
    keys = list(model.state_dict())
    report = swap(model)
    assert (report.count, len(report.entries)) == (swapped, all_of_them)
    assert all(entry.swapped or "no fused form of this class is known" not in entry.reason for entry in report.entries)
    assert list(model.state_dict()) == keys
    report.restore()
    assert not any(hasattr(type(m), "mvk_original") for m in model.modules())
