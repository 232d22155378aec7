"""What the families with windows and gathered position biases share.

Their modules roll, pad and cut the map before their projections, and put it together after them. Projections do not mix
pixels: here they take the map as it is, attention finds the windows in place, and of the copies only padding is left,
where a window does not divide the map.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from mvkernels.ops.window_attention import window_attention


def maps_of(packed: Tensor, heads: int) -> Sequence[Tensor]:
    """query, key and value as maps (B, heads, head_dim, H, W), views of a packed qkv (B, H, W, q | k | v)."""
    # By its parts and not by view(): behind a graph break a compiled projection may have other strides.
    # Each is permuted by itself: a runtime joins that with what the op's reference permutes, but not across a split.
    return [part.permute(0, 3, 4, 1, 2) for part in packed.unflatten(-1, (3, heads, -1)).unbind(-3)]


def map_of(projected: Tensor, heads: int) -> Tensor:
    """A projection (B, H, W, C) as a map (B, heads, C / heads, H, W), a view."""
    return projected.unflatten(-1, (heads, -1)).permute(0, 3, 4, 1, 2)


def channels_last(out: Tensor) -> Tensor:
    """(B, heads, head_dim, H, W) as (B, H, W, C), a view of what the ops return for such maps."""
    return out.permute(0, 3, 4, 1, 2).flatten(-2)


def gathered(biases: Tensor, index: Tensor) -> Tensor:
    """(heads, offsets) at an index (N, M) -> (heads, N, M). As ``biases[:, index]``, at a quarter of its time."""
    return biases.index_select(1, index.flatten()).unflatten(1, index.shape)


def cosine(query: Tensor, key: Tensor, logit_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Maps whose products are the scaled cosines between queries and keys; ``logit_scale`` (heads, 1, 1): a logarithm.

    (Swin Transformer V2, arXiv 2111.09883, equation 2: at most 100.)
    """
    factor = torch.clamp(logit_scale, max=math.log(1.0 / 0.01)).exp()
    # With the channels last, as they lie: in an export a sum over another axis would keep the permutations apart.
    query, key = (normalize(map_.permute(0, 3, 4, 1, 2), dim=-1) for map_ in (query, key))
    return (query * factor[..., 0]).permute(0, 3, 4, 1, 2), key.permute(0, 3, 4, 1, 2)


def _on_whole_windows(
    x: Tensor,
    window: Sequence[int],
    shift: Sequence[int],
    attend: Callable[[Tensor], Tensor],
    roll_first: bool,
) -> Tensor:
    """``attend`` on a map x (B, H, W, C) that is padded with zeros to whole windows, and the result cut to H x W."""
    height, width = x.shape[1:3]
    below, beside = -height % window[0], -width % window[1]
    if not below and not beside:
        return attend(x)
    forth, back = tuple(shift), tuple(-by for by in shift)
    roll_first = roll_first and any(shift)
    if roll_first:
        x = x.roll(back, (1, 2))
    x = pad(x, (0, 0, 0, beside, 0, below))
    if roll_first:
        return attend(x.roll(forth, (1, 2))).roll(back, (1, 2))[:, :height, :width].roll(forth, (1, 2))
    return attend(x)[:, :height, :width]


def attend_in_windows(
    x: Tensor,
    window: Sequence[int],
    shift: Sequence[int],
    project: Callable[[Tensor], Sequence[Tensor]],
    bias: Tensor,
    out: Callable[[Tensor], Tensor],
    *,
    scale: float | None = None,
    logit_scale: Tensor | None = None,
    roll_first: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Attention in the windows of a map x (B, H, W, C), padded with zeros to whole windows.

    The pixels that are added take part, as in the originals. timm's Swin rolls the map before it is padded
    (``roll_first``), so that what was rolled under stands before the padding; the others pad it first.

    ``project`` gives the maps of query, key and value; ``out`` takes what attention makes of them, (B, H, W, C). With
    ``logit_scale`` the scores are cosines, as in Swin V2.
    """

    def attend(x: Tensor) -> Tensor:
        query, key, value = project(x)
        if logit_scale is not None:
            query, key = cosine(query, key, logit_scale)
        # Under autocast norms are float32, and so are the parameters that the biases are made of.
        attended = window_attention(
            query.to(value.dtype),
            key.to(value.dtype),
            value,
            (window[0], window[1]),
            shift=(shift[0], shift[1]),
            bias=bias.to(value.dtype),
            scale=scale if logit_scale is None else 1.0,
            backend=backend,
        )
        return out(channels_last(attended))

    return _on_whole_windows(x, window, shift, attend, roll_first)


def other_windows(window: tuple[Any, ...], shift: tuple[Any, ...], index: Tensor) -> str:
    """Windows that the position biases are not for (the originals raise then), or that attention cannot have."""
    if not all(isinstance(n, Integral) for n in (*window, *shift)):
        return f"its window {window} or its shift {shift} is not made of ints"
    if not all(0 <= by < size for by, size in zip(shift, window)):
        return f"its shift {shift} is not less than its window {window}"
    if index.numel() != math.prod(window) ** 2:
        return f"its window is {window}, but its position biases are for another"
    return ""
