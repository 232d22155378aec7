"""What Triton kernels share: which pixels a tile holds, how it is loaded, products, and sums over slices.

A *unit* is one (batch, group, head): its tokens attend to each other and to nothing else. Units are
numbered with the head fastest, then the group, then the batch, so that programs that run together
read neighbouring bytes of a channels-last map.

A head dimension is loaded as two power-of-two pieces, D0 and D1 (D1 may be 0): 36 channels then cost
48 lanes and not 64. Every helper takes and returns both; with D1 = 0 the second repeats the first
and is not used.

LAYOUT of a map: 1, channels contiguous; 2, x contiguous; 0, neither. ALIGN is a power of two that
divides (in elements) every offset at which a contiguous run starts, so that loads become as wide
as the layout allows: strides themselves are not specialised, which keeps the compiled variants few.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
EXACT = tl.constexpr("ieee")
"""PRECISION of what is no operand of products, or of exact ones."""


@triton.jit
def unit_of(unit, heads, ph, pw):
    """(batch as int64, head as int64, gy, gx) of a unit or a vector of units."""
    head = unit % heads
    rest = unit // heads
    gx = rest % pw
    rest = rest // pw
    gy = rest % ph
    return (rest // ph).to(tl.int64), head.to(tl.int64), gy, gx


@triton.jit
def group_extent(offset, size, patch):
    """How many of ``size`` rows (columns) lie at ``offset``, less than ``patch``, modulo ``patch``; 0 if none does.

    What is divided does not depend on the offset: a loop over groups finds it done.
    """
    each = size // patch
    return each + (offset < size - each * patch).to(tl.int32)


@triton.jit
def divider(wg):
    """A width as :func:`pixel_of` takes it: with a number whose product with n has n // width in its upper half.

    Numbers are divided once in a program then, and not in every step: a division takes a dozen instructions for each
    pixel of a tile.
    """
    return wg, tl.cast(0xFFFFFFFF, tl.uint32) // tl.maximum(wg, 1).to(tl.uint32) + 1


@triton.jit
def pixel_of(n, width, gy, gx, ph, pw, LINEAR: tl.constexpr, WIDE: tl.constexpr):
    """(y, x) of token n of a group; ``width`` is the :func:`divider` of how many tokens wide it is."""
    if LINEAR:  # patch 1 on a map whose rows follow each other: the launcher has flattened it to one row
        y = tl.zeros_like(n)
        x = n
    else:
        wg, magic = width
        # Exact while pixels * width < 2**32, which the launcher sees to.
        row = n // wg if WIDE else tl.where(wg > 1, tl.umulhi(n.to(tl.uint32), magic).to(tl.int32), n)
        y = gy + row * ph
        x = gx + (n - row * wg) * pw
    if WIDE:
        y = y.to(tl.int64)
        x = x.to(tl.int64)
    return y, x


@triton.jit
def row_offsets(y, x, sy, sx, LAYOUT: tl.constexpr, ALIGN: tl.constexpr, LINEAR: tl.constexpr):
    """Offset of each token inside its (batch, head) plane, for a vector of tokens."""
    if LAYOUT == 2:
        offsets = x if LINEAR else y * sy + x
    else:
        offsets = x * sx if LINEAR else y * sy + x * sx
        if LAYOUT == 1:
            offsets = tl.multiple_of(offsets, ALIGN)
    return offsets


@triton.jit
def plane(batch, head, sb, sh, LAYOUT: tl.constexpr, ALIGN: tl.constexpr):
    """Offset of the (batch, head) plane, 64-bit."""
    offset = batch * sb + head * sh
    if LAYOUT != 0:
        offset = tl.multiple_of(offset, ALIGN)
    return offset


@triton.jit
def dense_strides(heads, D: tl.constexpr, H, W, LAYOUT: tl.constexpr):
    """(batch, head, channel, y, x) strides of a map that the launcher allocated."""
    if LAYOUT == 1:
        pixel = heads * D
        return pixel.to(tl.int64) * H * W, D, 1, W * pixel, pixel
    else:
        area = H * W
        return (heads * D).to(tl.int64) * area, area.to(tl.int64) * D, area, W, 1


@triton.jit
def _piece(
    rows,
    keep,
    sd,
    START: tl.constexpr,
    WIDTH: tl.constexpr,
    D: tl.constexpr,
    LAYOUT: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
):
    # Offsets and mask of channels [START, START + WIDTH): (tokens, channels) where channels are
    # contiguous, else (channels, tokens), so that neighbouring lanes take neighbouring pixels.
    cols = START + tl.arange(0, WIDTH)
    if LAYOUT == 1:
        offsets = rows[:, None] + cols[None, :]
        mask = keep[:, None]
        if START + WIDTH > D:
            mask = mask & (cols < D)[None, :]
    else:
        along = cols.to(tl.int64) * sd if WIDE else cols * sd
        if LAYOUT == 2:
            along = tl.multiple_of(along, ALIGN)
        offsets = along[:, None] + rows[None, :]
        mask = keep[None, :]
        if START + WIDTH > D:
            mask = mask & (cols < D)[:, None]
    return offsets, mask


@triton.jit
def round_tf32(x, PRECISION: tl.constexpr, PURE: tl.constexpr = False):
    """x as an operand of products: for tf32 the nearest number that tf32 has, else x.

    Matrix units cut off the bits that tf32 does not have: that is twice the error of rounding, and always toward 0.
    PyTorch's products (cuBLAS) round to nearest, ties away from 0, as this does. By the instruction's definition NaN
    stays NaN and Inf stays Inf.

    The compiler takes this for an effect, to leave it where it stands. With PURE it may do it anew in the registers of
    each product that takes x: right for an operand of one product, too much for the registers with others.
    """
    if PRECISION == "tf32" and x.dtype == tl.float32:
        x = tl.inline_asm_elementwise("cvt.rna.tf32.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=PURE, pack=1)
    return x


@triton.jit
def round_tile(first, second, D1: tl.constexpr, PRECISION: tl.constexpr):
    """Both pieces of a tile as operands of products."""
    first = round_tf32(first, PRECISION)
    return first, round_tf32(second, PRECISION) if D1 > 0 else first


@triton.jit
def load_tile(
    ptr,
    rows,
    keep,
    sd,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    LAYOUT: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr = EXACT,
):
    """Both pieces of a (tokens, D) tile; zeros outside ``keep`` and past D. PRECISION: of the products it is for."""
    offsets, mask = _piece(rows, keep, sd, 0, D0, D, LAYOUT, ALIGN, WIDE)
    first = round_tf32(tl.load(ptr + offsets, mask=mask, other=0.0), PRECISION)
    if LAYOUT != 1:
        first = tl.trans(first)
    second = first
    if D1 > 0:
        offsets, mask = _piece(rows, keep, sd, D0, D1, D, LAYOUT, ALIGN, WIDE)
        second = round_tf32(tl.load(ptr + offsets, mask=mask, other=0.0), PRECISION)
        if LAYOUT != 1:
            second = tl.trans(second)
    return first, second


@triton.jit
def store_tile(
    ptr,
    first,
    second,
    rows,
    keep,
    sd,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    LAYOUT: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Write a (tokens, D) tile, rounded to the map's dtype."""
    offsets, mask = _piece(rows, keep, sd, 0, D0, D, LAYOUT, ALIGN, WIDE)
    value = first.to(ptr.dtype.element_ty)
    tl.store(ptr + offsets, value if LAYOUT == 1 else tl.trans(value), mask=mask)
    if D1 > 0:
        offsets, mask = _piece(rows, keep, sd, D0, D1, D, LAYOUT, ALIGN, WIDE)
        value = second.to(ptr.dtype.element_ty)
        tl.store(ptr + offsets, value if LAYOUT == 1 else tl.trans(value), mask=mask)


