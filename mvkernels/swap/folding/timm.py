"""timm: its batch norms at inference, in the convolution before or the activation after; EfficientFormer's pooling."""

from __future__ import annotations

from typing import Any

from timm.layers import BatchNormAct2d, ConvNormAct
from timm.models import efficientformer, efficientformer_v2, efficientvit_mit, levit, metaformer, tiny_vit
from torch import Tensor, nn

from mvkernels.swap.eligibility import class_of, not_plain
from mvkernels.swap.folding import elementwise
from mvkernels.swap.folding.forms import Folding, alone, both
from mvkernels.swap.folding.pairs import FoldingPair
from mvkernels.swap.folding.pooling import FoldingPooling
from mvkernels.swap.packing import layers
from mvkernels.swap.packing.plans import Keep, Run


class FoldingConvNormAct(Folding):
    """A ``ConvNormAct`` whose convolution does the work of its norm."""

    mvk_pairs = (("conv", "bn"),)

    def mvk_plan(self: Any, keep: Keep) -> Run | None:
        """On packed weights."""
        run, aa = layers.convolution((self.conv, self.bn, after(self.bn)), keep), self.aa
        return run if run is None or aa is None else lambda x: aa(run(x))

    def forward(self: Any, x: Tensor) -> Tensor:
        """As the original's."""
        norm: Any = self.bn
        out = both(self, self.conv, norm, x, *after(norm))
        if out is None:
            return ConvNormAct.forward(self, x)
        return out if self.aa is None else self.aa(out)


class FoldingEfficientVitConvNormAct(Folding):
    """EfficientViT's ``ConvNormAct`` whose convolution does the work of its norm."""

    mvk_pairs = (("conv", "norm"),)

    def mvk_plan(self: Any, keep: Keep) -> Run | None:
        """On packed weights."""
        part = part_of_efficientvit(self)
        return None if part is None else layers.convolution(part, keep)

    def forward(self: Any, x: Tensor) -> Tensor:
        """As the original's."""
        rests = not (self.dropout.training or not_plain(self.dropout, nn.Dropout, "dropout"))
        out = both(self, self.conv, self.norm, x, *after(self.norm), self.act) if rests else None
        return efficientvit_mit.ConvNormAct.forward(self, x) if out is None else out


class FoldingConvMlpWithNorm(Folding):
    """EfficientFormer's ``ConvMlpWithNorm`` whose convolutions do the work of their norms."""

    mvk_pairs = (("fc1", "norm1"), ("fc2", "norm2"))

    def mvk_sizes(self: Any) -> tuple[int, int]:
        """Those of the second convolution, after a first one of stride 1."""
        return self.fc2.out_channels, 1

    def mvk_plan(self: Any, keep: Keep) -> Run | None:
        """On packed weights."""
        widen = layers.convolution((self.fc1, self.norm1, (*after(self.norm1), self.act, self.drop)), keep)
        narrow = layers.convolution((self.fc2, self.norm2, (*after(self.norm2), self.drop)), keep)
        return None if widen is None or narrow is None else lambda x: narrow(widen(x))

    def forward(self: Any, x: Tensor) -> Tensor:
        """As the original's."""
        hidden = both(self, self.fc1, self.norm1, x, *after(self.norm1), self.act, self.drop)
        if hidden is None:
            return efficientformer.ConvMlpWithNorm.forward(self, x)
        out = both(self, self.fc2, self.norm2, hidden, *after(self.norm2), self.drop)
        return self.drop(self.norm2(self.fc2(hidden))) if out is None else out


class FoldingDownsample(Folding):
    """EfficientFormer's ``Downsample`` whose convolution does the work of its norm."""

    mvk_pairs = (("conv", "norm"),)

    def mvk_plan(self: Any, keep: Keep) -> Run | None:
        """On packed weights."""
        return layers.convolution((self.conv, self.norm, after(self.norm)), keep)

    def forward(self: Any, x: Tensor) -> Tensor:
        """As the original's."""
        out = both(self, self.conv, self.norm, x, *after(self.norm))
        return efficientformer.Downsample.forward(self, x) if out is None else out


class FoldingConvNorm(FoldingPair):
    """A ``ConvNorm`` whose convolution does the work of its norm."""

    mvk_pairs = (("conv", "bn"),)


class FoldingLevitConvNorm(FoldingPair):
    """LeViT's ``ConvNorm`` whose convolution does the work of its norm."""

    mvk_pairs = (("linear", "bn"),)


class FoldingBatchNormAct2d(Folding):
    """A batch norm with its activation in one pass, where the convolution before it is called by somebody else."""

    @classmethod
    def mvk_why_not(cls, module: nn.Module) -> str:
        """Why such a module has nothing to fold; empty if it has."""
        return "" if elementwise.activation_of(after(module)) else "it has no activation known here"

    def forward(self: Any, x: Tensor) -> Tensor:
        """As the original's."""
        out = alone(self, x, *after(self))
        return BatchNormAct2d.forward(self, x) if out is None else out


def after(norm: Any) -> tuple[Any, ...]:
    """What timm's ``BatchNormAct2d`` calls once it has normalised; a plain batch norm does nothing more."""
    return (norm.drop, norm.act) if isinstance(norm, BatchNormAct2d) else ()


def part_of_efficientvit(module: Any) -> layers.Part | None:
    """What EfficientViT's ``ConvNormAct`` is made of; None if it drops something now."""
    if module.dropout.training or not_plain(module.dropout, nn.Dropout, "it"):
        return None
    norm = None if class_of(module.norm) is nn.Identity else module.norm
    if norm is None and not_plain(module.norm, nn.Identity, "it"):
        return None
    return module.conv, norm, (*after(norm), module.act)


FORMS = {
    ConvNormAct: FoldingConvNormAct,
    efficientvit_mit.ConvNormAct: FoldingEfficientVitConvNormAct,
    efficientformer.ConvMlpWithNorm: FoldingConvMlpWithNorm,
    efficientformer.Downsample: FoldingDownsample,
    efficientformer.Pooling: FoldingPooling,
    metaformer.Pooling: FoldingPooling,
    levit.ConvNorm: FoldingLevitConvNorm,
    tiny_vit.ConvNorm: FoldingConvNorm,
    efficientformer_v2.ConvNorm: FoldingConvNorm,
    BatchNormAct2d: FoldingBatchNormAct2d,
}
"""The folding form of each class."""
