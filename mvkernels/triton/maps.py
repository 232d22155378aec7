"""Maps as Triton kernels see them: sizes, strides, and how wide loads may be. Needs no Triton."""

from __future__ import annotations

import math

INT32 = 2**31

Shape = tuple[int, ...]


def pieces(d: int, exact: bool = False) -> tuple[int, int]:
    """Two powers of two (the second possibly 0, both at least 16) that hold ``d`` channels in the least space.

    ``exact`` float32 products hold their operands in registers whole: 128 channels and more then go by halves.

    >>> pieces(36), pieces(60), pieces(20), pieces(8), pieces(128), pieces(128, exact=True)
    ((32, 16), (64, 0), (32, 0), (16, 0), (128, 0), (64, 64))
    """
    whole = lanes(d)
    if whole >= 64 and d <= whole // 2 + whole // 4:
        return whole // 2, lanes(d - whole // 2)
    return (whole // 2, whole // 2) if exact and whole >= 128 else (whole, 0)


def width(d: int) -> int:
    """Lanes that ``d`` channels take in two pieces."""
    return sum(pieces(d))


def lanes(d: int) -> int:
    """Lanes that ``d`` channels, or rows, take in one piece: a power of two, at least the 16 of matrix instructions."""
    return max(16, 1 << (d - 1).bit_length())


def divides(height: int, width: int) -> bool:
    """Whether the kernels' ``divider`` is exact for every pixel of a map."""
    return height * width * width < 2**32


def low_bit(*values: int, limit: int) -> int:
    """The largest power of two up to ``limit`` that divides all values."""
    common = math.gcd(limit, *values)
    return common & -common


def needed(stride: Shape, shape: Shape) -> Shape:
    """Strides of a map (B, heads, D, H, W), with those of sizes of 1 as the kernels like them: they lead nowhere."""
    sb, sh, sd, sy, sx = stride
    batch, heads, d, height, width = shape
    return (
        sb if batch > 1 else 0,
        sh if heads > 1 else 0,
        sd if d > 1 else 1,
        sy if height > 1 else 0,
        sx if width > 1 else 0,
    )


class Geometry:
    """Sizes and strides of maps (B, heads, D, H, W): patches clipped to the map, flat maps flattened.

    Args:
        shape: of the query map, (B, heads, D, H, W); maps named with "v" or "g" have ``value_dim`` channels.
        strides: of each map, by name.
        itemsize: bytes of an element.
        patch: pixels with the same place in their patch are a group.
        bias: strides of a bias (heads, N, N), and ``bias_itemsize``.
    """

    def __init__(
        self,
        shape: Shape,
        strides: tuple[tuple[str, Shape], ...],
        itemsize: int,
        value_dim: int | None = None,
        patch: tuple[int, int] = (1, 1),
        bias: Shape | None = None,
        bias_itemsize: int = 1,
    ):
        batch, heads, d, height, width = shape
        dv = d if value_dim is None else value_dim
        ph, pw = min(patch[0], height), min(patch[1], width)
        self.tokens = -(-height // ph) * -(-width // pw)
        self.units = batch * heads * ph * pw
        self.vector = 16 // itemsize
        seen = {
            name: needed(stride, (batch, heads, dv if name in "vg" else d, height, width)) for name, stride in strides
        }
        extents = [height * width * heads * max(d, dv)]
        extents += [max(d, dv) * abs(s[2]) + height * abs(s[3]) + width * abs(s[4]) for s in seen.values()]
        self.wide = max(extents) >= INT32
        self.linear = ph == pw == 1 and all(s[3] == width * s[4] or min(height, width) == 1 for s in seen.values())
        self.wide |= not self.linear and not divides(height, width)
        if self.linear:
            seen = {name: (sb, sh, sd, 0, sx if width > 1 else sy) for name, (sb, sh, sd, sy, sx) in seen.items()}
            height, width = 1, height * width
        self.strides = seen
        self.sizes = (heads, height, width, ph, pw)
        self.area = height * width
        equal = self.linear or bias is not None
        self.n_align = low_bit(self.tokens, limit=self.vector) if equal else 1
        self.maps: dict[str, tuple[int, int]] = {name: self._layout(s) for name, s in seen.items()}
        """(LAYOUT, ALIGN) of each map, as :mod:`mvkernels.triton.tiles` has them."""
        self.bias_align = 0
        self.bias: Shape = (0, 0, 0)
        if bias is not None:
            self.bias = bias
            if self.bias[2] == 1 or self.tokens == 1:
                self.bias_align = low_bit(self.bias[0], self.bias[1], limit=16 // bias_itemsize)

    def _layout(self, stride: Shape) -> tuple[int, int]:
        sb, sh, sd, sy, sx = stride
        if sd == 1:
            return 1, low_bit(sb, sh, sy, sx, limit=self.vector)
        if sx == 1:
            return 2, low_bit(sb, sh, sd, self.area, limit=self.vector) if self.linear else 1
        return 0, 1

    def dense(self, channels_last: bool, channels: int) -> tuple[int, int]:
        """(LAYOUT, ALIGN) of a map that we allocate."""
        if channels_last:
            return 1, low_bit(channels, limit=self.vector)
        return 2, low_bit(self.area, limit=self.vector) if self.linear else 1

    def ints(self, names: str) -> Shape:
        """The strides of these maps, one after the other."""
        return tuple(stride for name in names for stride in self.strides[name])
