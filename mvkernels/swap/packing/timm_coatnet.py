"""timm: the transformer block of CoAtNet on packed weights."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import ConvMlp, DropPath, LayerNorm2d, LayerScale2d
from timm.models import maxxvit
from torch import Tensor, nn

from mvkernels.ops.patch_attention import patch_attention
from mvkernels.swap.eligibility import class_of, drops_attention, not_hooked, not_its_own, not_plain
from mvkernels.swap.families import timm_coatnet
from mvkernels.swap.folding import elementwise
from mvkernels.swap.packing import layers
from mvkernels.swap.packing.blocks import not_own
from mvkernels.swap.packing.kinds import stride_of_pool
from mvkernels.swap.packing.plans import Keep, Run
from mvkernels.swap.packing.products import active, not_products
from mvkernels.swap.packing.timm_blocks import PackingConvMlp, factors_of
from mvkernels.swap.swapped import Swapped
from mvkernels.swap.timm_parts import bias_of, qkv_of, scale_of


class PackingTransformerBlock2d(Swapped):
    """A ``TransformerBlock2d``: its LayerNorms before, and its scales and sums after products are in these."""

    mvk_calls = ("shortcut", "norm1")
    mvk_methods = ("get_bias",)

    @staticmethod
    def mvk_why_not(block: Any) -> str:
        """Why it has more in it than attention and two products; empty if it has not."""
        attention = block.attn
        parts = (attention.qkv, None, ()), (attention.proj, None, (attention.proj_drop,))
        return (
            ("" if isinstance(attention, Swapped) else "its attention is not swapped")
            or not_own(attention, maxxvit.Attention2d)
            or timm_coatnet.why_not(attention)
            or not_products(parts)
            or not_own(block.mlp, ConvMlp)
            or not_products(PackingConvMlp.mvk_products(block.mlp))
            or _not_norm(block.norm2, block.mlp.fc1.in_channels)
            or _not_scale(block.ls1)
            or _not_scale(block.ls2)
        )

    def mvk_sizes(self: Any) -> tuple[int, int] | None:
        """Where nothing but a pool before the attention makes the map smaller."""
        stride = 1 if class_of(self.shortcut) is nn.Identity else stride_of_pool(self.norm1.down.pool)
        return None if stride is None else (self.attn.proj.out_channels, stride)

    def mvk_plan(self: Any, keep: Keep) -> Run | None:
        """Two sums. A first norm that makes the map smaller is called as a module, and so is the shortcut."""
        attention, norm1, shortcut = self.attn, self.norm1, self.shortcut
        if (
            self.mvk_why_not(self)
            or active(self.drop_path1, DropPath)
            or active(self.drop_path2, DropPath)
            or drops_attention(attention, attention.attn_drop)
            or elementwise.activation_of((attention.proj_drop,)) is None
        ):
            return None
        inside = not _not_norm(norm1, attention.qkv.in_channels)
        into = layers.multiplication(attention.qkv, keep, norm=norm1 if inside else None)
        out = layers.multiplication(attention.proj, keep, scale=_scale(self.ls1))
        first, last = PackingConvMlp.mvk_products(self.mlp)
        widen = layers.multiplication(first[0], keep, first[2], self.norm2, first[1])
        narrow = layers.multiplication(last[0], keep, last[2], scale=_scale(self.ls2))
        position = attention.rel_pos
        if into is None or out is None or widen is None or narrow is None or _changes(position):
            return None
        bias = bias_of(position, torch.float32)
        bias = bias if bias is None else keep(bias.contiguous())
        pixels = None if position is None else position.window_area
        heads, heads_first = attention.num_heads, attention.head_first
        settings: Any = {"scale": scale_of(attention), "backend": attention.mvk_backend}

        def run(x: Tensor) -> Tensor:
            residual = shortcut(x)
            normed = x if inside else norm1(x)
            if pixels not in (None, normed.shape[2] * normed.shape[3]):
                raise RuntimeError(f"its biases are for {pixels} pixels")
            query, key, value = qkv_of(into(normed), heads, heads_first)
            attended = patch_attention(query, key, value, 1, bias=bias, **settings)
            x = out(attended.flatten(1, 2), residual)
            return narrow(widen(x), x)

        return run


def _not_norm(norm: Any, channels: int) -> str:
    """Why it is no LayerNorm over the channels of a map; empty if it is."""
    reason = not_own(norm, LayerNorm2d)
    if not reason and norm.normalized_shape != (channels,):
        reason = f"the norm is over {norm.normalized_shape}"
    return reason or layers.not_single(norm.weight, norm.bias)


def _not_scale(scale: Any) -> str:
    """Why it is neither a scale of the channels nor nothing; empty if it is."""
    if class_of(scale) is nn.Identity:
        return not_plain(scale, nn.Identity, "the scale")
    factors = factors_of(scale, LayerScale2d)
    return factors if isinstance(factors, str) else layers.not_single(factors)


def _scale(scale: Any) -> Tensor | None:
    return None if class_of(scale) is nn.Identity else scale.gamma


def _changes(position: Any) -> str:
    """Why biases are other ones in the next call; empty if they are not."""
    if position is None:
        return ""
    # What makes the biases is called once: hooks of it want to see every call.
    hooked = next(filter(None, (not_hooked(part, "a part of it") for part in position.modules())), "")
    reason = not_its_own(position, "get_bias") or hooked
    return reason or ("it may drop biases" if any(m.training for m in position.modules()) else "")


FORMS = {maxxvit.TransformerBlock2d: PackingTransformerBlock2d}
"""The packing form of the class."""
