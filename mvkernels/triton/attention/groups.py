"""Which pixels attend to each other, as the kernels see it: the KIND of groups, and the tokens of one.

- PATCHES: pixels (y0 + i * ph, x0 + j * pw), of which a map has ph * pw groups
- UNEQUAL: all pixels of a map attend to all of another, of KH x KW
- WINDOWS: rectangles of ph x pw pixels, the first at (sy, sx), that lie inside the map
- CLIPPED: the same, but some reach beyond the map. Tokens are numbered as if none did, so that a bias is indexed by
  the numbers; what lies outside is not loaded, has no weight and is not stored

Windows are never put together in one tile behind a mask: a NaN of one would reach the other through products with 0.
"""

import triton
import triton.language as tl

from mvkernels.triton import maps
from mvkernels.triton.tiles import group_extent, pixel_of, unit_of

UNEQUAL, WINDOWS, CLIPPED = (tl.constexpr(kind) for kind in (maps.UNEQUAL, maps.WINDOWS, maps.CLIPPED))

SIZES = ["heads", "H", "W", "ph", "pw", "KH", "KW", "sy", "sx", "bsh", "bsm", "bsn"]


@triton.jit
def group_of(unit, heads, H, W, ph, pw, sy, sx, KIND: tl.constexpr):
    """(batch as int64, head as int64, y0, x0) of a unit or a vector of units: its first pixel, or corner."""
    if KIND >= WINDOWS:
        down = (H - sy + ph - 1) // ph
        across = (W - sx + pw - 1) // pw
        batch, head, gy, gx = unit_of(unit, heads, down, across)
        y0 = sy + gy * ph
        x0 = sx + gx * pw
    else:
        batch, head, y0, x0 = unit_of(unit, heads, ph, pw)
    return batch, head, y0, x0


@triton.jit
def keys_map(H, W, KH, KW, KIND: tl.constexpr):
    """(KH, KW); where they are H and W by those names, so that nothing is computed from both."""
    if KIND != UNEQUAL:
        KH = H
        KW = W
    return KH, KW


@triton.jit
def extent_of(y0, x0, H, W, ph, pw, KIND: tl.constexpr):
    """(rows, columns) of a group's tokens, those outside the map among them."""
    if KIND >= WINDOWS:
        rows = ph
        columns = pw
    else:
        rows = group_extent(y0, H, ph)
        columns = group_extent(x0, W, pw)
    return rows, columns


@triton.jit
def span_of(slots, y0, H, ph, pw, KIND: tl.constexpr):
    """(begin, end): no token outside of these lies inside the map."""
    if KIND == CLIPPED:
        begin = tl.maximum(-y0, 0) * pw
        end = tl.minimum(H - y0, ph) * pw
    else:
        begin = 0
        end = slots
    return begin, end


@triton.jit
def count_of(slots, y0, x0, H, W, ph, pw, KIND: tl.constexpr):
    """How many of a group's tokens lie inside the map."""
    if KIND == CLIPPED:
        rows = tl.minimum(H - y0, ph) - tl.maximum(-y0, 0)
        count = rows * (tl.minimum(W - x0, pw) - tl.maximum(-x0, 0))
    else:
        count = slots
    return count


@triton.jit
def tokens_of(n, end, width, group, KIND: tl.constexpr, LINEAR: tl.constexpr, WIDE: tl.constexpr,
              WHOLE: tl.constexpr = False, COLUMNS: tl.constexpr = 0):  # fmt: skip
    """(y, x, keep) of tokens n of a group (y0, x0, ph, pw, W); ``width`` is the :func:`divider` of its columns.

    WHOLE: every tile of tokens lies inside its group, and keep is known to be true: masks and selections by it are left
    out. COLUMNS: of every group, if they are known and a power of two, else 0.
    """
    ph, pw = (1, 1) if KIND >= WINDOWS else (group[2], group[3])
    if COLUMNS > 0 and not LINEAR and not WIDE:
        row = (n.to(tl.uint32) // COLUMNS).to(tl.int32)
        y = group[0] + row * ph
        x = group[1] + (n & (COLUMNS - 1)) * pw
    else:
        y, x = pixel_of(n, width, group[0], group[1], ph, pw, LINEAR, WIDE)
    keep = tl.full(n.shape, True, tl.int1) if WHOLE else n < end
    if KIND == CLIPPED:
        keep = keep & (y >= 0) & (x >= 0) & (x < group[4])
    return y, x, keep


@triton.jit
def tokens3(n, exists, y0, x0, H, W, ph, pw, KIND: tl.constexpr):
    """(y, x, keep, slots) of tokens n, (1, tokens), of a vector of groups; none of those that do not exist."""
    rows, columns = extent_of(y0, x0, H, W, ph, pw, KIND)
    slots = tl.where(exists, rows * columns, 0)
    if KIND >= WINDOWS:
        row = n // columns
        y = (y0[:, None] + row).to(tl.int64)
        x = (x0[:, None] + (n - row * columns)).to(tl.int64)
    else:
        row = n // tl.maximum(columns, 1)[:, None]
        y = (y0[:, None] + row * ph).to(tl.int64)
        x = (x0[:, None] + (n - row * columns[:, None]) * pw).to(tl.int64)
    keep = n < slots[:, None]
    if KIND == CLIPPED:
        keep = keep & (y >= 0) & (y < H) & (x >= 0) & (x < W)
    return y, x, keep, slots


@triton.jit
def keys3(n, exists, KH, KW):
    """(y, x, keep) of the tokens that UNEQUAL groups attend to, as :func:`tokens3`."""
    slots = tl.where(exists, KH * KW, 0)[:, None]
    row = n // KW
    y = row.to(tl.int64) + tl.zeros_like(slots)
    x = (n - row * KW).to(tl.int64) + tl.zeros_like(slots)
    return y, x, n < slots
