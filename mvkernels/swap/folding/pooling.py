"""The token mixer of EfficientFormer and PoolFormer, in every package: the mean of neighbours minus the pixel."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mvkernels.swap.eligibility import replaced, unusual_call
from mvkernels.swap.folding import elementwise
from mvkernels.swap.folding.forms import Folding
from mvkernels.swap.packing.plans import not_now


class FoldingPooling(Folding):
    """The token mixer of EfficientFormer and PoolFormer in one pass."""

    @classmethod
    def mvk_why_not(cls, module: nn.Module) -> str:
        """Why such a module has nothing to fold; empty if it has."""
        return elementwise.not_neighbours(getattr(module, "pool", None))

    def forward(self: Any, x: Tensor) -> Tensor:
        """As the original's."""
        reason = (
            not_now()
            or unusual_call(x)
            or elementwise.not_fit(x)
            or elementwise.not_neighbours(self.pool)
            or replaced(self.mvk_original, "forward")
        )
        return self.mvk_original.forward(self, x) if reason else elementwise.pooled_difference(x)
