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
from mvkernels.triton.tiles import divider, group_extent, pixel_of, unit_of

UNEQUAL, WINDOWS, CLIPPED = (tl.constexpr(kind) for kind in (maps.UNEQUAL, maps.WINDOWS, maps.CLIPPED))

SIZES = ["heads", "H", "W", "ph", "pw", "KH", "KW", "sy", "sx", "bsh", "bsm", "bsn"]


@triton.jit
def groups_of(H, W, ph, pw, sy, sx, KIND: tl.constexpr):
    """(down, across): how many groups a map has along each axis."""
    if KIND >= WINDOWS:
        down = (H - sy + ph - 1) // ph
        across = (W - sx + pw - 1) // pw
    else:
        down, across = ph, pw
    return down, across


@triton.jit
def first_pixel(gy, gx, ph, pw, sy, sx, KIND: tl.constexpr):
    """(y0, x0) of a group: its first pixel, or corner."""
    if KIND >= WINDOWS:
        gy = sy + gy * ph
        gx = sx + gx * pw
    return gy, gx


@triton.jit
def group_of(unit, heads, H, W, ph, pw, sy, sx, KIND: tl.constexpr):
    """(batch as int64, head as int64, y0, x0) of a unit or a vector of units: its first pixel, or corner."""
    down, across = groups_of(H, W, ph, pw, sy, sx, KIND)
    batch, head, gy, gx = unit_of(unit, heads, down, across)
    y0, x0 = first_pixel(gy, gx, ph, pw, sy, sx, KIND)
    return batch, head, y0, x0


@triton.jit
def digits_of(item, down, across):
    """(batch, gy, gx) of group ``item`` of all of a head's."""
    rest = item // across
    batch = rest // down
    return batch, rest - batch * down, item - rest * across


@triton.jit
def added_digits(a, b, down, across):
    """:func:`digits_of` a sum, from those of two numbers: a loop over groups compares and adds, and divides nothing."""
    gx = a[2] + b[2]
    carry = (gx >= across).to(tl.int32)
    gx -= carry * across
    gy = a[1] + b[1] + carry
    carry = (gy >= down).to(tl.int32)
    return a[0] + b[0] + carry, gy - carry * down, gx


@triton.jit
def next_group(batch, y0, x0, H, W, ph, pw, sy, sx, KIND: tl.constexpr):
    """(batch, y0, x0) of the group after this one, of the same head: without a division, for loops over groups."""
    if KIND >= WINDOWS:
        left, top, right, bottom, across, down = sx, sy, W, H, pw, ph
    else:
        left, top, right, bottom, across, down = 0, 0, pw, ph, 1, 1
    x0 += across
    over = x0 >= right
    x0 = tl.where(over, left, x0)
    y0 = tl.where(over, y0 + down, y0)
    over = y0 >= bottom
    return batch + over.to(tl.int64), tl.where(over, top, y0), x0


@triton.jit
def dividers(W, pw, KIND: tl.constexpr):
    """:func:`divider` of the columns of a group, of the fewest and of one more."""
    fewest = pw if KIND >= WINDOWS else W // pw
    return divider(fewest), divider(fewest + 1)


@triton.jit
def divider_of(columns, both):
    """Which of the :func:`dividers` is that of a group."""
    fewest, more = both
    return columns, tl.where(columns > fewest[0], more[1], fewest[1])


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
def equal_groups(H, W, ph, pw, KH, KW, N_ALIGN: tl.constexpr, K_ALIGN: tl.constexpr, KIND: tl.constexpr):
    """(queries, keys) of each group where there is a bias: all are equal."""
    rows, columns = (ph, pw) if KIND >= WINDOWS else (H // ph, W // pw)
    queries = tl.multiple_of(rows * columns, N_ALIGN)
    return queries, tl.multiple_of(KH * KW, K_ALIGN) if KIND == UNEQUAL else queries


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
