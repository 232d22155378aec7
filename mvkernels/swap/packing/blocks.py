"""Whether a block of convolutions, norms and activations is an inverted residual, in the state it is in now."""

from __future__ import annotations

from typing import Any

from torch import nn

from mvkernels.swap.eligibility import not_hooked, not_its_own, replaced
from mvkernels.swap.folding.forms import rests
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
