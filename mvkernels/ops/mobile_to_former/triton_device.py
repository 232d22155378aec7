"""Triton kernels of mobile_to_former. triton_plan.py says what they are launched with.

A *unit* is one (batch, head). Its pixels are cut into slices, a program each, so that few units fill a
machine; tokens come in blocks, padded by mask. A map's tile is (pixels, channels) in two pieces, as
patch_attention's (triton_tiles.py). Of a token's scores two numbers are kept: the highest, times log2(e), and
the sum of the exponentials of the differences to it. (Their logarithm alone would cost a digit of the probabilities
that the backward makes of it. And an output rounded to a half type would cost the gradient of a token that attends
to one pixel all of its digits: it is the difference of two large numbers.) Every sum over pixels has two stages: in
a program, pixel by pixel; then over the slices, in their order. Sums are float32, float64 for float64.
"""

import triton
import triton.language as tl

from mvkernels.ops.patch_attention.triton_tiles import (
    dense_strides,
    dot_nt,
    load_tile,
    pixel_of,
    plane,
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
):  # fmt: skip
    """Both pieces of a (tokens, D) tile of a token set (B, heads, M, D) of any strides."""
    rows = m.to(tl.int64) * sm
    if LAYOUT == 1:
        rows = tl.multiple_of(rows, ALIGN)
    base = ptr + plane(batch, head, sb, sh, LAYOUT, ALIGN)
    return load_tile(base, rows, keep, sd, D, D0, D1, LAYOUT, ALIGN, True)


