"""Groups of pixels with the same place in their patch: unfolded, attended to, folded, counted."""

from __future__ import annotations

from torch import Tensor


def attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """(B, h, groups, N, D) -> (B, h, groups, N, Dv)."""
    scores = query @ key.transpose(-2, -1) * scale
    if bias is not None:
        scores = scores + bias[:, None]
    return scores.softmax(-1) @ value


def unfold(x: Tensor, ph: int, pw: int) -> Tensor:
    """(B, h, D, H, W) -> (B, h, ph * pw, N, D)."""
    b, h, d, height, width = x.shape
    x = x.reshape(b, h, d, height // ph, ph, width // pw, pw)
    return x.permute(0, 1, 4, 6, 3, 5, 2).reshape(b, h, ph * pw, (height // ph) * (width // pw), d)


def fold(x: Tensor, ph: int, pw: int, height: int, width: int) -> Tensor:
    """(B, h, ph * pw, N, D) -> (B, h, D, H, W)."""
    b, h, _, _, d = x.shape
    x = x.reshape(b, h, ph, pw, height // ph, width // pw, d)
    return x.permute(0, 1, 6, 4, 2, 5, 3).reshape(b, h, d, height, width)


def pairs_of(patch: tuple[int, int], height: int, width: int) -> int:
    """How many pixels attend to how many, over all groups of one map."""
    ph, pw = patch
    rows, columns = range(min(ph, height)), range(min(pw, width))
    return sum((len(range(y, height, ph)) * len(range(x, width, pw))) ** 2 for y in rows for x in columns)
