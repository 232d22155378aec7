"""transformers: blocks that are one op on packed weights."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.models.mobilevit.modeling_mobilevit import MobileViTConvLayer, MobileViTInvertedResidual

from mvkernels.swap.folding.transformers import after
from mvkernels.swap.packing.blocks import InvertedResidual, not_own
from mvkernels.swap.packing.layers import Part


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

    def forward(self: Any, features: Tensor) -> Tensor:
        """As the original's."""
        return MobileViTInvertedResidual.forward(self, features)


FORMS = {MobileViTInvertedResidual: PackingInvertedResidual}
"""The packing form of each class."""
