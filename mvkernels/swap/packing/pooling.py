"""The halves of PoolFormer's and EfficientFormer's blocks: pooling with the sum behind it, norms over whole pictures.

A GroupNorm with one group subtracts a number from a whole picture, multiplies each channel by a factor and adds a
shift. The mean of neighbours minus the pixel sees neither the number nor the shift, so ``x + scale * pool(norm(x))`` is
x plus factors times that difference of x itself. Before products all three are what is done to the pixels.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mvkernels.swap.eligibility import class_of, name_of, not_its_own, not_plain, replaced
from mvkernels.swap.folding import elementwise
from mvkernels.swap.packing import layers
from mvkernels.swap.packing.blocks import not_own
from mvkernels.swap.packing.plans import Keep, Run

_GROUP_NORMS = {
    ("torch.nn.modules.normalization", "GroupNorm"),
    ("timm.layers.norm", "GroupNorm1"),
    ("transformers.models.poolformer.modeling_poolformer", "PoolFormerGroupNorm"),
}


def pools(mixer: Any, kind: type[nn.Module]) -> bool:
    """Whether a token mixer of this class is the mean of 3 x 3 neighbours minus the pixel, of its ``pool``."""
    return not (not_own(mixer, kind) or elementwise.not_neighbours(getattr(mixer, "pool", None)))


def not_picture_norm(norm: Any) -> str:
    """Why it is no GroupNorm with one group; empty if it is."""
    kind = class_of(norm)
    if not isinstance(norm, nn.GroupNorm) or name_of(kind) not in _GROUP_NORMS:
        return "it is no GroupNorm"
    reason = not_plain(norm, kind, "the norm") or replaced(kind, "forward") or not_its_own(norm, "forward")
    if not reason and norm.num_groups != 1:
        reason = "it has more groups"
    given = [t for t in (norm.weight, norm.bias) if t is not None] if not reason else []
    reason = reason or layers.not_single(*given)
    # NaN in a bias reaches every result of the original, and not those of factors without the bias. A change of the
    # parameters has the plan made anew, so this is seen to once.
    if not reason and not all(t.is_cpu and bool(t.isfinite().all()) for t in given):
        reason = "a parameter is not finite"
    return reason


def pooled_sum(norm: Any, factors: Tensor | None, keep: Keep) -> Run | None:
    """``x + factors * pool(norm(x))`` of a dense map, without norm or with a GroupNorm of one group; None if the norm
    is another, or if there is nothing to multiply by."""
    if norm is None:
        if factors is None:
            return None
        of_all = factors.detach().view(1, -1)
        return lambda x: elementwise.pooled_difference(x, of_all)
    if not_picture_norm(norm):
        return None
    weight, eps = norm.weight, norm.eps
    if factors is not None:
        weight = keep(factors.detach() if weight is None else factors.detach() * weight.detach())
    return lambda x: elementwise.pooled_difference(x, elementwise.picture_norm(x, weight, None, eps))


def gate_of(norm: Any) -> Run | None:
    """What a GroupNorm of one group does to a dense map, for a product; None if it is another norm."""
    if not_picture_norm(norm):
        return None
    weight, bias, eps = norm.weight, norm.bias, norm.eps
    return lambda x: elementwise.picture_norm(x, weight, bias, eps)