@triton.jit
def dot_nt(a0, a1, b0, b1, D1: tl.constexpr, PRECISION: tl.constexpr):
    """a bᵀ over both pieces of the channels."""
    out = tl.dot(a0, tl.trans(b0), input_precision=PRECISION)
    if D1 > 0:
        out = tl.dot(a1, tl.trans(b1), out, input_precision=PRECISION)
    return out


@triton.jit
def _piece3(rows, keep, sd, START: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, LAYOUT: tl.constexpr):
    # As _piece for (units, tokens): tiles of (units, tokens, channels) or (units, channels, tokens).
    cols = START + tl.arange(0, WIDTH)
    if LAYOUT == 1:
        offsets = rows[:, :, None] + cols[None, None, :]
        mask = keep[:, :, None]
        if START + WIDTH > D:
            mask = mask & (cols < D)[None, None, :]
    else:
        offsets = (cols.to(tl.int64) * sd)[None, :, None] + rows[:, None, :]
        mask = keep[:, None, :]
        if START + WIDTH > D:
            mask = mask & (cols < D)[None, :, None]
    return offsets, mask


@triton.jit
def rows3(base, y, x, sy, sx, LAYOUT: tl.constexpr, ALIGN: tl.constexpr):
    """Full 64-bit offsets of (units, tokens), for units whose planes begin at ``base``."""
    offsets = base[:, None] + (y * sy + x * sx)
    if LAYOUT == 1:
        offsets = tl.multiple_of(offsets, [ALIGN, ALIGN])
    return offsets


