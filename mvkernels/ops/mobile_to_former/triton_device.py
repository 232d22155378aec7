"""Triton kernels of mobile_to_former. triton_plan.py says what they are launched with.

A *unit* is one (batch, head). Its pixels are cut into slices, a program each, so that few units fill a machine;
tokens come in blocks, padded by mask. A map's tile is (pixels, channels) in two pieces, as patch_attention's
(triton_tiles.py). The forward leaves nothing for the backward, which reads the map twice: for what softmax's
derivative needs of each token's row of scores, a few numbers; then for the gradients, which are made of the same
scores and products. (A row's sum made of the output, which was rounded, leaves a rounding error for the gradient of
a pixel that has nearly all of the softmax, and large queries multiply it.) Every sum over pixels has two stages: in
a program, pixel by pixel; then over the slices, in their order. Sums are float32, float64 for float64.
"""

import triton
import triton.language as tl

from mvkernels.ops.patch_attention.triton_tiles import (
    dense_strides,
    divider,
    dot_nt,
    load_tile,
    pixel_of,
    plane,
    round_tf32,
    row_offsets,
    store_tile,
)


@triton.jit
def exact(high, low, ACC: tl.constexpr):
    """A number that came as two float32, in the type of the sums."""
    return tl.full([1], 0.0, ACC) + high + low


