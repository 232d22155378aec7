"""Sizes of packed weights, as the C++ kernels lay them."""

from __future__ import annotations

HEADER = 16
"""Elements before the weights, which say what they were packed for."""
_WIDEST = 32
"""Columns of the widest panel of an instruction set: packed weights have one size on all of them."""


def wide(channels: int) -> int:
    """Channels in whole panels."""
    return (channels + _WIDEST - 1) // _WIDEST * _WIDEST
