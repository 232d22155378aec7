"""transformers: blocks that are one op on packed weights."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.models.mobilevit.modeling_mobilevit import MobileViTConvLayer, MobileViTInvertedResidual

from mvkernels.swap.folding.transformers import after
from mvkernels.swap.packing.blocks import InvertedResidual, Part, not_own


class PackingInvertedResidual(InvertedResidual):
    """MobileViT's ``MobileViTInvertedResidual`` in one kernel."""

    @staticmethod
    def mvk_parts(block: Any) -> list[Part]:
        """Empty if a part is more than a convolution with a norm and an activation."""
        parts = [block.expand_1x1, block.conv_3x3, block.reduce_1x1]
        if any(not_own(part, MobileViTConvLayer) for part in parts):
            return []
        return [(part.convolution, part.normalization, after(part)) for part in parts]

    def forward(self: Any, features: Tensor) -> Tensor:
        """As the original's."""
        out = self.mvk_fused(features, adds=self.use_residual)
        return MobileViTInvertedResidual.forward(self, features) if out is None else out


FORMS = {MobileViTInvertedResidual: PackingInvertedResidual}
"""The packing form of each class."""