@triton.jit
def load_tokens(
    ptr, batch, head, m, keep, sb, sh, sm, sd,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, LAYOUT: tl.constexpr, ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Both pieces of a (tokens, D) tile of a token set (B, heads, M, D) of any strides, as operands of products."""
    rows = m.to(tl.int64) * sm
    if LAYOUT == 1:
        rows = tl.multiple_of(rows, ALIGN)
    base = ptr + plane(batch, head, sb, sh, LAYOUT, ALIGN)
    return load_tile(base, rows, keep, sd, D, D0, D1, LAYOUT, ALIGN, True, PRECISION)


@triton.jit
def store_tokens(ptr, first, second, rows, keep, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """Write a (tokens, D) tile to the rows of a dense (..., D) buffer, in its dtype."""
    store_tile(ptr, first, second, rows.to(tl.int64) * D, keep, 1, D, D0, D1, 1, 1, True)


_GRAD = ["gsb", "gsh", "gsm", "gsd"]
_QUERY = ["qsb", "qsh", "qsm", "qsd"]
_MAP = ["xsb", "xsh", "xsd", "xsy", "xsx"]
_SIZES = ["heads", "H", "W", "blocks", "slices", "steps", "rows"]


# One program: a block of tokens against one slice of a unit's pixels, running maximum. With one slice it writes
# the result; else (SPLIT) what it summed, not yet divided, for forward_merge, with the highest score, times log2(e),
# and the sum of the powers of two of the differences to it.
@triton.jit(do_not_specialize=_QUERY + _MAP + _SIZES)
def forward_slices(
    q_ptr, x_ptr, out_ptr, stats_ptr, scale2, scale2_low,
    qsb, qsh, qsm, qsd, xsb, xsh, xsd, xsy, xsx, heads, H, W, blocks, slices, steps, rows,
    M: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    LQ: tl.constexpr, AQ: tl.constexpr, LX: tl.constexpr, AX: tl.constexpr, N_ALIGN: tl.constexpr,
    LINEAR: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr,
    TOKENS: tl.constexpr, BLOCK: tl.constexpr, LOOP: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    unit, block, part = unit_of(tl.program_id(0), heads, blocks, slices)
    batch = unit // heads
    head = unit % heads
    factor = exact(scale2, scale2_low, ACC)
    m = block * TOKENS + tl.arange(0, TOKENS)
    keep_m = m < M
    q0, q1 = load_tokens(q_ptr, batch, head, m, keep_m, qsb, qsh, qsm, qsd, D, D0, D1, LQ, AQ, PRECISION)
    x_ptr += plane(batch, head, xsb, xsh, LX, AX)
    pixels = tl.multiple_of(H * W, N_ALIGN)
    top = tl.full([TOKENS], -float("inf"), ACC)
    total = tl.zeros([TOKENS], ACC)
    sum0 = tl.zeros([TOKENS, D0], ACC)
    sum1 = tl.zeros([TOKENS, D1 if D1 > 0 else 1], ACC)
    for step in range(0, steps if LOOP == 0 else LOOP):
        n = (part.to(tl.int32) * steps + step) * BLOCK + tl.arange(0, BLOCK)
        keep = n < pixels
        y, x = pixel_of(n, divider(W), 0, 0, 1, 1, LINEAR, WIDE)
        x0, x1 = load_tile(
            x_ptr, row_offsets(y, x, xsy, xsx, LX, AX, LINEAR), keep, xsd, D, D0, D1, LX, AX, WIDE, PRECISION
        )
        scores = tl.where(keep[None, :], dot_nt(q0, q1, x0, x1, D1, PRECISION) * factor, -float("inf"))
        highest = tl.maximum(top, tl.max(scores, 1))
        # A row with no score above -inf yet has to stay 0, not become inf - inf.
        base = tl.where(highest == -float("inf"), 0.0, highest)
        p = tl.exp2(scores - base[:, None])
        fade = tl.exp2(top - base)
        top = highest
        total = total * fade + tl.sum(p, 1)
        p = round_tf32(p.to(x0.dtype), PRECISION)
        sum0 = tl.dot(p, x0, sum0 * fade[:, None], input_precision=PRECISION, out_dtype=ACC)
        if D1 > 0:
            sum1 = tl.dot(p, x1, sum1 * fade[:, None], input_precision=PRECISION, out_dtype=ACC)
    row = unit * M + m
    if SPLIT:
        row += part * rows
        tl.store(stats_ptr + row * 2, top, mask=keep_m)
        tl.store(stats_ptr + row * 2 + 1, total, mask=keep_m)
    else:
        sum0 = sum0 / total[:, None]
        sum1 = sum1 / total[:, None]
    store_tokens(out_ptr, sum0, sum1, row, keep_m, D, D0, D1)


# Second stage: one program takes ROWS rows (batch, head, token) over all slices, in their order.
@triton.jit(do_not_specialize=["rows", "slices"])
def forward_merge(
    sums_ptr, stats_ptr, out_ptr, rows, slices,
    D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, LOOP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    keep = row < rows
    cols = tl.arange(0, WIDTH)
    inside = keep[:, None] & (cols < D)[None, :]
    highest = tl.full([ROWS], -float("inf"), stats_ptr.dtype.element_ty)
    for part in range(0, slices if LOOP == 0 else LOOP):
        highest = tl.maximum(highest, tl.load(stats_ptr + (row + part * rows) * 2, mask=keep, other=0.0))
    base = tl.where(highest == -float("inf"), 0.0, highest)
    total = tl.zeros([ROWS], stats_ptr.dtype.element_ty)
    sums = tl.zeros([ROWS, WIDTH], stats_ptr.dtype.element_ty)
    for part in range(0, slices if LOOP == 0 else LOOP):
        at = row + part * rows
        weight = tl.exp2(tl.load(stats_ptr + at * 2, mask=keep, other=0.0) - base)
        total += weight * tl.load(stats_ptr + at * 2 + 1, mask=keep, other=0.0)
        sums += weight[:, None] * tl.load(sums_ptr + at[:, None] * D + cols[None, :], mask=inside, other=0.0)
    out = sums / total[:, None]
    tl.store(out_ptr + row[:, None] * D + cols[None, :], out.to(out_ptr.dtype.element_ty), mask=inside)


# Scores (pixels, tokens), -inf outside. With this choice after it the product is rounded in both stages alike: the
# compiler cannot fuse it with the difference to the highest score.
@triton.jit
def masked(products, factor, inside):
    return tl.where(inside, products * factor, -float("inf"))


# What is known of the rows of scores, one of a token, with one tile of scores and dP (pixels, tokens) more: the
# highest score; the sum of e = 2 ** (score - highest); which pixel has the highest; the base, that pixel's dP; and
# the rest, the sum of e (dP - base). The gradients of the scores do not depend on the base. With this one all terms
# of the rest are of other pixels: its error is relative to their weight, and not to a dP that cancels out.
# Each element of the tile has its own, of the pixels that it has met: nothing is exchanged between threads until
# rows_of puts them together.
@triton.jit
def add_tile(scores, dp, n, top, total, index, base, rest):
    higher = scores > top
    highest = tl.maximum(top, scores)
    # An element with no score above -inf yet has to stay 0, not become inf - inf.
    shift = tl.where(highest == -float("inf"), 0.0, highest)
    fade = tl.exp2(top - shift)
    e = tl.exp2(scores - shift)
    moved = tl.where(higher, dp, base)
    # At the first pixel this adds 0 times the base: all of the row is NaN where that is not finite, as it should be.
    rest = rest * fade + total * fade * (base - moved) + tl.where(higher, 0.0, e * (dp - moved))
    total = total * fade + e
    return highest, total, tl.where(higher, n[:, None], index), moved, rest


@triton.jit
def rows_of(top, total, index, base, rest):
    """(top, total, index, base, rest) of the tokens, from those of the elements of a tile."""
    highest = tl.max(top, 0)
    at = tl.min(tl.where(top == highest[None, :], index, 2147483647), 0)
    own = (top == highest[None, :]) & (index == at[None, :])
    moved = tl.sum(tl.where(own, base, 0.0), 0)
    fade = tl.exp2(top - tl.where(highest == -float("inf"), 0.0, highest)[None, :])
    rest = tl.sum(fade * (rest + total * (base - moved[None, :])), 0)
    return highest, tl.sum(fade * total, 0), at, moved, rest


@triton.jit
def no_tile(BLOCK: tl.constexpr, TOKENS: tl.constexpr, ACC: tl.constexpr):
    """(top, total, index, base, rest) of the elements before the first tile: each pixel another's index."""
    zero = tl.zeros([BLOCK, TOKENS], ACC)
    index = tl.zeros([BLOCK, TOKENS], tl.int32) + tl.arange(0, BLOCK)[:, None]
    return tl.full([BLOCK, TOKENS], -float("inf"), ACC), zero, index, zero, zero


@triton.jit
def store_rows(stats_ptr, index_ptr, row, keep, top, total, index, base, rest):
    """What is known of rows, as add_tile names it, to (rows, 4) and (rows)."""
    tl.store(stats_ptr + row * 4, top, mask=keep)
    tl.store(stats_ptr + row * 4 + 1, total, mask=keep)
    tl.store(stats_ptr + row * 4 + 2, base, mask=keep)
    tl.store(stats_ptr + row * 4 + 3, rest, mask=keep)
    tl.store(index_ptr + row, index, mask=keep)


@triton.jit
def load_rows(stats_ptr, index_ptr, row, keep):
    """(top, total, index, base, rest) as store_rows left them; of no row, those that make gradients of 0."""
    top = tl.load(stats_ptr + row * 4, mask=keep, other=0.0)
    total = tl.load(stats_ptr + row * 4 + 1, mask=keep, other=1.0)
    base = tl.load(stats_ptr + row * 4 + 2, mask=keep, other=0.0)
    rest = tl.load(stats_ptr + row * 4 + 3, mask=keep, other=0.0)
    return top, total, tl.load(index_ptr + row, mask=keep, other=0), base, rest


# The backward's first stage. One program: a block of tokens against one slice of a unit's pixels. It has the tokens and
# their gradient in registers, reads the slice once, and writes four numbers and an index of each token.
@triton.jit(do_not_specialize=_GRAD + _QUERY + _MAP + _SIZES)
def backward_rows(
    g_ptr, q_ptr, x_ptr, stats_ptr, index_ptr, scale2, scale2_low,
    gsb, gsh, gsm, gsd, qsb, qsh, qsm, qsd, xsb, xsh, xsd, xsy, xsx, heads, H, W, blocks, slices, steps, rows,
    M: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    LG: tl.constexpr, AG: tl.constexpr, LQ: tl.constexpr, AQ: tl.constexpr, LX: tl.constexpr, AX: tl.constexpr,
    N_ALIGN: tl.constexpr, LINEAR: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    TOKENS: tl.constexpr, BLOCK: tl.constexpr, LOOP: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    unit, block, part = unit_of(tl.program_id(0), heads, blocks, slices)
    batch = unit // heads
    head = unit % heads
    factor = exact(scale2, scale2_low, ACC)
    m = block * TOKENS + tl.arange(0, TOKENS)
    keep_m = m < M
    q0, q1 = load_tokens(q_ptr, batch, head, m, keep_m, qsb, qsh, qsm, qsd, D, D0, D1, LQ, AQ, PRECISION)
    g0, g1 = load_tokens(g_ptr, batch, head, m, keep_m, gsb, gsh, gsm, gsd, D, D0, D1, LG, AG, PRECISION)
    x_ptr += plane(batch, head, xsb, xsh, LX, AX)
    pixels = tl.multiple_of(H * W, N_ALIGN)
    top, total, index, base, rest = no_tile(BLOCK, TOKENS, ACC)
    for step in range(0, steps if LOOP == 0 else LOOP):
        n = (part.to(tl.int32) * steps + step) * BLOCK + tl.arange(0, BLOCK)
        keep = n < pixels
        y, x = pixel_of(n, divider(W), 0, 0, 1, 1, LINEAR, WIDE)
        x0, x1 = load_tile(
            x_ptr, row_offsets(y, x, xsy, xsx, LX, AX, LINEAR), keep, xsd, D, D0, D1, LX, AX, WIDE, PRECISION
        )
        scores = masked(dot_nt(x0, x1, q0, q1, D1, PRECISION), factor, keep[:, None] & keep_m[None, :])
        dp = dot_nt(x0, x1, g0, g1, D1, PRECISION)
        top, total, index, base, rest = add_tile(scores, dp, n, top, total, index, base, rest)
    top, total, index, base, rest = rows_of(top, total, index, base, rest)
    store_rows(stats_ptr, index_ptr, unit * M + m + part * rows, keep_m, top, total, index, base, rest)


# Where there is more than one slice: one program takes ROWS rows over all slices, in their order. The next stage then
# reads a row once, however many slices there are: with many tokens it reads each row for every tile of pixels.
@triton.jit(do_not_specialize=["rows", "slices"])
def backward_merge(
    stats_parts_ptr, index_parts_ptr, stats_ptr, index_ptr, rows, slices, ROWS: tl.constexpr, LOOP: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    keep = row < rows
    top, total, index, base, rest = load_rows(stats_parts_ptr, index_parts_ptr, row, keep)
    for part in range(1, slices if LOOP == 0 else LOOP):
        at = row + part * rows
        top_b, total_b, index_b, base_b, rest_b = load_rows(stats_parts_ptr, index_parts_ptr, at, keep)
        higher = top_b > top
        highest = tl.maximum(top, top_b)
        shift = tl.where(highest == -float("inf"), 0.0, highest)
        moved = tl.where(higher, base_b, base)
        fade = tl.exp2(top - shift)
        fade_b = tl.exp2(top_b - shift)
        rest = fade * (rest + total * (base - moved)) + fade_b * (rest_b + total_b * (base_b - moved))
        total = fade * total + fade_b * total_b
        top = highest
        index = tl.where(higher, index_b, index)
        base = moved
    store_rows(stats_ptr, index_ptr, row, keep, top, total, index, base, rest)


# Probabilities and the gradient of the scores, (pixels, tokens), of a tile's scores and dP. backward_rows had the
# same scores, for it sums the same tiles in the same way: where a pixel is all of a row p is 1, and the gradient of
# its score 0.
@triton.jit
def gradients(scores, dp, n, inside, top, total, index, base, rest):
    share = 1.0 / total
    shift = tl.where(top == -float("inf"), 0.0, top)
    rest = rest * share
    p = tl.exp2(scores - shift[None, :]) * share[None, :]
    # The base cancels out for the row's own pixel alone; for the others what it rounds off is relative to their weight.
    dp = tl.where(n[:, None] == index[None, :], -rest[None, :], dp - (base + rest)[None, :])
    return p, tl.where(inside, p * dp, 0.0)


# Queries of a block of tokens, their gradient, and what is known of their rows.
@triton.jit
def _token_block(
    block, batch, head, unit, q_ptr, g_ptr, stats_ptr, index_ptr,
    qsb, qsh, qsm, qsd, gsb, gsh, gsm, gsd,
    M: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    LQ: tl.constexpr, AQ: tl.constexpr, LG: tl.constexpr, AG: tl.constexpr, TOKENS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    m = block * TOKENS + tl.arange(0, TOKENS)
    keep = m < M
    q0, q1 = load_tokens(q_ptr, batch, head, m, keep, qsb, qsh, qsm, qsd, D, D0, D1, LQ, AQ, PRECISION)
    g0, g1 = load_tokens(g_ptr, batch, head, m, keep, gsb, gsh, gsm, gsd, D, D0, D1, LG, AG, PRECISION)
    top, total, index, base, rest = load_rows(stats_ptr, index_ptr, unit * M + m, keep)
    return q0, q1, g0, g1, keep, top, total, index, base, rest


@triton.jit
def _gradients(
    x0, x1, n, keep, q0, q1, g0, g1, keep_m, top, total, index, base, rest, factor,
    D1: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    inside = keep[:, None] & keep_m[None, :]
    scores = masked(dot_nt(x0, x1, q0, q1, D1, PRECISION), factor, inside)
    dp = dot_nt(x0, x1, g0, g1, D1, PRECISION)
    p, ds = gradients(scores, dp, n, inside, top, total, index, base, rest)
    return round_tf32(p.to(x0.dtype), PRECISION), round_tf32(ds.to(x0.dtype), PRECISION)


# One program, one slice of a unit's pixels: DX, their gradient, from all tokens; DTOKENS, what they add to dquery.
# Both at once with one block of tokens; beyond that a launch each, the second with a program for each block.
@triton.jit(do_not_specialize=_GRAD + _QUERY + _MAP + _SIZES)
def backward_slices(
    g_ptr, q_ptr, x_ptr, stats_ptr, index_ptr, dq_ptr, dx_ptr, scale, scale_low, scale2, scale2_low,
    gsb, gsh, gsm, gsd, qsb, qsh, qsm, qsd, xsb, xsh, xsd, xsy, xsx,
    heads, H, W, blocks, slices, steps, rows,
    M: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    LG: tl.constexpr, AG: tl.constexpr, LQ: tl.constexpr, AQ: tl.constexpr,
    LX: tl.constexpr, AX: tl.constexpr, LD: tl.constexpr, AD: tl.constexpr, N_ALIGN: tl.constexpr,
    LINEAR: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, DX: tl.constexpr, DTOKENS: tl.constexpr,
    TOKENS: tl.constexpr, BLOCK: tl.constexpr, LOOP: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    unit, block, part = unit_of(tl.program_id(0), heads, blocks, slices)
    batch = unit // heads
    head = unit % heads
    factor = exact(scale2, scale2_low, ACC)
    scale = exact(scale, scale_low, ACC)
    x_ptr += plane(batch, head, xsb, xsh, LX, AX)
    dxb, dxh, dxd, dxy, dxx = dense_strides(heads, D, H, W, LD)
    dx_ptr += plane(batch, head, dxb, dxh, LD, AD)
    pixels = tl.multiple_of(H * W, N_ALIGN)
    q0, q1, g0, g1, keep_m, top, total, index, base, rest = _token_block(
        block, batch, head, unit, q_ptr, g_ptr, stats_ptr, index_ptr,
        qsb, qsh, qsm, qsd, gsb, gsh, gsm, gsd, M, D, D0, D1, LQ, AQ, LG, AG, TOKENS, PRECISION,
    )  # fmt: skip
    dq0 = tl.zeros([TOKENS, D0], ACC)
    dq1 = tl.zeros([TOKENS, D1 if D1 > 0 else 1], ACC)
    for step in range(0, steps if LOOP == 0 else LOOP):
        n = (part.to(tl.int32) * steps + step) * BLOCK + tl.arange(0, BLOCK)
        keep = n < pixels
        y, x = pixel_of(n, divider(W), 0, 0, 1, 1, LINEAR, WIDE)
        x0, x1 = load_tile(
            x_ptr, row_offsets(y, x, xsy, xsx, LX, AX, LINEAR), keep, xsd, D, D0, D1, LX, AX, WIDE, PRECISION
        )
        p, ds = _gradients(
            x0, x1, n, keep, q0, q1, g0, g1, keep_m, top, total, index, base, rest, factor, D1, PRECISION
        )
        if DTOKENS:
            dst = tl.trans(ds)
            dq0 = tl.dot(dst, x0, dq0, input_precision=PRECISION, out_dtype=ACC)
            if D1 > 0:
                dq1 = tl.dot(dst, x1, dq1, input_precision=PRECISION, out_dtype=ACC)
        if DX:
            dx0 = tl.dot(ds, q0, input_precision=PRECISION, out_dtype=ACC) * scale
            dx0 = tl.dot(p, g0, dx0, input_precision=PRECISION, out_dtype=ACC)
            dx1 = dx0
            if D1 > 0:
                dx1 = tl.dot(ds, q1, input_precision=PRECISION, out_dtype=ACC) * scale
                dx1 = tl.dot(p, g1, dx1, input_precision=PRECISION, out_dtype=ACC)
            for other in range(1, (M + TOKENS - 1) // TOKENS):
                a0, a1, b0, b1, keep_b, top_b, total_b, index_b, base_b, rest_b = _token_block(
                    other, batch, head, unit, q_ptr, g_ptr, stats_ptr, index_ptr,
                    qsb, qsh, qsm, qsd, gsb, gsh, gsm, gsd, M, D, D0, D1, LQ, AQ, LG, AG, TOKENS, PRECISION,
                )  # fmt: skip
                p, ds = _gradients(
                    x0, x1, n, keep, a0, a1, b0, b1, keep_b, top_b, total_b, index_b, base_b, rest_b, factor,
                    D1, PRECISION,
                )  # fmt: skip
                dx0 += tl.dot(ds, a0, input_precision=PRECISION, out_dtype=ACC) * scale
                dx0 = tl.dot(p, b0, dx0, input_precision=PRECISION, out_dtype=ACC)
                if D1 > 0:
                    dx1 += tl.dot(ds, a1, input_precision=PRECISION, out_dtype=ACC) * scale
                    dx1 = tl.dot(p, b1, dx1, input_precision=PRECISION, out_dtype=ACC)
            at = row_offsets(y, x, dxy, dxx, LD, AD, LINEAR)
            store_tile(dx_ptr, dx0, dx1, at, keep, dxd, D, D0, D1, LD, AD, WIDE)
    if DTOKENS:
        m = block * TOKENS + tl.arange(0, TOKENS)
        row = unit * M + m + part * rows
        if D1 > 0:
            dq1 = dq1 * scale
        store_tokens(dq_ptr, dq0 * scale, dq1, row, m < M, D, D0, D1)


@triton.jit
def unit_of(pid, heads, blocks, slices):
    """(batch * heads + head as int64, block of tokens, slice) of a program.

    The head is fastest: heads of a pixel are neighbours in a channels-last map, and run together.
    """
    head = pid % heads
    rest = pid // heads
    part = rest % slices
    rest = rest // slices
    block = rest % blocks
    return (rest // blocks).to(tl.int64) * heads + head, block, part.to(tl.int64)


@triton.jit
def _add_slices(sums_ptr, out_ptr, first, size, slices, BLOCK: tl.constexpr, LOOP: tl.constexpr):
    at = first + tl.arange(0, BLOCK)
    keep = at < size
    total = tl.zeros([BLOCK], sums_ptr.dtype.element_ty)
    for part in range(0, slices if LOOP == 0 else LOOP):
        total += tl.load(sums_ptr + part * size + at, mask=keep, other=0.0)
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=keep)


# Second stage of plain sums: one program adds BLOCK elements of (slices, size) over the slices, in their order;
# with PAIR every other program does so for the second buffer.
@triton.jit(do_not_specialize=["size", "slices"])
def sum_slices(
    a_sums_ptr, b_sums_ptr, a_ptr, b_ptr, size, slices, PAIR: tl.constexpr, BLOCK: tl.constexpr, LOOP: tl.constexpr
):
    pid = tl.program_id(0).to(tl.int64)
    if PAIR:
        if pid % 2 == 0:
            _add_slices(a_sums_ptr, a_ptr, pid // 2 * BLOCK, size, slices, BLOCK, LOOP)
        else:
            _add_slices(b_sums_ptr, b_ptr, pid // 2 * BLOCK, size, slices, BLOCK, LOOP)
    else:
        _add_slices(a_sums_ptr, a_ptr, pid * BLOCK, size, slices, BLOCK, LOOP)
