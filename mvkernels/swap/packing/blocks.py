"""Blocks of convolutions, norms and activations that are an inverted residual, in the state that they are in now."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mvkernels.swap.eligibility import not_hooked, not_its_own, replaced
from mvkernels.swap.folding.forms import Folding, packs_now, rests
from mvkernels.swap.packing import layers

Part = tuple[Any, Any, tuple[Any, ...]]
"""A convolution, its norm, and what is called after them."""


def not_own(part: Any, kind: type[nn.Module]) -> str:
    """The part must be of this class, perhaps with a folding form, and have its forward and no hooks."""
    if getattr(type(part), "mvk_original", type(part)) is not kind:
        return "it is of another class"
    return replaced(kind, "forward") or not_hooked(part, "it") or not_its_own(part, "forward")


def inverted(parts: list[Part]) -> bool:
    """Whether the convolutions are those of an inverted residual, with or without the first one."""
    kinds = [layers.of_convolution(conv) for conv, _, _ in parts]
    return kinds[-2:] == ["depthwise", "pointwise"] and kinds[:-2] in ([], ["pointwise"])


def resting(parts: list[Part]) -> int | None:
    """The activation of the first convolutions, if all can run on packed weights, and the last has none; else None."""
    if not parts or not inverted(parts):
        return None
    *first, last = (rests(conv, norm, called) for conv, norm, called in parts)
    return first[0] if last == 0 and len(set(first)) == 1 else None


class InvertedResidual(Folding):
    """A block that is an inverted residual, or a separable convolution, in one kernel."""

    @staticmethod
    def mvk_parts(block: Any) -> list[Part]:
        """The block's convolutions with what is called after them; empty if it is more than they are."""
        raise NotImplementedError

    @classmethod
    def mvk_why_not(cls, module: nn.Module) -> str:
        """Why such a module is no inverted residual; empty if it is."""
        return "" if inverted(cls.mvk_parts(module)) else "it is no inverted residual"

    def mvk_fused(self, x: Tensor, adds: bool = False) -> Tensor | None:
        """The block's result, with its input added or not; None if the original has to run."""
        parts = self.mvk_parts(self) if packs_now(self, x) else []
        activation = resting(parts)
        return None if activation is None else layers.invert([part[:2] for part in parts], activation, x, adds)
