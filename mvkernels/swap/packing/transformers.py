"""transformers: blocks that are one op on packed weights."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.models.mobilevit.modeling_mobilevit import MobileViTConvLayer, MobileViTInvertedResidual

from mvkernels.swap.folding.forms import Folding, packs_now
from mvkernels.swap.folding.transformers import after
from mvkernels.swap.packing import layers
from mvkernels.swap.packing.blocks import Part, inverted, not_own, resting


class PackingInvertedResidual(Folding):
    """MobileViT's ``MobileViTInvertedResidual`` in one kernel."""

    @classmethod
    def mvk_why_not(cls, module: nn.Module) -> str:
        """Why such a module is no inverted residual; empty if it is."""
        return "" if inverted(_parts(module)) else "it is no inverted residual"

    def forward(self: Any, features: Tensor) -> Tensor:
        """As the original's."""
        parts = _parts(self) if packs_now(self, features) else []
        activation = resting(parts)
        if activation is None:
            return MobileViTInvertedResidual.forward(self, features)
        return layers.invert([part[:2] for part in parts], activation, features, self.use_residual)


def _parts(block: Any) -> list[Part]:
    parts = [block.expand_1x1, block.conv_3x3, block.reduce_1x1]
    if any(not_own(part, MobileViTConvLayer) for part in parts):
        return []
    return [(part.convolution, part.normalization, after(part)) for part in parts]


FORMS = {MobileViTInvertedResidual: PackingInvertedResidual}
"""The packing form of each class."""
