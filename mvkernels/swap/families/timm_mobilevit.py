"""The whole ``MobileVitBlock`` of MobileViT (v1) in timm."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import Attention, ConvNormAct, DropPath, Mlp
from timm.models.mobilevit import MobileVitBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from mvkernels.swap.eligibility import (
    asked,
    drops_attention,
    drops_path,
    not_elementwise,
    not_layer_norm,
    not_linear,
    not_plain,
    not_pointwise_conv,
    replaced,
)
from mvkernels.swap.folding.timm import after
from mvkernels.swap.mobilevit import layers_for_call, transform
from mvkernels.swap.packing import mobilevit as packed
from mvkernels.swap.packing.blocks import not_own
from mvkernels.swap.packing.layers import Part
from mvkernels.swap.packing.plans import Keep, Run
from mvkernels.swap.swapped import Swapped

_WATCHED = ("conv_1x1", "transformer", "norm", "conv_proj")


def why_not(block: Any) -> str:
    """Why the fused block cannot replace this ``MobileVitBlock`` in its current state; empty if it can."""
    into, out = block.conv_1x1, block.conv_proj
    reason = (
        replaced(MobileVitBlock, "forward")
        or not_pointwise_conv(into, "conv_1x1")
        or not_plain(out, ConvNormAct, "conv_proj")
        or not_pointwise_conv(out.conv, "conv_proj.conv")
        or not_plain(block.transformer, nn.Sequential, "transformer")
        or not_layer_norm(block.norm, into.out_channels, "norm")
    )
    if reason:
        return reason
    like = block.norm.weight
    for layer in block.transformer:
        reason = _why_not_layer(layer, like)
        if reason:
            return f"transformer block: {reason}"
    return ""


def _why_not_layer(layer: Any, like: Tensor) -> str:
    attention, mlp = layer.attn, layer.mlp
    reason = not_plain(layer, Block, "it") or not_plain(attention, Attention, "attn") or not_plain(mlp, Mlp, "mlp")
    if reason:
        return reason
    if attention.gate is not None:
        return "attn has a gate"
    return (
        not_linear(attention.qkv, like, "attn.qkv")
        or not_plain(attention.q_norm, nn.Identity, "attn.q_norm")
        or not_plain(attention.k_norm, nn.Identity, "attn.k_norm")
        or not_plain(attention.norm, nn.Identity, "attn.norm")
        or not_plain(attention.attn_drop, nn.Dropout, "attn.attn_drop")
        or not_linear(attention.proj, like, "attn.proj")
        or not_plain(attention.proj_drop, nn.Dropout, "attn.proj_drop")
        or not_plain(layer.ls1, nn.Identity, "ls1")
        or not_plain(layer.ls2, nn.Identity, "ls2")
        or _not_drop_path(layer.drop_path1, "drop_path1")
        or _not_drop_path(layer.drop_path2, "drop_path2")
        or not_layer_norm(layer.norm1, attention.qkv.in_features, "norm1")
        or not_layer_norm(layer.norm2, mlp.fc1.in_features, "norm2")
        or not_linear(mlp.fc1, like, "mlp.fc1")
        or not_elementwise(mlp.act, "mlp.act")
        or not_plain(mlp.drop1, nn.Dropout, "mlp.drop1")
        or not_plain(mlp.norm, nn.Identity, "mlp.norm")
        or not_linear(mlp.fc2, like, "mlp.fc2")
        or not_plain(mlp.drop2, nn.Dropout, "mlp.drop2")
    )


def _not_drop_path(module: Any, what: str) -> str:
    return not_plain(module, nn.Identity if type(module) is nn.Identity else DropPath, what)


def _why_not_now(block: Any) -> str:
    """Why the fused form cannot run in the current mode. Drop path drops each group of pixels separately here."""
    for layer in block.transformer:
        reason = drops_attention(layer.attn, layer.attn.attn_drop)
        reason = reason or drops_path(layer.drop_path1) or drops_path(layer.drop_path2)
        if reason:
            return f"transformer block: {reason}"
    return ""


class SwappedMobileVitBlock(Swapped):
    """A ``MobileVitBlock`` whose transformer runs on the map with the fused attention, without unfold and fold."""

    def mvk_sizes(self: Any) -> tuple[int, int] | None:
        """The last convolution's channels, if the first one keeps the sides."""
        last: Any = self.conv_proj if self.conv_fusion is None else self.conv_fusion
        return (last.conv.out_channels, 1) if self.conv_kxk.conv.stride == (1, 1) else None

    def mvk_plan(self: Any, keep: Keep) -> Run | None:
        """On packed weights."""
        reason, layers = _examine(self)
        projection, fusion = self.conv_proj, self.conv_fusion
        if reason or projection.aa is not None:
            return None
        plain = fusion is not None and not not_own(fusion, ConvNormAct) and fusion.aa is None
        fused = _part(fusion) if plain else None
        around = (self.conv_kxk, self.conv_1x1, layers, self.norm, _part(projection), fusion, fused)
        return packed.plan(self, keep, *around, self.patch_size)

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x (B, C, H, W) -> (B, C_out, H / stride, W / stride)."""
        layers = layers_for_call(self, x, bool(args or kwargs), _WATCHED, _examine)
        if layers is None:
            return MobileVitBlock.forward(self, x, *args, **kwargs)

        projection: Any = self.conv_proj
        y = transform(
            self.conv_kxk(x), self.conv_1x1, layers, self.norm, projection.conv, self.patch_size, self.mvk_backend
        )
        y = projection.bn(y)
        if projection.aa is not None:
            y = projection.aa(y)
        if self.conv_fusion is not None:
            y = self.conv_fusion(torch.cat((x, y), dim=1))
        return y


def _part(module: Any) -> Part:
    return module.conv, module.bn, after(module.bn)


def _examine(block: Any) -> tuple[str, list[dict[str, Any]]]:
    reason = asked(why_not, block) or _why_not_now(block)
    return reason, [] if reason else [_layer(layer) for layer in block.transformer]


def _layer(layer: Any) -> dict[str, Any]:
    attention, mlp = layer.attn, layer.mlp
    return {
        "norm1": layer.norm1,
        "qkv": attention.qkv,
        "proj": attention.proj,
        "norm2": layer.norm2,
        "fc1": mlp.fc1,
        "activation": mlp.act,
        "fc2": mlp.fc2,
        "heads": attention.num_heads,
        # Where timm calls scaled_dot_product_attention it does not use its own scale.
        "scale": None if attention.fused_attn else attention.scale,
        "proj_dropout": attention.proj_drop,
        "hidden_dropout": mlp.drop1,
        "out_dropout": mlp.drop2,
    }


SWAPPED = SwappedMobileVitBlock
