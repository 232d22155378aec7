"""Heads too wide for the registers: a program sums SLICE of a head's channels, DEPTH of them at a time to a score."""

import triton
import triton.language as tl

from mvkernels.triton.tiles import EXACT, round_tf32


@triton.jit
def _slice(
    rows, keep, sd, start,
    WIDTH: tl.constexpr, D: tl.constexpr, LAYOUT: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    # As tiles._piece, for channels that begin where a loop has come to.
    cols = start + tl.arange(0, WIDTH)
    if LAYOUT == 1:
        offsets = rows[:, None] + cols[None, :]
        mask = keep[:, None] & (cols < D)[None, :]
    else:
        along = cols.to(tl.int64) * sd if WIDE else cols * sd
        if LAYOUT == 2:
            along = tl.multiple_of(along, ALIGN)
        offsets = along[:, None] + rows[None, :]
        mask = (cols < D)[:, None] & keep[None, :]
    return offsets, mask


@triton.jit
def load_slice(
    ptr, rows, keep, sd, start,
    WIDTH: tl.constexpr, D: tl.constexpr, LAYOUT: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr = EXACT,
):  # fmt: skip
    """Channels [start, start + WIDTH) of a (rows, D) tile, as load_tile's."""
    offsets, mask = _slice(rows, keep, sd, start, WIDTH, D, LAYOUT, ALIGN, WIDE)
    tile = round_tf32(tl.load(ptr + offsets, mask=mask, other=0.0), PRECISION)
    return tile if LAYOUT == 1 else tl.trans(tile)


@triton.jit
def store_slice(
    ptr, value, rows, keep, sd, start,
    WIDTH: tl.constexpr, D: tl.constexpr, LAYOUT: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Write channels [start, start + WIDTH) of a (rows, D) tile, rounded to its dtype."""
    offsets, mask = _slice(rows, keep, sd, start, WIDTH, D, LAYOUT, ALIGN, WIDE)
    value = value.to(ptr.dtype.element_ty)
    tl.store(ptr + offsets, value if LAYOUT == 1 else tl.trans(value), mask=mask)


@triton.jit
def token_rows(m, sm, LAYOUT: tl.constexpr, ALIGN: tl.constexpr):
    """Offsets of tokens inside their (batch, head) plane, 64-bit."""
    rows = m.to(tl.int64) * sm
    if LAYOUT == 1:
        rows = tl.multiple_of(rows, ALIGN)
    return rows


@triton.jit
def products(
    a_ptr, a_rows, a_keep, asd, b_ptr, b_rows, b_keep, bsd,
    A: tl.constexpr, B: tl.constexpr, DEPTH: tl.constexpr, D: tl.constexpr,
    LA: tl.constexpr, AA: tl.constexpr, WA: tl.constexpr, LB: tl.constexpr, AB: tl.constexpr, WB: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """a bᵀ, (A rows, B rows), summed over the channels DEPTH at a time."""
    total = tl.zeros([A, B], ACC)
    for start in range(0, D, DEPTH):
        a = load_slice(a_ptr, a_rows, a_keep, asd, start, DEPTH, D, LA, AA, WA, PRECISION)
        b = load_slice(b_ptr, b_rows, b_keep, bsd, start, DEPTH, D, LB, AB, WB, PRECISION)
        total = tl.dot(a, tl.trans(b), total, input_precision=PRECISION, out_dtype=ACC)
    return total
