"""``SanaMultiscaleLinearAttention`` of DC-AE (``AutoencoderDC``) in diffusers.

Its ``to_q``, ``to_k`` and ``to_v`` are the three thirds of one projection. Their outputs are concatenated, and then
split into [q | k | v] of each head. So with three heads the output of ``to_q`` is query, key and value of the first.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_processor import (
    SanaMultiscaleAttentionProjection,
    SanaMultiscaleAttnProcessor2_0,
    SanaMultiscaleLinearAttention,
)
from torch import Tensor, nn

from mvkernels.nn import pointwise_to_channels_last
from mvkernels.nn.efficientvit import aggregate_and_attend
from mvkernels.swap.eligibility import (
    asked,
    class_name,
    log_once,
    not_its_own,
    not_linear,
    not_number,
    not_plain,
    replaced,
    unusual_call,
)
from mvkernels.swap.lite_mla import not_scale
from mvkernels.swap.packing import layers
from mvkernels.swap.packing.plans import Keep, Run
from mvkernels.swap.packing.rms_norm import norm_of_map
from mvkernels.swap.swapped import Swapped

_METHODS = ("forward", "apply_linear_attention", "apply_quadratic_attention")


def why_not(module: Any) -> str:
    """Why the fused form cannot replace this attention in its current state; empty if it can."""
    processor, like = module.processor, module.to_q.weight
    if type(processor) is not SanaMultiscaleAttnProcessor2_0:
        return f"its processor is a {class_name(type(processor))}, want a SanaMultiscaleAttnProcessor2_0"
    reason = (
        replaced(SanaMultiscaleLinearAttention, *_METHODS)
        or replaced(SanaMultiscaleAttnProcessor2_0, "__call__")
        or not_its_own(module, *_METHODS)
        or not_number(module.eps, "eps")
        or not_plain(module.nonlinearity, nn.ReLU, "nonlinearity")
    )
    for name in ("to_q", "to_k", "to_v", "to_out"):
        linear = getattr(module, name)
        reason = reason or not_linear(linear, like, name)
        if not reason and linear.bias is not None:
            reason = f"{name} has a bias"
    if reason:
        return reason
    inner = module.to_q.out_features
    if not inner == module.to_k.out_features == module.to_v.out_features or inner % module.attention_head_dim:
        head_dim = module.attention_head_dim
        return f"to_q, to_k and to_v do not have equal outputs that split into heads of {head_dim} channels"
    for scale in module.to_qkv_multiscale:
        reason = not_plain(scale, SanaMultiscaleAttentionProjection, "to_qkv_multiscale") or not_scale(
            scale.proj_in, scale.proj_out, 3 * inner, module.attention_head_dim, "to_qkv_multiscale"
        )
        if reason:
            return reason
    return ""


class SwappedSanaMultiscaleLinearAttention(Swapped):
    """A ``SanaMultiscaleLinearAttention`` that calls :func:`mvkernels.multiscale_linear_attention`."""

    mvk_methods = ("_conv_forward", "__call__", *_METHODS)
    mvk_helpers = (SanaMultiscaleAttnProcessor2_0,)

    def mvk_sizes(self: Any) -> tuple[int, int]:
        """The map keeps its sides."""
        return self.to_out.out_features, 1

    def mvk_plan(self: Any, keep: Keep) -> Run | None:
        """On packed weights: the three projections are one product, and the last one has a batch norm in it."""
        if asked(why_not, self) or layers.not_linear(self.to_out) or layers.not_linear(self.to_q):
            return None
        norm = norm_of_map(self.norm_out) if self.norm_type == "rms_norm" else None
        if norm is None and not layers.resting_norm(self.norm_out, self.to_out.out_features):
            return None
        into = layers.joined((self.to_q, self.to_k, self.to_v), keep)
        out = layers.linear(self.to_out, keep, after=self.norm_out if norm is None else None)
        scales, adds = [(scale.proj_in, scale.proj_out) for scale in self.to_qkv_multiscale], self.residual_connection
        settings = (scales, self.attention_head_dim, self.eps, self.mvk_backend)

        def run(x: Tensor) -> Tensor:
            attended, residual = aggregate_and_attend(into(x), *settings), x if adds else None
            return out(attended, residual) if norm is None else norm(out(attended), residual)

        return run

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(B, C, H, W) -> (B, C_out, H, W)."""
        reason = "the call has other arguments than the map" if args or kwargs else unusual_call(hidden_states)
        reason = reason or asked(why_not, self)
        if reason:
            log_once(self, reason)
            return SanaMultiscaleLinearAttention.forward(self, hidden_states, *args, **kwargs)
        out = aggregate_and_attend(
            self._qkv(hidden_states),
            [(scale.proj_in, scale.proj_out) for scale in self.to_qkv_multiscale],
            self.attention_head_dim,
            self.eps,
            self.mvk_backend,
        )
        y = self.to_out(out.to(hidden_states.dtype).movedim(1, -1))
        over_channels = self.norm_type == "rms_norm"
        y = self.norm_out(y).movedim(-1, 1) if over_channels else self.norm_out(y.movedim(-1, 1))
        return y + hidden_states if self.residual_connection else y

    def _qkv(self: Any, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, 3 C_inner, H, W), in channels-last memory."""
        weights = [linear.weight[:, :, None, None] for linear in (self.to_q, self.to_k, self.to_v)]
        # The smaller is concatenated: the weights, or for a small map the results.
        if x.shape[0] * x.shape[2] * x.shape[3] >= x.shape[1]:
            packed = pointwise_to_channels_last(x, torch.cat(weights))
        else:
            packed = torch.cat([pointwise_to_channels_last(x, weight) for weight in weights], dim=-1)
        return packed.permute(0, 3, 1, 2)


SWAPPED = SwappedSanaMultiscaleLinearAttention
