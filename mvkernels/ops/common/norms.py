"""The LayerNorm of the references, written out."""

from __future__ import annotations

from torch import Tensor


def normalised(rows: Tensor, eps: float) -> Tensor:
    r"""``(rows - mean) / sqrt(variance + eps)`` over the last axis, in the dtype of the rows.

    The mean is subtracted twice. Once leaves the error of rounding it, which is noise over a deviation of 0 where all
    channels of a row are equal; PyTorch's own leaves it too, where they are nearly equal.
    """
    for _ in range(2):
        rows = rows - rows.mean(-1, keepdim=True)
    return rows * (rows.square().mean(-1, keepdim=True) + eps).rsqrt()
