"""Mobile-Former and CoAtNet of this library, on packed weights.

Of mvmodels, which is on top of this package, the classes are known by their names and those of their parts are found
where the module in question has its own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import hardswish, linear, relu, silu

from mvkernels.nn.layers import DropPath, DynamicReLU
from mvkernels.ops import inverted_residual
from mvkernels.ops.common.activations import CODES
from mvkernels.swap.eligibility import class_of, not_plain
from mvkernels.swap.packing import layers
from mvkernels.swap.packing.blocks import not_own
from mvkernels.swap.packing.layers import Convolve, Part
from mvkernels.swap.packing.plans import Keep, Run
from mvkernels.swap.packing.products import active
from mvkernels.swap.packing.squeezed import Squeeze, squeezed
from mvkernels.swap.swapped import Swapped

# What the modules call as functions.
_RELU6, _GELU, _HARDSWISH = nn.ReLU6(), nn.GELU(), nn.Hardswish()
_FEW = 48
"""Channels up to which an expansion that copies them, a product with zeros and ones, is faster than copying the map."""


class PackingMobile(Swapped):
    """``Mobile`` in one kernel."""

    mvk_beside = (2,)

    @staticmethod
    def mvk_why_not(module: Any) -> str:
        """Why it is more than an inverted residual; empty if it is one."""
        return "" if layers.inverted(_of_mobile(module)) else "its convolutions have groups"

    def mvk_sizes(self: Any) -> tuple[int, int]:
        """The last convolution's channels, the depthwise one's stride."""
        return self.conv3.out_channels, self.conv2.stride[0]

    def mvk_plan(self: Any, keep: Keep) -> Run | None:
        """With the slopes of both activations from the token."""
        of_token = _slopes((self.act1, None), (self.act2, None), keep=keep)
        if of_token is None or not_plain(self.shuffle, nn.Identity, "it") or active(self.drop_path, DropPath):
            return None
        run = layers.inverted_residual_of(_of_mobile(self), self.residual, keep)
        return None if run is None else lambda x, token: run(x, *of_token(token))


def _of_mobile(module: Any) -> list[Part]:
    return [(getattr(module, f"conv{i}"), getattr(module, f"norm{i}"), ()) for i in (1, 2, 3)]


class PackingDownsampleMobile(Swapped):
    """``DownsampleMobile``, each half in one kernel."""

    mvk_beside = (2,)

    @staticmethod
    def mvk_why_not(module: Any) -> str:
        """Why its halves are more than convolutions that widen and products; empty if they are not."""
        return not_halves(module.conv1, module.conv2) or not_halves(module.conv3, module.conv4)

    def mvk_sizes(self: Any) -> tuple[int, int]:
        """The last convolution's channels, the first one's stride."""
        return self.conv4.out_channels, self.conv1.stride[0]

    def mvk_plan(self: Any, keep: Keep) -> Run | None:
        """The second half adds its input."""
        plain = [not_plain(part, nn.Identity, "it") for part in (self.shuffle1, self.shuffle3)]
        if any(plain) or active(self.drop_path, DropPath):
            return None
        first = widened((self.conv1, self.norm1, ()), (self.conv2, self.norm2, ()), False, keep)
        second = widened((self.conv3, self.norm3, ()), (self.conv4, self.norm4, ()), True, keep)
        if first is None or second is None:
            return None
        orders = [order_of(conv) for conv in (self.conv1, self.conv3)]
        of_token = _slopes((self.act1, orders[0]), (self.act3, orders[1]), keep=keep)
        if of_token is None:
            return None

        def run(x: Tensor, token: Tensor) -> Tensor:
            before, after = of_token(token)
            out: Tensor = second(first(x, before), after)
            return out

        return run


class PackingFirstBlock(Swapped):
    """Mobile-Former's ``FirstBlock`` in one kernel."""

    mvk_beside = (3,)

    @staticmethod
    def mvk_why_not(module: Any) -> str:
        """Why it is more than a convolution that widens and a product; empty if it is not."""
        return not_halves(module.conv1, module.conv2)

    def mvk_plan(self: Any, keep: Keep) -> Run | None:
        """The tokens pass by."""
        if not_plain(self.shuffle, nn.Identity, "it"):
            return None
        run = widened((self.conv1, self.norm1, (_RELU6,)), (self.conv2, self.norm2, ()), self.residual, keep)
        return None if run is None else lambda x, tokens: (run(x), tokens)