@triton.jit
def store_tokens(ptr, first, second, rows, keep, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """Write a (tokens, D) tile to the rows of a dense (..., D) buffer, in its dtype."""
    store_tile(ptr, first, second, rows.to(tl.int64) * D, keep, 1, D, D0, D1, 1, 1, True)


@triton.jit
def dot_rows(a0, a1, b0, b1, D1: tl.constexpr, ACC: tl.constexpr):
    """Sums over channels of a b, row by row, in the type of the sums."""
    total = tl.sum(a0.to(ACC) * b0.to(ACC), 1)
    if D1 > 0:
        total += tl.sum(a1.to(ACC) * b1.to(ACC), 1)
    return total


_QUERY = ["qsb", "qsh", "qsm", "qsd"]
_MAP = ["xsb", "xsh", "xsd", "xsy", "xsx"]
_SIZES = ["heads", "H", "W", "blocks", "slices", "steps"]


# One program: a block of tokens against one slice of a unit's pixels, running maximum. With one slice it writes
# the result (EXACT: and once more, before it is rounded); else what it summed, not yet divided, for forward_merge.
@triton.jit(do_not_specialize=_QUERY + _MAP + _SIZES)
def forward_slices(
    q_ptr, x_ptr, out_ptr, stats_ptr, exact_ptr, scale2, scale2_low,
    qsb, qsh, qsm, qsd, xsb, xsh, xsd, xsy, xsx, heads, H, W, blocks, slices, steps, rows,
    M: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    LQ: tl.constexpr, AQ: tl.constexpr, LX: tl.constexpr, AX: tl.constexpr, N_ALIGN: tl.constexpr,
    LINEAR: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr, EXACT: tl.constexpr,
    TOKENS: tl.constexpr, BLOCK: tl.constexpr, LOOP: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    pid = tl.program_id(0)
    unit, block, part = unit_of(pid, heads, blocks, slices)
    batch = unit // heads
    head = unit % heads
    factor = exact(scale2, scale2_low, ACC)
    m = block * TOKENS + tl.arange(0, TOKENS)
    keep_m = m < M
    q0, q1 = load_tokens(q_ptr, batch, head, m, keep_m, qsb, qsh, qsm, qsd, D, D0, D1, LQ, AQ)
    x_ptr += plane(batch, head, xsb, xsh, LX, AX)
    pixels = tl.multiple_of(H * W, N_ALIGN)
    top = tl.full([TOKENS], -float("inf"), ACC)
    total = tl.zeros([TOKENS], ACC)
    sum0 = tl.zeros([TOKENS, D0], ACC)
    sum1 = tl.zeros([TOKENS, D1 if D1 > 0 else 1], ACC)
    for step in range(0, steps if LOOP == 0 else LOOP):
        n = (part.to(tl.int32) * steps + step) * BLOCK + tl.arange(0, BLOCK)
        keep = n < pixels
        y, x = pixel_of(n, W, 0, 0, 1, 1, LINEAR, WIDE)
        x0, x1 = load_tile(x_ptr, row_offsets(y, x, xsy, xsx, LX, AX, LINEAR), keep, xsd, D, D0, D1, LX, AX, WIDE)
        scores = tl.where(keep[None, :], dot_nt(q0, q1, x0, x1, D1, PRECISION) * factor, -float("inf"))
        highest = tl.maximum(top, tl.max(scores, 1))
        # A row with no score above -inf yet has to stay 0, not become inf - inf.
        base = tl.where(highest == -float("inf"), 0.0, highest)
        p = tl.exp2(scores - base[:, None])
        fade = tl.exp2(top - base)
        top = highest
        total = total * fade + tl.sum(p, 1)
        p = p.to(x0.dtype)
        sum0 = tl.dot(p, x0, sum0 * fade[:, None], input_precision=PRECISION, out_dtype=ACC)
        if D1 > 0:
            sum1 = tl.dot(p, x1, sum1 * fade[:, None], input_precision=PRECISION, out_dtype=ACC)
    row = unit * M + m
    if SPLIT:
        row += part * rows
    else:
        sum0 = sum0 / total[:, None]
        sum1 = sum1 / total[:, None]
    tl.store(stats_ptr + row * 2, top, mask=keep_m)
    tl.store(stats_ptr + row * 2 + 1, total, mask=keep_m)
    store_tokens(out_ptr, sum0, sum1, row, keep_m, D, D0, D1)
    if EXACT:
        store_tokens(exact_ptr, sum0, sum1, row, keep_m, D, D0, D1)


# Second stage: one program takes ROWS rows (batch, head, token) over all slices, in their order.
@triton.jit(do_not_specialize=["rows", "slices"])
def forward_merge(
    sums_ptr, stats_ptr, out_ptr, merged_ptr, exact_ptr, rows, slices,
    D: tl.constexpr, EXACT: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, LOOP: tl.constexpr,
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
    tl.store(merged_ptr + row * 2, highest, mask=keep)
    tl.store(merged_ptr + row * 2 + 1, total, mask=keep)
    out = sums / total[:, None]
    tl.store(out_ptr + row[:, None] * D + cols[None, :], out.to(out_ptr.dtype.element_ty), mask=inside)
    if EXACT:
        tl.store(exact_ptr + row[:, None] * D + cols[None, :], out, mask=inside)


# What the backward has to know of a block of tokens.
@triton.jit
def _token_block(
    block, batch, head, unit, q_ptr, g_ptr, o_ptr, stats_ptr,
    qsb, qsh, qsm, qsd, gsb, gsh, gsm, gsd, osb, osh, osm, osd,
    M: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    LQ: tl.constexpr, AQ: tl.constexpr, LG: tl.constexpr, AG: tl.constexpr, LO: tl.constexpr, AO: tl.constexpr,
    TOKENS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    m = block * TOKENS + tl.arange(0, TOKENS)
    keep = m < M
    q0, q1 = load_tokens(q_ptr, batch, head, m, keep, qsb, qsh, qsm, qsd, D, D0, D1, LQ, AQ)
    g0, g1 = load_tokens(g_ptr, batch, head, m, keep, gsb, gsh, gsm, gsd, D, D0, D1, LG, AG)
    o0, o1 = load_tokens(o_ptr, batch, head, m, keep, osb, osh, osm, osd, D, D0, D1, LO, AO)
    top = tl.load(stats_ptr + (unit * M + m) * 2, mask=keep, other=0.0)
    share = 1.0 / tl.load(stats_ptr + (unit * M + m) * 2 + 1, mask=keep, other=1.0)
    base = tl.where(top == -float("inf"), 0.0, top)
    return q0, q1, g0, g1, base, share, dot_rows(g0, g1, o0, o1, D1, ACC), keep


# Probabilities and the gradient of the scores, (pixels, tokens), of a tile and a block of tokens.
@triton.jit
def _gradients(
    x0, x1, keep, several, q0, q1, g0, g1, base, share, delta, keep_m, factor, D1: tl.constexpr, PRECISION: tl.constexpr
):
    inside = keep[:, None] & keep_m[None, :]
    p = tl.where(inside, tl.exp2(dot_nt(x0, x1, q0, q1, D1, PRECISION) * factor - base[None, :]) * share[None, :], 0.0)
    # The score of an only pixel has no gradient, nor has one that is all of the softmax: two ways to round the same
    # sum would leave some, and large queries multiply it.
    below_1 = tl.where(p >= 1.0, 0.0, p)
    ds = tl.where(inside & several, below_1 * (dot_nt(x0, x1, g0, g1, D1, PRECISION) - delta[None, :]), 0.0)
    return p.to(x0.dtype), ds.to(x0.dtype)


# One program, one slice of a unit's pixels: DX, their gradient, from all tokens; DTOKENS, what they add to dquery.
# Both at once with one block of tokens; beyond that a launch each, the second with a program for each block.
@triton.jit(do_not_specialize=_QUERY + _MAP + _SIZES + ["gsb", "gsh", "gsm", "gsd", "osb", "osh", "osm", "osd"])
def backward_slices(
    g_ptr, q_ptr, x_ptr, o_ptr, stats_ptr, dq_ptr, dx_ptr, scale, scale_low, scale2, scale2_low,
    gsb, gsh, gsm, gsd, qsb, qsh, qsm, qsd, osb, osh, osm, osd, xsb, xsh, xsd, xsy, xsx,
    heads, H, W, blocks, slices, steps, rows,
    M: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    LG: tl.constexpr, AG: tl.constexpr, LQ: tl.constexpr, AQ: tl.constexpr, LO: tl.constexpr, AO: tl.constexpr,
    LX: tl.constexpr, AX: tl.constexpr, LD: tl.constexpr, AD: tl.constexpr, N_ALIGN: tl.constexpr,
    LINEAR: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, DX: tl.constexpr, DTOKENS: tl.constexpr,
    TOKENS: tl.constexpr, BLOCK: tl.constexpr, LOOP: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    pid = tl.program_id(0)
    unit, block, part = unit_of(pid, heads, blocks, slices)
    batch = unit // heads
    head = unit % heads
    factor = exact(scale2, scale2_low, ACC)
    scale = exact(scale, scale_low, ACC)
    x_ptr += plane(batch, head, xsb, xsh, LX, AX)
    dxb, dxh, dxd, dxy, dxx = dense_strides(heads, D, H, W, LD)
    dx_ptr += plane(batch, head, dxb, dxh, LD, AD)
    pixels = tl.multiple_of(H * W, N_ALIGN)
    q0, q1, g0, g1, base, share, delta, keep_m = _token_block(
        block, batch, head, unit, q_ptr, g_ptr, o_ptr, stats_ptr,
        qsb, qsh, qsm, qsd, gsb, gsh, gsm, gsd, osb, osh, osm, osd,
        M, D, D0, D1, LQ, AQ, LG, AG, LO, AO, TOKENS, ACC,
    )  # fmt: skip
    dq0 = tl.zeros([TOKENS, D0], ACC)
    dq1 = tl.zeros([TOKENS, D1 if D1 > 0 else 1], ACC)
    for step in range(0, steps if LOOP == 0 else LOOP):
        n = (part.to(tl.int32) * steps + step) * BLOCK + tl.arange(0, BLOCK)
        keep = n < pixels
        y, x = pixel_of(n, W, 0, 0, 1, 1, LINEAR, WIDE)
        x0, x1 = load_tile(x_ptr, row_offsets(y, x, xsy, xsx, LX, AX, LINEAR), keep, xsd, D, D0, D1, LX, AX, WIDE)
        p, ds = _gradients(x0, x1, keep, pixels > 1, q0, q1, g0, g1, base, share, delta, keep_m, factor, D1, PRECISION)
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
                a0, a1, b0, b1, base_b, share_b, delta_b, keep_b = _token_block(
                    other, batch, head, unit, q_ptr, g_ptr, o_ptr, stats_ptr,
                    qsb, qsh, qsm, qsd, gsb, gsh, gsm, gsd, osb, osh, osm, osd,
                    M, D, D0, D1, LQ, AQ, LG, AG, LO, AO, TOKENS, ACC,
                )  # fmt: skip
                p, ds = _gradients(
                    x0, x1, keep, pixels > 1, a0, a1, b0, b1, base_b, share_b, delta_b, keep_b, factor, D1, PRECISION
                )
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
