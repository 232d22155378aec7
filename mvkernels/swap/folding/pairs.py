"""Modules that are a convolution and the batch norm after it, whatever the package."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mvkernels.swap.eligibility import class_of
from mvkernels.swap.folding.forms import Folding, both
from mvkernels.swap.packing import layers
from mvkernels.swap.packing.plans import Keep, Run


class FoldingPair(Folding):
    """A convolution that does the work of its norm. A class says in ``mvk_pairs`` how the two are called."""

    def mvk_plan(self: Any, keep: Keep) -> Run | None:
        """On packed weights."""
        part = _only(self)
        return None if part is None else layers.convolution((*part, ()), keep)

    def forward(self: Any, x: Tensor) -> Tensor:
        """As the original's."""
        part = _only(self)
        out = None if part is None else both(self, *part, x)
        return self.mvk_original.forward(self, x) if out is None else out


def _only(module: Any) -> tuple[Any, Any] | None:
    """The convolution and the plain norm after it, if the module has nothing else: it may be a Sequential."""
    names = module.mvk_pairs[0]
    if tuple(module._modules) != names or class_of(module._modules[names[1]]) is not nn.BatchNorm2d:
        return None
    return module._modules[names[0]], module._modules[names[1]]
