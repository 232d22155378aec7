"""timm: blocks that are one op on packed weights."""

from __future__ import annotations

from typing import Any

from timm.layers import ConvNormAct, DropPath
from timm.models import byobnet, efficientvit_mit
from torch import Tensor, nn

from mvkernels.swap.eligibility import not_plain
from mvkernels.swap.folding.timm import after
from mvkernels.swap.packing.blocks import InvertedResidual, Part, not_own


class PackingBottleneckBlock(InvertedResidual):
    """A ``BottleneckBlock`` that is an inverted residual, as in MobileViT, in one kernel."""

    @staticmethod
    def mvk_parts(block: Any) -> list[Part]:
        """Empty if it is more than an inverted residual."""
        return _of_bottleneck(block)

    def forward(self: Any, x: Tensor) -> Tensor:
        """As the original's."""
        out = self.mvk_fused(x, adds=self.shortcut is not None)
        return byobnet.BottleneckBlock.forward(self, x) if out is None else out


class PackingMBConv(InvertedResidual):
    """EfficientViT's ``MBConv`` in one kernel."""

    @staticmethod
    def mvk_parts(block: Any) -> list[Part]:
        """Empty if a part is more than a convolution with a norm and an activation."""
        return of_efficientvit(block.inverted_conv, block.depth_conv, block.point_conv)

    def forward(self: Any, x: Tensor) -> Tensor:
        """As the original's."""
        out = self.mvk_fused(x)
        return efficientvit_mit.MBConv.forward(self, x) if out is None else out


class PackingDSConv(InvertedResidual):
    """EfficientViT's ``DSConv`` in one kernel."""

    @staticmethod
    def mvk_parts(block: Any) -> list[Part]:
        """Empty if a part is more than a convolution with a norm and an activation."""
        return of_efficientvit(block.depth_conv, block.point_conv)

    def forward(self: Any, x: Tensor) -> Tensor:
        """As the original's."""
        out = self.mvk_fused(x)
        return efficientvit_mit.DSConv.forward(self, x) if out is None else out


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
    if any(part.dropout.training or not_plain(part.dropout, nn.Dropout, "it") for part in parts):
        return []
    return [(part.conv, _norm(part.norm), (*after(part.norm), part.act)) for part in parts]


def _norm(norm: Any) -> Any:
    return None if type(norm) is nn.Identity else norm


FORMS = {
    byobnet.BottleneckBlock: PackingBottleneckBlock,
    efficientvit_mit.MBConv: PackingMBConv,
    efficientvit_mit.DSConv: PackingDSConv,
}
"""The packing form of each class."""