@triton.jit
def load_tile3(
    ptr, rows, keep, sd,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, LAYOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """As load_tile, for a (units, tokens, D) tile."""
    offsets, mask = _piece3(rows, keep, sd, 0, D0, D, LAYOUT)
    first = round_tf32(tl.load(ptr + offsets, mask=mask, other=0.0), PRECISION)
    if LAYOUT != 1:
        first = tl.permute(first, (0, 2, 1))
    second = first
    if D1 > 0:
        offsets, mask = _piece3(rows, keep, sd, D0, D1, D, LAYOUT)
        second = round_tf32(tl.load(ptr + offsets, mask=mask, other=0.0), PRECISION)
        if LAYOUT != 1:
            second = tl.permute(second, (0, 2, 1))
    return first, second


@triton.jit
def store_tile3(
    ptr, first, second, rows, keep, sd, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, LAYOUT: tl.constexpr
):
    """As store_tile, for a (units, tokens, D) tile."""
    offsets, mask = _piece3(rows, keep, sd, 0, D0, D, LAYOUT)
    value = first.to(ptr.dtype.element_ty)
    tl.store(ptr + offsets, value if LAYOUT == 1 else tl.permute(value, (0, 2, 1)), mask=mask)
    if D1 > 0:
        offsets, mask = _piece3(rows, keep, sd, D0, D1, D, LAYOUT)
        value = second.to(ptr.dtype.element_ty)
        tl.store(ptr + offsets, value if LAYOUT == 1 else tl.permute(value, (0, 2, 1)), mask=mask)


@triton.jit
def dot3_nt(a0, a1, b0, b1, D1: tl.constexpr, PRECISION: tl.constexpr):
    """a bᵀ per unit, over both pieces of the channels."""
    out = tl.dot(a0, tl.permute(b0, (0, 2, 1)), input_precision=PRECISION)
    if D1 > 0:
        out = tl.dot(a1, tl.permute(b1, (0, 2, 1)), out, input_precision=PRECISION)
    return out


@triton.jit
def exact(high, low, ACC: tl.constexpr):
    """A number that came as two float32, in the type of the sums."""
    return tl.full([1], 0.0, ACC) + high + low


@triton.jit
def slices_of(step, slices, PARTS: tl.constexpr):
    """(numbers of the slices that a step of a second stage adds, which of them there are)."""
    part = step * PARTS + tl.arange(0, PARTS)
    return part.to(tl.int64), part < slices


@triton.jit
def _add_slices(
    sums_ptr, out_ptr, first, size, slices,
    ALIGN: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr, LOOP: tl.constexpr,
):  # fmt: skip
    at = first + tl.arange(0, BLOCK)
    size = tl.multiple_of(size.to(tl.int64), ALIGN)
    keep = at < size
    total = tl.zeros([PARTS, BLOCK], sums_ptr.dtype.element_ty)
    for step in range(0, (slices + PARTS - 1) // PARTS if LOOP == 0 else LOOP):
        part, there = slices_of(step, slices, PARTS)
        inside = there[:, None] & keep[None, :]
        total += tl.load(sums_ptr + (part * size)[:, None] + at[None, :], mask=inside, other=0.0)
    tl.store(out_ptr + at, tl.sum(total, 0).to(out_ptr.dtype.element_ty), mask=keep)


# Second stage of plain sums: one program adds BLOCK elements of (slices, size) over the slices, PARTS of them at once:
# loads that wait for each other would take longer than all else. The order is the same in every run. With PAIR every
# other program does so for the second buffer.
@triton.jit(do_not_specialize=["size", "slices"])
def sum_slices(
    a_sums_ptr, b_sums_ptr, a_ptr, b_ptr, size, slices,
    PAIR: tl.constexpr, ALIGN: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr, LOOP: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    if PAIR:
        if pid % 2 == 0:
            _add_slices(a_sums_ptr, a_ptr, pid // 2 * BLOCK, size, slices, ALIGN, PARTS, BLOCK, LOOP)
        else:
            _add_slices(b_sums_ptr, b_ptr, pid // 2 * BLOCK, size, slices, ALIGN, PARTS, BLOCK, LOOP)
    else:
        _add_slices(a_sums_ptr, a_ptr, pid * BLOCK, size, slices, ALIGN, PARTS, BLOCK, LOOP)
