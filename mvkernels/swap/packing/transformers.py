"""transformers: blocks on packed weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers.models.levit.modeling_levit import LevitMLPLayer, MLPLayerWithBN
from transformers.models.mobilevit.modeling_mobilevit import MobileViTConvLayer, MobileViTInvertedResidual

from mvkernels.swap.folding.transformers import after
from mvkernels.swap.packing.blocks import InvertedResidual, not_own
from mvkernels.swap.packing.layers import Part
from mvkernels.swap.packing.products import Products


class PackingInvertedResidual(InvertedResidual):
    """MobileViT's ``MobileViTInvertedResidual`` in one kernel."""

    @staticmethod
    def mvk_parts(block: Any) -> list[Part]:
        """Empty if a part is more than a convolution with a norm and an activation."""
        parts = [block.expand_1x1, block.conv_3x3, block.reduce_1x1]
        if any(not_own(part, MobileViTConvLayer) for part in parts):
            return []
        return [(part.convolution, part.normalization, after(part)) for part in parts]

    @staticmethod
    def mvk_adds(block: Any) -> bool:
        """Where it has a residual."""
        return bool(block.use_residual)

    def mvk_sizes(self: Any) -> tuple[int, int]:
        """Of the last two convolutions."""
        return self.reduce_1x1.convolution.out_channels, self.conv_3x3.convolution.stride[0]


class PackingMLPLayerWithBN(Products):
    """LeViT's ``MLPLayerWithBN``."""

    mvk_axes = 3

    @staticmethod
    def mvk_products(module: Any) -> Sequence[Part]:
        """The Linear with its batch norm."""
        return ((module.linear, module.batch_norm, ()),)

    @staticmethod
    def mvk_last(module: Any) -> Any:
        """The layer of its last product."""
        return module.linear


class PackingLevitMLPLayer(Products):
    """LeViT's ``LevitMLPLayer``."""

    mvk_axes = 3

    @staticmethod
    def mvk_products(module: Any) -> Sequence[Part]:
        """Empty if a part is more than a product with a batch norm."""
        first, last = module.linear_up, module.linear_down
        if not_own(first, MLPLayerWithBN) or not_own(last, MLPLayerWithBN):
            return ()
        return (first.linear, first.batch_norm, (module.activation,)), (last.linear, last.batch_norm, ())

    @staticmethod
    def mvk_last(module: Any) -> Any:
        """The layer of its last product."""
        return module.linear_down.linear


FORMS = {
    MobileViTInvertedResidual: PackingInvertedResidual,
    MLPLayerWithBN: PackingMLPLayerWithBN,
    LevitMLPLayer: PackingLevitMLPLayer,
}
"""The packing form of each class."""