class PackingStem(Swapped):
    """Mobile-Former's ``Stem``."""

    @staticmethod
    def mvk_why_not(module: Any) -> str:
        """Why there is no op for it; empty if there is."""
        return "" if layers.of_convolution(module.conv) == "conv3x3" else "there is no op for it"

    def mvk_sizes(self: Any) -> tuple[int, int]:
        """Those of the convolution."""
        return self.conv.out_channels, self.conv.stride[0]

    def mvk_plan(self: Any, keep: Keep) -> Run | None:
        """On packed weights."""
        return layers.convolution((self.conv, self.norm, (_RELU6,)), keep)


class PackingHead(Swapped):
    """Mobile-Former's ``Head``."""

    mvk_beside = (2,)
    mvk_calls = ("conv", "fc", "classifier")  # by themselves they have operators in graphs, where it makes no map

    @staticmethod
    def mvk_why_not(module: Any) -> str:
        """Why its convolution is no product; empty if it is."""
        return "" if layers.of_convolution(module.conv) == "pointwise" else "its convolution has groups"

    def mvk_plan(self: Any, keep: Keep) -> Run | None:
        """The convolution and both Linears on packed weights."""
        if not_plain(self.shuffle, nn.Identity, "it"):
            return None
        widen = layers.convolution((self.conv, self.norm, (_RELU6,)), keep)
        fc = layers.multiplication(self.fc, keep, (_HARDSWISH, self.dropout), None, self.fc_norm)
        classify = layers.multiplication(self.classifier, keep)
        if widen is None or fc is None or classify is None:
            return None

        def run(x: Tensor, token: Tensor) -> Tensor:
            pooled = hardswish(widen(x).mean((2, 3)))
            return classify(fc(torch.cat((pooled, token), 1)))

        return run


class PackingMBConv(Swapped):
    """CoAtNet's ``MBConv`` in two kernels."""

    mvk_calls = ("shortcut",)

    @staticmethod
    def mvk_why_not(block: Any) -> str:
        """Why its convolutions are not those of an inverted residual; empty if they are."""
        return "" if layers.inverted(_of_mbconv(block)) else "the first convolution has a stride"

    def mvk_sizes(self: Any) -> tuple[int, int]:
        """The last convolution's channels, the depthwise one's stride."""
        return self.conv3.out_channels, self.conv2.stride[0]

    def mvk_plan(self: Any, keep: Keep) -> Run | None:
        """The shortcut as a module."""
        squeeze = _of_squeeze(self.se)
        if squeeze is None or active(self.drop_path, DropPath):
            return None
        first, middle, last = _of_mbconv(self)
        branch, shortcut = squeezed(first, middle, squeeze, last, keep, self.pre_norm), self.shortcut
        if branch is None:
            return None

        def run(x: Tensor) -> Tensor:
            x = x.contiguous(memory_format=torch.channels_last)  # once for the branch and for the shortcut
            return branch(x, shortcut(x))

        return run


def _of_mbconv(block: Any) -> list[Part]:
    first, middle = ((getattr(block, f"conv{i}"), getattr(block, f"norm{i}"), (_GELU,)) for i in (1, 2))
    return [first, middle, (block.conv3, None, ())]


def _of_squeeze(se: Any) -> Squeeze | None:
    """CoAtNet's squeeze and excitation; None if it is something else."""
    kind = class_of(se)
    known = sys.modules["mvmodels.coatnet"].SqueezeExcite
    return None if kind is not known or not_own(se, kind) else (se.fc1, silu, se.fc2, torch.sigmoid)


def not_halves(depthwise: Any, project: Any) -> str:
    kinds = (layers.of_convolution(depthwise), layers.of_convolution(project))
    known = kinds[0] in ("depthwise", "widening") and kinds[1] == "pointwise"
    return "" if known else "its convolutions have groups"


def order_of(conv: Any) -> Tensor:
    """The channels that a convolution widens to in another order: the first that each input channel gives, then the
    second of each, and so on. In this order the widened map is the input's channels, repeated."""
    return torch.arange(conv.out_channels).view(conv.in_channels, -1).t().flatten()


