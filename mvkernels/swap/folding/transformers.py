"""transformers' MobileViT: the batch norm of a convolution layer, folded at inference."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.models.mobilevit.modeling_mobilevit import MobileViTConvLayer

from mvkernels.swap.folding.forms import Folding, both


class FoldingConvLayer(Folding):
    """A ``MobileViTConvLayer`` whose convolution does the work of its norm."""

    mvk_pairs = (("convolution", "normalization"),)

    def forward(self: Any, features: Tensor) -> Tensor:
        """As the original's."""
        after = () if self.activation is None else (self.activation,)
        out = both(self, self.convolution, self.normalization, features, *after)
        return MobileViTConvLayer.forward(self, features) if out is None else out


FORMS = {MobileViTConvLayer: FoldingConvLayer}
