"""diffusers: the blocks of DC-AE, and the feed-forward network that Sana has too, on packed weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.autoencoders import autoencoder_dc
from diffusers.models.normalization import RMSNorm
from diffusers.models.transformers.sana_transformer import GLUMBConv
from torch import Tensor, nn
from torch.nn.functional import interpolate, pixel_shuffle, pixel_unshuffle

from mvkernels.ops import conv3x3
from mvkernels.swap.eligibility import class_of
from mvkernels.swap.folding import elementwise
from mvkernels.swap.packing import layers
from mvkernels.swap.packing.chain import Chain
from mvkernels.swap.packing.kinds import ROWS, SAME
from mvkernels.swap.packing.plans import Keep, Run
from mvkernels.swap.packing.rms_norm import norm_of, norm_of_map
from mvkernels.swap.swapped import Swapped


class PackingRMSNorm(Swapped):
    """An ``RMSNorm`` in fewer passes. It has nothing to pack."""

    mvk_axes = None

    @staticmethod
    def mvk_why_not(module: Any) -> str:
        """Always empty: nothing in it could be otherwise."""
        return ""

    def mvk_sizes(self: Any) -> tuple[int, int]:
        """Rows as they were."""
        return SAME, ROWS

    def mvk_plan(self: Any, keep: Keep) -> Run | None:
        """Of any tokens."""
        return norm_of(self)


class PackingResBlock(Swapped):
    """A ``ResBlock``: two convolutions with the activation, a batch norm and the sum in them."""

    @staticmethod
    def mvk_why_not(block: Any) -> str:
        """Why there is no op for its convolutions; empty if there is."""
        if any(layers.of_convolution(conv) != "conv3x3" for conv in (block.conv1, block.conv2)):
            return "its convolutions are others"
        if elementwise.activation_of((block.nonlinearity,)) is None:
            return "its activation is not known"
        known = (RMSNorm,) if block.norm_type == "rms_norm" else (nn.BatchNorm2d,)
        return "" if class_of(block.norm) in known else "its norm is not known"

    def mvk_sizes(self: Any) -> tuple[int, int]:
        """The map keeps its sides."""
        return self.conv2.out_channels, 1

    def mvk_plan(self: Any, keep: Keep) -> Run | None:
        """An RMS norm after both."""
        rms = self.norm_type == "rms_norm"
        first = layers.convolution((self.conv1, None, (self.nonlinearity,)), keep)
        second = layers.convolution((self.conv2, None if rms else self.norm, ()), keep)
        norm = norm_of_map(self.norm) if rms else None
        if first is None or second is None or (rms and norm is None):
            return None
        if norm is None:
            return lambda x: second(first(x), residual=x)
        return lambda x: norm(second(first(x)), x)


class PackingGLUMBConv(Swapped):
    """A ``GLUMBConv`` in two kernels, with its gate between them."""

    @staticmethod
    def mvk_why_not(block: Any) -> str:
        """Why it is more than an inverted residual with a gate; empty if it is not."""
        kinds = [layers.of_convolution(conv) for conv in (block.conv_inverted, block.conv_depth, block.conv_point)]
        known = kinds == ["pointwise", "depthwise", "pointwise"] and block.norm_type in (None, "rms_norm")
        return "" if known and elementwise.activation_of((block.nonlinearity,)) is not None else "it is another block"

    def mvk_sizes(self: Any) -> tuple[int, int]:
        """The map keeps its sides."""
        return self.conv_point.out_channels, 1

    def mvk_plan(self: Any, keep: Keep) -> Run | None:
        """The activation of the gate as a module."""
        activation, adds = self.nonlinearity, self.residual_connection
        hidden = layers.hidden_map((self.conv_inverted, None, (activation,)), (self.conv_depth, None, ()), keep)
        narrow = layers.multiplication(self.conv_point, keep)
        norm = norm_of_map(self.norm) if self.norm_type == "rms_norm" else None
        if hidden is None or narrow is None or (norm is None and self.norm_type == "rms_norm"):
            return None

        def run(x: Tensor) -> Tensor:
            y, gate = hidden(x).chunk(2, 1)
            y = activation(gate).mul_(y)
            residual = x if adds else None
            return narrow(y, residual) if norm is None else norm(narrow(y), residual)

        return run


class PackingEfficientViTBlock(Chain):
    """DC-AE's attention and what follows it."""

    @staticmethod
    def mvk_chain(module: Any) -> Sequence[Any]:
        """The two parts."""
        return module.attn, module.conv_out


