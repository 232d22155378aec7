"""timm: modules that call packed ones in turn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.models import efficientvit_mit
from torch import nn

from mvkernels.swap.eligibility import not_plain
from mvkernels.swap.packing.chain import Chain
from mvkernels.swap.packing.plans import Keep, Run, adding_run_of_part, run_of_part
from mvkernels.swap.swapped import Swapped


class PackingResidualBlock(Swapped):
    """EfficientViT's ``ResidualBlock``, whose sum is in the last product of what it calls."""

    mvk_calls = None

    @staticmethod
    def mvk_why_not(module: Any) -> str:
        """Why it is no such sum; empty if it is."""
        return (
            not_plain(module.pre_norm, nn.Identity, "the norm")
            or (module.shortcut is not None and not_plain(module.shortcut, nn.Identity, "the shortcut"))
            or ("" if isinstance(module.main, Swapped) else "it calls something else")
        )

    def mvk_sizes(self: Any) -> tuple[int, int] | None:
        """Those of what it calls."""
        sizes: tuple[int, int] | None = self.main.mvk_sizes()
        return sizes

    def mvk_plan(self: Any, keep: Keep) -> Run | None:
        """One call, which adds its input where there is a shortcut."""
        if self.mvk_why_not(self):
            return None
        return run_of_part(self.main) if self.shortcut is None else adding_run_of_part(self.main, keep)


class PackingEfficientVitBlock(Chain):
    """EfficientViT's attention and what follows it."""

    @staticmethod
    def mvk_chain(module: Any) -> Sequence[Any]:
        """The attention, and the block behind it."""
        return module.context_module, module.local_module


class PackingEfficientVitStage(Chain):
    """The blocks of a stage."""

    @staticmethod
    def mvk_chain(module: Any) -> Sequence[Any]:
        """Themselves a chain."""
        return (module.blocks,)


FORMS = {
    efficientvit_mit.ResidualBlock: PackingResidualBlock,
    efficientvit_mit.EfficientVitBlock: PackingEfficientVitBlock,
    efficientvit_mit.EfficientVitStage: PackingEfficientVitStage,
}
"""The packing form of each class."""
