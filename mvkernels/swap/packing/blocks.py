"""Blocks of convolutions, norms and activations that are an inverted residual, in the state that they are in now."""

from __future__ import annotations

from typing import Any

from torch import nn

from mvkernels.swap.eligibility import class_of, not_its_own, not_plain
from mvkernels.swap.folding.forms import Folding
from mvkernels.swap.packing import layers
from mvkernels.swap.packing.layers import Part
from mvkernels.swap.packing.plans import Keep, Run


def not_own(part: Any, kind: type[nn.Module]) -> str:
    """The part must be of this class, perhaps with a folding form, and have its forward and no hooks."""
    return not_plain(part, kind, "it") or not_its_own(part, "forward")


def as_plain(part: Any, kind: type[nn.Module], *methods: str) -> Any:
    """A part of a class derived from ``kind`` as one of ``kind`` itself, if it has its forward and these methods.

    It shares all that the part holds; a plan of the part's caller looks after the part.
    """
    own = class_of(part)
    same = all(getattr(own, name, None) is getattr(kind, name) for name in ("forward", *methods))
    if own is kind or not issubclass(own, kind) or not same:
        return part
    plain = kind.__new__(kind)
    plain.__dict__ = part.__dict__
    return plain


class InvertedResidual(Folding):
    """A block that is an inverted residual, or a separable convolution, in one kernel."""

    @staticmethod
    def mvk_parts(block: Any) -> list[Part]:
        """The block's convolutions with what is called after them; empty if it is more than they are."""
        raise NotImplementedError

    @staticmethod
    def mvk_adds(block: Any) -> bool:
        """Whether the block adds its input."""
        return False

    @classmethod
    def mvk_why_not(cls, module: nn.Module) -> str:
        """Why such a module is no inverted residual; empty if it is."""
        return "" if layers.inverted(cls.mvk_parts(module)) else "it is no inverted residual"

    def mvk_sizes(self) -> tuple[int, int] | None:
        """The last convolution's channels, the depthwise one's stride: read of them alone, for each is guarded."""
        raise NotImplementedError

    def mvk_adding_plan(self, keep: Keep) -> Run | None:
        """The sum in the same kernel."""
        parts = self.mvk_parts(self)
        keeps_sizes = parts and parts[0][0].in_channels == parts[-1][0].out_channels and parts[-2][0].stride == (1, 1)
        return layers.inverted_residual_of(parts, True, keep) if keeps_sizes and not self.mvk_adds(self) else None

    def mvk_plan(self, keep: Keep) -> Run | None:
        """The block in one kernel."""
        return layers.inverted_residual_of(self.mvk_parts(self), self.mvk_adds(self), keep)
