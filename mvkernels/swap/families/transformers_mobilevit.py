"""The whole ``MobileViTLayer`` of MobileViT in transformers, including the stride-2 block at its beginning."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.mobilevit.modeling_mobilevit import (
    MobileViTAttention,
    MobileViTConvLayer,
    MobileViTIntermediate,
    MobileViTInvertedResidual,
    MobileViTLayer,
    MobileViTOutput,
    MobileViTSelfAttention,
    MobileViTSelfOutput,
    MobileViTTransformer,
    MobileViTTransformerLayer,
)

from mvkernels.swap.eligibility import (
    asked,
    drops_attention,
    not_elementwise,
    not_layer_norm,
    not_linear,
    not_plain,
    not_pointwise_conv,
    replaced,
)
from mvkernels.swap.folding.transformers import after
from mvkernels.swap.mobilevit import layers_for_call, transform
from mvkernels.swap.packing import mobilevit as packed
from mvkernels.swap.packing.blocks import not_own
from mvkernels.swap.packing.layers import Part
from mvkernels.swap.packing.plans import Keep, Run
from mvkernels.swap.swapped import Swapped

_WATCHED = ("conv_1x1", "transformer", "layernorm", "conv_projection")


def why_not(block: Any) -> str:
    """Why the fused block cannot replace this ``MobileViTLayer`` in its current state; empty if it can."""
    into, out, transformer = block.conv_1x1, block.conv_projection, block.transformer
    if not {"unfolding", "folding"}.isdisjoint(block.__dict__):
        return "it has a replaced unfolding or folding"
    reason = (
        replaced(MobileViTLayer, "forward", "unfolding", "folding")
        or not_plain(into, MobileViTConvLayer, "conv_1x1")
        or not_pointwise_conv(into.convolution, "conv_1x1.convolution")
        or not_plain(out, MobileViTConvLayer, "conv_projection")
        or not_pointwise_conv(out.convolution, "conv_projection.convolution")
        or not_plain(transformer, MobileViTTransformer, "transformer")
        or not_plain(transformer.layer, nn.ModuleList, "transformer.layer")
        or not_layer_norm(block.layernorm, into.convolution.out_channels, "layernorm")
    )
    if reason:
        return reason
    if into.normalization is not None or into.activation is not None:
        return "conv_1x1 has a normalization or an activation, want a convolution only"
    like = block.layernorm.weight
    for layer in transformer.layer:
        reason = _why_not_layer(layer, like)
        if reason:
            return f"transformer layer: {reason}"
    return ""


def _why_not_layer(layer: Any, like: Tensor) -> str:
    reason = (
        not_plain(layer, MobileViTTransformerLayer, "it")
        or not_plain(layer.attention, MobileViTAttention, "attention")
        or not_plain(layer.attention.attention, MobileViTSelfAttention, "attention.attention")
        or not_plain(layer.attention.output, MobileViTSelfOutput, "attention.output")
        or not_plain(layer.intermediate, MobileViTIntermediate, "intermediate")
        or not_plain(layer.output, MobileViTOutput, "output")
    )
    if reason:
        return reason
    attention, self_output = layer.attention.attention, layer.attention.output
    query, key, value = attention.query, attention.key, attention.value
    reason = (
        not_linear(query, like, "query")
        or not_linear(key, like, "key")
        or not_linear(value, like, "value")
        or not_plain(attention.dropout, nn.Dropout, "attention.dropout")
        or not_linear(self_output.dense, like, "attention.output.dense")
        or not_plain(self_output.dropout, nn.Dropout, "attention.output.dropout")
        or not_linear(layer.intermediate.dense, like, "intermediate.dense")
        or not_elementwise(layer.intermediate.intermediate_act_fn, "intermediate_act_fn")
        or not_linear(layer.output.dense, like, "output.dense")
        or not_plain(layer.output.dropout, nn.Dropout, "output.dropout")
        or not_layer_norm(layer.layernorm_before, query.in_features, "layernorm_before")
        or not_layer_norm(layer.layernorm_after, query.in_features, "layernorm_after")
    )
    if not reason and not (
        query.weight.shape == key.weight.shape == value.weight.shape
        and (query.bias is None) == (key.bias is None) == (value.bias is None)
    ):
        return "query, key and value differ in the shape of the weight or in having a bias"
    if not reason:
        self_attention = layer.attention.attention
        heads, size = self_attention.num_attention_heads, self_attention.attention_head_size
        if heads * size != query.out_features:
            return f"{heads} heads of {size} channels do not add up to the {query.out_features} outputs of query"
    return reason


class SwappedMobileViTLayer(Swapped):
    """A ``MobileViTLayer`` whose transformer runs on the map with the fused attention, without unfold and fold."""

    mvk_methods = ("_conv_forward", "unfolding", "folding")

    def mvk_sizes(self: Any) -> tuple[int, int] | None:
        """The fusion's channels, the stride of the block at the beginning."""
        down = self.downsampling_layer
        known = down is None or not not_own(down, MobileViTInvertedResidual)
        if self.conv_kxk.convolution.stride != (1, 1) or not known:
            return None
        return self.fusion.convolution.out_channels, 1 if down is None else down.conv_3x3.convolution.stride[0]

    def mvk_plan(self: Any, keep: Keep) -> Run | None:
        """On packed weights."""
        reason, layers = _examine(self)
        if reason:
            return None
        projection, fusion, downsampling = self.conv_projection, self.fusion, self.downsampling_layer
        fused = None if not_own(fusion, MobileViTConvLayer) else _part(fusion)
        around = (self.conv_kxk, self.conv_1x1.convolution, layers, self.layernorm, _part(projection), fusion, fused)
        run = packed.plan(self, keep, *around, (self.patch_height, self.patch_width))
        return run if run is None or downsampling is None else lambda features: run(downsampling(features))

    def forward(self: Any, features: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """features (B, C, H, W) -> (B, C_out, H / stride, W / stride)."""
        layers = layers_for_call(self, features, bool(args or kwargs), _WATCHED, _examine)
        if layers is None:
            return MobileViTLayer.forward(self, features, *args, **kwargs)

        if self.downsampling_layer is not None:
            features = self.downsampling_layer(features)
        residual = features
        projection = self.conv_projection
        features = transform(
            self.conv_kxk(features),
            self.conv_1x1.convolution,
            layers,
            self.layernorm,
            projection.convolution,
            (self.patch_height, self.patch_width),  # type: ignore[arg-type]
            self.mvk_backend,
        )
        if projection.normalization is not None:
            features = projection.normalization(features)
        if projection.activation is not None:
            features = projection.activation(features)
        return self.fusion(torch.cat((residual, features), dim=1))


def _part(layer: Any) -> Part:
    return layer.convolution, layer.normalization, after(layer)


def _examine(block: Any) -> tuple[str, list[dict[str, Any]]]:
    reason = asked(why_not, block)
    for layer in block.transformer.layer if not reason else ():
        attention = layer.attention.attention
        reason = reason or drops_attention(attention, attention.dropout)
    return reason, [] if reason else [_layer(layer) for layer in block.transformer.layer]


def _layer(layer: Any) -> dict[str, Any]:
    attention, self_output = layer.attention.attention, layer.attention.output
    return {
        "norm1": layer.layernorm_before,
        "qkv": (attention.query, attention.key, attention.value),
        "proj": self_output.dense,
        "norm2": layer.layernorm_after,
        "fc1": layer.intermediate.dense,
        "activation": layer.intermediate.intermediate_act_fn,
        "fc2": layer.output.dense,
        "heads": attention.num_attention_heads,
        "proj_dropout": self_output.dropout,
        "out_dropout": layer.output.dropout,
    }


SWAPPED = SwappedMobileViTLayer