def widened(depthwise: Part, project: Part, adds: bool, keep: Keep) -> Convolve | None:
    """``project(activation(depthwise(x)))`` of a map x, which is added if it ``adds``, and perhaps the slopes of a
    dynamic ReLU, in :func:`order_of`; None if the parts are not that, or cannot run on packed weights now.

    The operator's depthwise convolution has one input channel for each output channel. So an expansion copies the
    channels, or they are copied before.
    """
    conv, last = depthwise[0], project[0]
    activation = layers.resting(*depthwise)
    if not_halves(conv, last) or activation is None or layers.resting(*project) != 0:
        return None
    channels, hidden, order = conv.in_channels, conv.out_channels, order_of(conv)
    copies = hidden // channels
    expands = copies > 1 and channels < _FEW
    expand = torch.eye(channels).repeat(copies, 1)[..., None, None] if expands else None
    weight, bias = layers.folded(*depthwise[:2])
    narrow, end = layers.folded(*project[:2])
    bias = None if bias is None else bias[order]
    weights = keep(inverted_residual.operators.pack(expand, None, weight[order], bias, narrow[:, order], end))
    inside = adds and (expands or copies == 1)
    sizes = (hidden, last.out_channels, conv.kernel_size[0], expands)
    settings = (*sizes, conv.stride[0], activation, inside, CODES[None], None)

    def run(x: Tensor, slopes: Tensor | None = None) -> Tensor:
        wide = x
        if copies > 1 and not expands:
            pixels = x.permute(0, 2, 3, 1).unsqueeze(3)
            wide = pixels.expand(-1, -1, -1, copies, -1).flatten(3).permute(0, 3, 1, 2)
        out: Tensor = inverted_residual.operators.forward(wide, weights, *settings, slopes)
        return out + x if adds and not inside else out

    return run


def slopes(*linears: tuple[Any, Any, Tensor | None], keep: Keep) -> Callable[[Tensor], Sequence[Tensor]] | None:
    """The slopes (B, 2, C) of dynamic ReLUs for a token (B, token_dim): of each its two Linears, between which is a
    ReLU, and the order that its channels are wanted in; None if a Linear is not plain.

    a1 = 2 theta1 and a2 = 2 theta2 - 1, with theta = clamp(u + 3, 0, 6) / 6, are clamp(u / 3 + 1, 0, 2) and
    clamp(u / 3, -1, 1).
    """
    if any(layers.not_linear(fc) for *both, _ in linears for fc in both):
        return None
    first = [keep(torch.cat(each)) for each in zip(*(_weights(fc1) for fc1, _, _ in linears))]
    last = []
    for _, fc2, order in linears:
        weight, bias = (t.double().unflatten(0, (2, -1)) / 3 for t in _weights(fc2))
        bias[0] += 1
        if order is not None:
            weight, bias = weight[:, order], bias[:, order]
        last.append([keep(t.flatten(0, 1).float()) for t in (weight, bias)])
    widths = [fc1.weight.shape[0] for fc1, _, _ in linears]
    least, most = torch.tensor([[0.0], [-1.0]]), torch.tensor([[2.0], [1.0]])

    def run(token: Tensor) -> Sequence[Tensor]:
        parts = relu(linear(token, *first)).split(widths, 1)
        return [linear(part, *each).unflatten(1, (2, -1)).clamp(least, most) for part, each in zip(parts, last)]

    return run


def _slopes(*activations: tuple[Any, Tensor | None], keep: Keep) -> Callable[[Tensor], Sequence[Tensor]] | None:
    """:func:`slopes` of these modules, with the order of each."""
    if any(not_own(act, DynamicReLU) for act, _ in activations):
        return None
    return slopes(*((act.fc1, act.fc2, order) for act, order in activations), keep=keep)


def _weights(layer: Any) -> tuple[Tensor, Tensor]:
    return layer.weight, torch.zeros_like(layer.weight[:, 0]) if layer.bias is None else layer.bias


FORMS = {
    ("mvkernels.nn.mobile_former", "Mobile"): PackingMobile,
    ("mvkernels.nn.mobile_former", "DownsampleMobile"): PackingDownsampleMobile,
    ("mvmodels.mobile_former", "FirstBlock"): PackingFirstBlock,
    ("mvmodels.mobile_former", "Stem"): PackingStem,
    ("mvmodels.mobile_former", "Head"): PackingHead,
    ("mvmodels.coatnet", "MBConv"): PackingMBConv,
}
"""The packing form of each class."""
