"""timm's batch norm with its activation, folded into the convolution before it."""

from __future__ import annotations

from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from mvkernels.swap.folding import _folds


class FoldedBatchNormAct2d(BatchNormAct2d):
    """A ``BatchNormAct2d`` of which the activation is left."""

    mvk_original = BatchNormAct2d

    mvk_conv: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(x)) if _folds(self.mvk_conv, self) else BatchNormAct2d.forward(self, x)
