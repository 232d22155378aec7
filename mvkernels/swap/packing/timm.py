"""timm: blocks that are one op on packed weights."""

from __future__ import annotations

from typing import Any

from timm.layers import ConvNormAct, DropPath
from timm.models import byobnet, efficientvit_mit
from torch import nn

from mvkernels.swap.eligibility import not_plain
from mvkernels.swap.folding.timm import after, part_of_efficientvit
from mvkernels.swap.packing.blocks import InvertedResidual, not_own
from mvkernels.swap.packing.layers import Part


class PackingBottleneckBlock(InvertedResidual):
    """A ``BottleneckBlock`` that is an inverted residual, as in MobileViT, in one kernel."""

    @staticmethod
    def mvk_parts(block: Any) -> list[Part]:
        """Empty if it is more than an inverted residual."""
        return _of_bottleneck(block)

    @staticmethod
    def mvk_adds(block: Any) -> bool:
        """Where it has a shortcut."""
        return block.shortcut is not None

    def mvk_sizes(self: Any) -> tuple[int, int]:
        """Of the last two convolutions."""
        return self.conv3_1x1.conv.out_channels, self.conv2_kxk.conv.stride[0]


class PackingMBConv(InvertedResidual):
    """EfficientViT's ``MBConv`` in one kernel."""

    @staticmethod
    def mvk_parts(block: Any) -> list[Part]:
        """Empty if a part is more than a convolution with a norm and an activation."""
        return of_efficientvit(block.inverted_conv, block.depth_conv, block.point_conv)

    def mvk_sizes(self: Any) -> tuple[int, int]:
        """Of the last two convolutions."""
        return self.point_conv.conv.out_channels, self.depth_conv.conv.stride[0]


class PackingDSConv(InvertedResidual):
    """EfficientViT's ``DSConv`` in one kernel."""

    @staticmethod
    def mvk_parts(block: Any) -> list[Part]:
        """Empty if a part is more than a convolution with a norm and an activation."""
        return of_efficientvit(block.depth_conv, block.point_conv)

    mvk_sizes = PackingMBConv.mvk_sizes


def _of_bottleneck(block: Any) -> list[Part]:
    """The parts of a block that is those of an inverted residual and nothing else; empty if it is more."""
    identities = [block.conv2b_kxk, block.attn, block.attn_last, block.act]
    if block.shortcut is not None:
        identities.append(block.shortcut)
    if any(not_plain(part, nn.Identity, "it") for part in identities):
        return []
    path = block.drop_path
    if not_plain(path, type(path) if type(path) in (nn.Identity, DropPath) else nn.Identity, "it") or path.training:
        return []
    parts = [block.conv1_1x1, block.conv2_kxk, block.conv3_1x1]
    if any(not_own(part, ConvNormAct) or part.aa is not None for part in parts):
        return []
    return [(part.conv, part.bn, after(part.bn)) for part in parts]


def of_efficientvit(*parts: Any) -> list[Part]:
    """What EfficientViT's ``ConvNormAct`` modules are made of; empty if one is more than that now."""
    if any(not_own(part, efficientvit_mit.ConvNormAct) for part in parts):
        return []
    found = [part_of_efficientvit(part) for part in parts]
    return [part for part in found if part is not None] if None not in found else []


FORMS = {
    byobnet.BottleneckBlock: PackingBottleneckBlock,
    efficientvit_mit.MBConv: PackingMBConv,
    efficientvit_mit.DSConv: PackingDSConv,
}
"""The packing form of each class."""
