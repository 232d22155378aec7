"""transformers: batch norms of MobileViT and LeViT, folded at inference; PoolFormer's pooling."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.models.levit.modeling_levit import LevitConvEmbeddings
from transformers.models.mobilevit.modeling_mobilevit import MobileViTConvLayer
from transformers.models.poolformer.modeling_poolformer import PoolFormerPooling

from mvkernels.swap.folding.forms import Folding, both
from mvkernels.swap.folding.pairs import FoldingPair
from mvkernels.swap.folding.pooling import FoldingPooling
from mvkernels.swap.packing import layers
from mvkernels.swap.packing.plans import Keep, Run


class FoldingConvLayer(Folding):
    """A ``MobileViTConvLayer`` whose convolution does the work of its norm."""

    mvk_pairs = (("convolution", "normalization"),)

    def mvk_plan(self: Any, keep: Keep) -> Run | None:
        """On packed weights."""
        return layers.convolution((self.convolution, self.normalization, after(self)), keep)

    def forward(self: Any, features: Tensor) -> Tensor:
        """As the original's."""
        out = both(self, self.convolution, self.normalization, features, *after(self))
        return MobileViTConvLayer.forward(self, features) if out is None else out


def after(layer: Any) -> tuple[Any, ...]:
    """What a ``MobileViTConvLayer`` calls once it has normalised."""
    return () if layer.activation is None else (layer.activation,)


class FoldingLevitConvEmbeddings(FoldingPair):
    """LeViT's ``LevitConvEmbeddings`` whose convolution does the work of its norm."""

    mvk_pairs = (("convolution", "batch_norm"),)


FORMS = {
    MobileViTConvLayer: FoldingConvLayer,
    LevitConvEmbeddings: FoldingLevitConvEmbeddings,
    PoolFormerPooling: FoldingPooling,
}