class PackingDCDownBlock2d(Swapped):
    """A ``DCDownBlock2d`` with a strided convolution, which does the work of its shortcut as well."""

    @staticmethod
    def mvk_why_not(block: Any) -> str:
        """Why its convolution cannot; empty if it can."""
        conv = block.conv
        if block.downsample or not block.shortcut or layers.of_convolution(conv) != "conv3x3":
            return "it has no strided convolution with a shortcut"
        fits = conv.stride == (2, 2) and block.factor == 2
        fits = fits and block.group_size * conv.out_channels == 4 * conv.in_channels
        return "" if fits else "its shortcut has other channels"

    def mvk_sizes(self: Any) -> tuple[int, int]:
        """Half the sides."""
        return self.conv.out_channels, 2

    def mvk_plan(self: Any, keep: Keep) -> Run | None:
        """The shortcut's means are sums of pixels that the convolution sees: those at and after its middle."""
        conv, group = self.conv, self.group_size
        if self.mvk_why_not(self) or layers.resting(conv, None, ()) is None:
            return None
        inputs, outputs = conv.in_channels, conv.out_channels
        # Channel c of the map and pixel (i, j) of two by two are channel 4 c + 2 i + j of the unshuffled map.
        means = torch.eye(outputs).repeat_interleave(group, 1).unflatten(1, (inputs, 2, 2)) / group
        weight = conv.weight + nn.functional.pad(means, (1, 0, 1, 0))
        weights = keep(conv3x3.operators.pack(weight, conv.bias, 0))

        def run(x: Tensor) -> Tensor:
            if x.shape[2] % 2 or x.shape[3] % 2:
                pixel_unshuffle(x, 2)  # which says why this cannot be
            return conv3x3.operators.forward(x, None, weights, outputs, 0, 2, 0, None)

        return run


class PackingDCUpBlock2d(Swapped):
    """A ``DCUpBlock2d`` whose convolution adds the shortcut."""

    mvk_calls = ("conv",)  # by itself it has an operator in graphs of torch.compile, where this block has none

    @staticmethod
    def mvk_why_not(block: Any) -> str:
        """Why it has no shortcut, or no op for its convolution; empty if it has."""
        known = block.shortcut and block.factor == 2 and layers.of_convolution(block.conv) == "conv3x3"
        return "" if known else "there is nothing to add, or no op for it"

    def mvk_plan(self: Any, keep: Keep) -> Run | None:
        """The shortcut is added before the pixels are shuffled, or is the map that is convolved where that is so."""
        convolve = layers.convolution((self.conv, None, ()), keep)
        if convolve is None:
            return None
        repeats, mode = self.repeats, self.interpolation_mode

        def repeated(x: Tensor) -> Tensor:
            return x.permute(0, 2, 3, 1).repeat_interleave(repeats, -1).permute(0, 3, 1, 2)

        def interpolated(x: Tensor) -> Tensor:
            wide = interpolate(x, scale_factor=2, mode=mode)
            alike = repeats == 4 and mode == "nearest"
            return convolve(wide, residual=wide if alike else pixel_shuffle(repeated(x), 2))

        return interpolated if self.interpolate else lambda x: pixel_shuffle(convolve(x, residual=repeated(x)), 2)


FORMS = {
    RMSNorm: PackingRMSNorm,
    GLUMBConv: PackingGLUMBConv,
    autoencoder_dc.ResBlock: PackingResBlock,
    autoencoder_dc.DCDownBlock2d: PackingDCDownBlock2d,
    autoencoder_dc.DCUpBlock2d: PackingDCUpBlock2d,
    autoencoder_dc.EfficientViTBlock: PackingEfficientViTBlock,
}
"""The packing form of each class."""
