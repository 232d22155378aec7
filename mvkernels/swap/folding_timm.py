"""timm: the batch norms of its convolution blocks, folded at inference."""

from __future__ import annotations

from typing import Any

from timm.layers import ConvNormAct
from timm.models import efficientformer, efficientvit_mit
from torch import Tensor, nn

from mvkernels.swap.eligibility import not_plain
from mvkernels.swap.folding import Folding, both


class FoldingConvNormAct(Folding, ConvNormAct):
    """A ``ConvNormAct`` whose convolution does the work of its norm."""

    mvk_original = ConvNormAct
    mvk_pairs = (("conv", "bn"),)

    def forward(self, x: Tensor) -> Tensor:
        """As the original's."""
        norm: Any = self.bn
        out = both(self, self.conv, norm, x)
        if out is None:
            return ConvNormAct.forward(self, x)
        out = _after(norm, out)
        return out if self.aa is None else self.aa(out)


class FoldingEfficientVitConvNormAct(Folding, efficientvit_mit.ConvNormAct):
    """EfficientViT's ``ConvNormAct`` whose convolution does the work of its norm."""

    mvk_original = efficientvit_mit.ConvNormAct
    mvk_pairs = (("conv", "norm"),)

    def forward(self, x: Tensor) -> Tensor:
        """As the original's."""
        rests = not (self.dropout.training or not_plain(self.dropout, nn.Dropout, "dropout"))
        out = both(self, self.conv, self.norm, x) if rests else None
        return efficientvit_mit.ConvNormAct.forward(self, x) if out is None else self.act(_after(self.norm, out))


class FoldingConvMlpWithNorm(Folding, efficientformer.ConvMlpWithNorm):
    """EfficientFormer's ``ConvMlpWithNorm`` whose convolutions do the work of their norms."""

    mvk_original = efficientformer.ConvMlpWithNorm
    mvk_pairs = (("fc1", "norm1"), ("fc2", "norm2"))

    def forward(self, x: Tensor) -> Tensor:
        """As the original's."""
        hidden = both(self, self.fc1, self.norm1, x)
        if hidden is None:
            return efficientformer.ConvMlpWithNorm.forward(self, x)
        hidden = self.drop(self.act(_after(self.norm1, hidden)))
        out = both(self, self.fc2, self.norm2, hidden)
        return self.drop(self.norm2(self.fc2(hidden)) if out is None else _after(self.norm2, out))


class FoldingDownsample(Folding, efficientformer.Downsample):
    """EfficientFormer's ``Downsample`` whose convolution does the work of its norm."""

    mvk_original = efficientformer.Downsample
    mvk_pairs = (("conv", "norm"),)

    def forward(self, x: Tensor) -> Tensor:
        """As the original's."""
        out = both(self, self.conv, self.norm, x)
        return efficientformer.Downsample.forward(self, x) if out is None else _after(self.norm, out)


def _after(norm: Any, x: Tensor) -> Tensor:
    """What timm's ``BatchNormAct2d`` does once it has normalised; a plain batch norm does nothing more."""
    return x if type(norm) is nn.BatchNorm2d else norm.act(norm.drop(x))


FOLDING = {
    kind.mvk_original: kind
    for kind in (FoldingConvNormAct, FoldingEfficientVitConvNormAct, FoldingConvMlpWithNorm, FoldingDownsample)
}
