"""Maps as Triton kernels see them: sizes, strides, and how wide loads may be. Needs no Triton."""

from __future__ import annotations

import math

INT32 = 2**31

# KIND of the groups of pixels that attend to each other: see :mod:`mvkernels.triton.attention.groups`.
PATCHES, UNEQUAL, WINDOWS, CLIPPED = range(4)

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


def power_of_two(count: int) -> int:
    """The least one that is not below ``count``, from 1 on."""
    return 1 << (count - 1).bit_length()


def lanes(d: int) -> int:
    """Lanes that ``d`` channels, or rows, take in one piece: a power of two, at least the 16 of matrix instructions."""
    return max(16, power_of_two(d))


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


def window_of(size: int, window: int, shift: int, free: bool) -> tuple[int, int]:
    """(window, start) of an axis: windows begin at start + i * window, of which start <= 0 is the first.

    ``free``: there is no bias that counts the places of a window, and one that reaches beyond the map may be smaller.

    >>> window_of(14, 7, 3, False), window_of(5, 9, 0, True), window_of(5, 9, 0, False), window_of(5, 9, 2, True)
    ((7, -4), (5, 0), (9, 0), (3, -1))
    """
    if free and (shift == 0 or shift >= size):  # one window may hold the whole axis
        window, shift = (min(window, size), 0) if shift == 0 else (size, 0)
    elif free:
        window = min(window, max(shift, size - shift))
    return window, shift - window if shift > 0 else 0


class Geometry:
    """Sizes and strides of maps (B, heads, D, H, W): groups of pixels clipped to the map, flat maps flattened.

    Args:
        shape: of the query map, (B, heads, D, H, W); maps named with "v" or "g" have ``value_dim`` channels.
        strides: of each map, by name.
        itemsize: bytes of an element.
        group: pixels with the same place in a patch of this size are a group; with ``shift`` those of a window.
        bias: strides of a bias (heads, N, M), and ``bias_itemsize``.
        shift: where the windows begin.
        partners: height and width of the maps "k" and "v", if they are not those of the others.
    """

    def __init__(
        self,
        shape: Shape,
        strides: tuple[tuple[str, Shape], ...],
        itemsize: int,
        value_dim: int | None = None,
        group: tuple[int, int] = (1, 1),
        bias: Shape | None = None,
        bias_itemsize: int = 1,
        shift: tuple[int, int] | None = None,
        partners: tuple[int, int] | None = None,
    ):
        batch, heads, d, height, width = shape
        dv = d if value_dim is None else value_dim
        self.vector = 16 // itemsize
        of = {name: partners if partners and name in "kv" else (height, width) for name, _ in strides}
        seen = {name: needed(stride, (batch, heads, dv if name in "vg" else d, *of[name])) for name, stride in strides}
        starts = (0, 0)
        self.kind = PATCHES
        if shift is None:
            gh, gw = min(group[0], height), min(group[1], width)
        else:
            (gh, sy), (gw, sx) = (window_of(*axis, bias is None) for axis in zip((height, width), group, shift))
            starts = sy, sx
            self.kind = CLIPPED if sy or sx or height % gh or width % gw else WINDOWS
            if (gh, gw, sy, sx) == (height, width, 0, 0):  # of one window: as patches of one pixel
                gh = gw = 1
                self.kind = PATCHES
        partners = partners or (height, width)
        areas = {name: math.prod(size) for name, size in of.items()}
        extents = [max(height * width, math.prod(partners)) * heads * max(d, dv)]
        for name, (_, _, sd, sy, sx) in seen.items():
            extents.append(max(d, dv) * abs(sd) + of[name][0] * abs(sy) + of[name][1] * abs(sx))
        self.wide = max(extents) >= INT32
        self.linear = self.kind == PATCHES and gh == gw == 1
        self.linear &= all(s[3] == of[name][1] * s[4] or min(of[name]) == 1 for name, s in seen.items())
        sizes = (height, width), partners, *(((gh, gw),) if shift else ())
        self.wide |= not self.linear and not all(divides(*size) for size in sizes)
        if self.linear:
            for name, (sb, sh, sd, sy, sx) in seen.items():
                seen[name] = (sb, sh, sd, 0, sx if of[name][1] > 1 else sy)
            (height, width), partners = (1, height * width), (1, math.prod(partners))
        if partners != (height, width):
            self.kind = UNEQUAL
        windows = self.kind >= WINDOWS
        across, down = -(-(width - starts[1]) // gw), -(-(height - starts[0]) // gh)
        self.tokens = gh * gw if windows else down * across
        """Of the largest group; of windows places, inside the map or not."""
        self.keys = math.prod(partners) if self.kind == UNEQUAL else self.tokens
        self.units = batch * heads * (down * across if windows else gh * gw)
        self.strides = seen
        self.sizes = (heads, height, width, gh, gw)
        self.area = height * width
        self.partners, self.starts = partners, starts
        self.columns = gw if windows else across
        """Of the largest group."""
        equal = self.linear or bias is not None or windows
        self.equal = equal or not (height % gh or width % gw)
        """Whether all groups have as many tokens, in as many columns."""
        self.n_align = low_bit(self.tokens, self.keys, limit=self.vector) if equal else 1
        """Of the tokens of every group."""
        self.k_align = low_bit(self.keys, limit=self.vector) if self.kind == UNEQUAL else self.n_align
        """Of those that they attend to."""
        self.maps: dict[str, tuple[int, int]] = {name: self._layout(s, areas[name]) for name, s in seen.items()}
        """(LAYOUT, ALIGN) of each map, as :mod:`mvkernels.triton.tiles` has them."""
        self.bias_align = 0
        self.bias: Shape = (0, 0, 0)
        if bias is not None:
            self.bias = bias
            if self.bias[2] == 1 or self.keys == 1:
                self.bias_align = low_bit(self.bias[0], self.bias[1], limit=16 // bias_itemsize)

    def _layout(self, stride: Shape, area: int) -> tuple[int, int]:
        sb, sh, sd, sy, sx = stride
        if sd == 1:
            return 1, low_bit(sb, sh, sy, sx, limit=self.vector)
        if sx == 1:
            return 2, low_bit(sb, sh, sd, area, limit=self.vector) if self.linear else 1
        return 0, 1

    def dense(self, channels_last: bool, channels: int, partner: bool = False) -> tuple[int, int]:
        """(LAYOUT, ALIGN) of a map that we allocate, of the sizes of the query map or of its ``partner``."""
        if channels_last:
            return 1, low_bit(channels, limit=self.vector)
        area = math.prod(self.partners) if partner else self.area
        return 2, low_bit(area, limit=self.vector) if self.linear else 1

    def ints(self, names: str) -> Shape:
        """The strides of these maps, one after the other."""
        return tuple(stride for name in names for stride in self.strides[name])
