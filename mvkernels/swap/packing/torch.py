"""PyTorch's own Linears and convolutions, where their callers call them as modules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear

from mvkernels.swap.packing import layers
from mvkernels.swap.packing.kinds import of_convolution, sizes_of
from mvkernels.swap.packing.plans import Keep, Run
from mvkernels.swap.swapped import Swapped


class PackingLinear(Swapped):
    """A ``Linear`` whose tokens are the pixels of :func:`mvkernels.pointwise`."""

    mvk_axes = None

    @staticmethod
    def mvk_why_not(module: Any) -> str:
        """Why such a module cannot have packed weights; empty if it can."""
        return layers.not_linear(module)

    def mvk_sizes(self: Any) -> tuple[int, int]:
        """Rows of its features."""
        return sizes_of(self)

    def mvk_plan(self: Any, keep: Keep) -> Run | None:
        """On packed weights."""
        product = layers.multiplication(self, keep)
        if product is None:
            return None
        inputs, weight, bias = self.weight.shape[1], self.weight, self.bias
        # PyTorch has the words for what does not fit.
        return lambda x: product(x) if x.shape[-1] == inputs else linear(x, weight, bias)


class PackingConv2d(Swapped):
    """A ``Conv2d`` without a norm, as :func:`mvkernels.pointwise` or :func:`mvkernels.conv3x3`, on channels-last maps.

    Others would have to be laid out anew twice, since code may rely on the layout of what it gets.
    """

    mvk_any_layout = False

    @staticmethod
    def mvk_why_not(module: Any) -> str:
        """Why such a module cannot have packed weights; empty if it can."""
        return "" if of_convolution(module) in ("pointwise", "conv3x3") else "there is no op for it"

    def mvk_sizes(self: Any) -> tuple[int, int]:
        """Its own."""
        return sizes_of(self)

    def mvk_plan(self: Any, keep: Keep) -> Run | None:
        """On packed weights."""
        convolve = layers.convolution((self, None, ()), keep)
        if convolve is None:
            return None
        inputs, any_layout = self.in_channels, self.mvk_any_layout
        weight, bias, stride, padding = self.weight, self.bias, self.stride, self.padding

        def run(x: Tensor) -> Tensor:
            laid = any_layout or (x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous())
            if x.shape[1] == inputs and laid:
                return convolve(x)
            return conv2d(x, weight, bias, stride, padding)

        return run


_ANY_LAYOUT = (
    "timm",
    "mvmodels",
    "diffusers.models.autoencoders.autoencoder_dc",
    "transformers.models.poolformer.modeling_poolformer",
)
"""Packages and files that take maps in any layout."""


class PackingConv2dAnyLayout(PackingConv2d):
    """A ``Conv2d`` in a model of timm or mvmodels, in DC-AE or transformers' PoolFormer, which so get channels-last
    maps."""

    mvk_any_layout = True


def form(module: nn.Module, caller: str) -> type[Swapped]:
    """The packing form of a Linear or a convolution that is called by code of this file."""
    if type(module) is nn.Linear:
        return PackingLinear
    return PackingConv2dAnyLayout if not {caller, caller.partition(".")[0]}.isdisjoint(_ANY_LAYOUT) else PackingConv2d
