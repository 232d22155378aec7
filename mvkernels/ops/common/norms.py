"""The LayerNorm of the references, written out."""

from __future__ import annotations

from torch import Tensor


def normalised(rows: Tensor, eps: float) -> Tensor:
    r"""``(rows - mean) / sqrt(variance + eps)`` over the last axis, in the dtype of the rows.

    The first channel is subtracted before, which changes nothing but the rounding of the mean: that is noise over a
    deviation of 0 where all channels of a row are equal, or nearly so. Nor has it a gradient.
    """
    rows = rows - rows[..., :1].detach()
    rows = rows - rows.mean(-1, keepdim=True)
    return rows * (rows.square().mean(-1, keepdim=True) + eps).rsqrt()
