"""torchvision: Swin's blocks on packed weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torchvision.models.swin_transformer import SwinTransformerBlock
from torchvision.ops import StochasticDepth
from torchvision.ops.misc import MLP

from mvkernels.swap.eligibility import class_of
from mvkernels.swap.packing.blocks import not_own
from mvkernels.swap.packing.layers import Part
from mvkernels.swap.packing.products import Products, ScaledBlock, active


class PackingMLP(Products):
    """An ``MLP`` of Linears with activations."""

    @staticmethod
    def mvk_products(module: Any) -> Sequence[Part]:
        """Empty if there is something else before the first."""
        parts: list[Part] = []
        for part in module:
            if class_of(part) is nn.Linear:
                parts.append((part, None, ()))
            elif not parts:
                return ()
            else:
                layer, norm, then = parts[-1]
                parts[-1] = (layer, norm, (*then, part))
        return parts

    @staticmethod
    def mvk_last(module: Any) -> Any:
        """The layer of its last product."""
        return [part for part in module if isinstance(part, nn.Linear)][-1]


class PackingSwinTransformerBlock(ScaledBlock):
    """A ``SwinTransformerBlock``, which normalises before its MLP; that of Swin V2 does so after it."""

    mvk_axes = 4
    mvk_mixer = "attn"
    mvk_calls = ("norm1", "attn", "norm2")

    @staticmethod
    def mvk_products(block: Any) -> Sequence[Part]:
        """Empty if its MLP is another."""
        return () if not_own(block.mlp, MLP) else PackingMLP.mvk_products(block.mlp)

    @staticmethod
    def mvk_scale(block: Any, i: int) -> None:
        """None: such blocks have no layer scales."""

    @staticmethod
    def mvk_paths(block: Any) -> str:
        """Why its stochastic depth is at work; empty if it is not."""
        return active(block.stochastic_depth, StochasticDepth)

    @staticmethod
    def mvk_last(block: Any) -> Any:
        """The layer of its last product."""
        return PackingMLP.mvk_last(block.mlp)


FORMS = {MLP: PackingMLP, SwinTransformerBlock: PackingSwinTransformerBlock}
"""The packing form of each class."""
