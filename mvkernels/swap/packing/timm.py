"""timm: blocks that are one op on packed weights."""

from __future__ import annotations

from typing import Any

from timm.layers import ConvNormAct, DropPath
from timm.models import byobnet, efficientvit_mit
from torch import Tensor, nn

from mvkernels.swap.eligibility import not_plain
from mvkernels.swap.folding.forms import Folding, packs_now
from mvkernels.swap.folding.timm import after
from mvkernels.swap.packing import layers
from mvkernels.swap.packing.blocks import Part, inverted, not_own, resting


class PackingBottleneckBlock(Folding):
    """A ``BottleneckBlock`` that is an inverted residual, as in MobileViT, in one kernel."""

    @classmethod
    def mvk_why_not(cls, module: nn.Module) -> str:
        """Why such a module is no inverted residual; empty if it is."""
        return "" if inverted(_of_bottleneck(module)) else "it is no inverted residual"

    def forward(self: Any, x: Tensor) -> Tensor:
        """As the original's."""
        parts = _of_bottleneck(self) if packs_now(self, x) else []
        activation = resting(parts)
        if activation is None:
            return byobnet.BottleneckBlock.forward(self, x)
        return layers.invert([part[:2] for part in parts], activation, x, self.shortcut is not None)


class PackingMBConv(Folding):
    """EfficientViT's ``MBConv`` in one kernel."""

    @classmethod
    def mvk_why_not(cls, module: nn.Module) -> str:
        """Why such a module is no inverted residual; empty if it is."""
        return "" if inverted(_of_mbconv(module)) else "it is no inverted residual"

    def forward(self: Any, x: Tensor) -> Tensor:
        """As the original's."""
        parts = _of_mbconv(self) if packs_now(self, x) else []
        activation = resting(parts)
        if activation is None:
            return efficientvit_mit.MBConv.forward(self, x)
        return layers.invert([part[:2] for part in parts], activation, x, False)


class PackingDSConv(Folding):
    """EfficientViT's ``DSConv`` in one kernel."""

    @classmethod
    def mvk_why_not(cls, module: nn.Module) -> str:
        """Why such a module is no separable convolution; empty if it is."""
        return "" if inverted(_of_dsconv(module)) else "it is no separable convolution"

    def forward(self: Any, x: Tensor) -> Tensor:
        """As the original's."""
        parts = _of_dsconv(self) if packs_now(self, x) else []
        activation = resting(parts)
        if activation is None:
            return efficientvit_mit.DSConv.forward(self, x)
        return layers.invert([(None, None), *(part[:2] for part in parts)], activation, x, False)


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


def _of_mbconv(block: Any) -> list[Part]:
    return of_efficientvit(block.inverted_conv, block.depth_conv, block.point_conv)


def _of_dsconv(block: Any) -> list[Part]:
    return of_efficientvit(block.depth_conv, block.point_conv)


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
