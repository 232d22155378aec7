"""What the families with windows and gathered position biases share.

Their modules roll, pad and cut the map before their projections, and put it together after them. Projections do not mix
pixels: here they take the map as it is, attention finds the windows in place, and of the copies only padding is left,
where a window does not divide the map.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.nn.functional import pad


def on_whole_windows(
    x: Tensor,
    window: Sequence[int],
    shift: Sequence[int],
    attend: Callable[[Tensor], Tensor],
    *,
    roll_first: bool = False,
) -> Tensor:
    """``attend`` on a map x (B, H, W, C) that is padded with zeros to whole windows, and the result cut to H x W.

    The pixels that are added take part, as in the originals. timm's Swin rolls the map before it is padded
    (``roll_first``), so that what was rolled under stands before the padding; the others pad it first.
    """
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


def maps_of(packed: Tensor, heads: int) -> Sequence[Tensor]:
    """query, key and value as maps (B, heads, head_dim, H, W), views of a packed qkv (B, H, W, q | k | v)."""
    # By its parts and not by view(): behind a graph break a compiled projection may have other strides.
    return packed.unflatten(-1, (3, heads, -1)).permute(3, 0, 4, 5, 1, 2).unbind()


def channels_last(out: Tensor) -> Tensor:
    """(B, heads, head_dim, H, W) as (B, H, W, C), a view of what the ops return for such maps."""
    return out.permute(0, 3, 4, 1, 2).flatten(-2)


def gathered(biases: Tensor, index: Tensor) -> Tensor:
    """(heads, offsets) at an index (N, M) -> (heads, N, M). As ``biases[:, index]``, at a quarter of its time."""
    return biases.index_select(1, index.flatten()).unflatten(1, index.shape)


def other_mask(block: Any, x: Tensor) -> str:
    """A mask made for one size says of a map of another size nothing that windows could say."""
    size, shifted = tuple(x.shape[1:3]), any(block.shift_size)
    if shifted and not block.dynamic_mask and size != tuple(block.input_resolution):
        return f"its mask is for maps of {tuple(block.input_resolution)}, but the map is {size}"
    return ""
