"""transformers' MobileViT: the batch norm of a convolution layer, folded at inference."""

from __future__ import annotations

from torch import Tensor
from transformers.models.mobilevit.modeling_mobilevit import MobileViTConvLayer

from mvkernels.swap.folding import Folding, both


class FoldingConvLayer(Folding, MobileViTConvLayer):
    """A ``MobileViTConvLayer`` whose convolution does the work of its norm."""

    mvk_original = MobileViTConvLayer
    mvk_pairs = (("convolution", "normalization"),)

    def forward(self, features: Tensor) -> Tensor:
        """As the original's."""
        out = both(self, self.convolution, self.normalization, features)
        if out is None:
            return MobileViTConvLayer.forward(self, features)
        return out if self.activation is None else self.activation(out)


FOLDING = {MobileViTConvLayer: FoldingConvLayer}
