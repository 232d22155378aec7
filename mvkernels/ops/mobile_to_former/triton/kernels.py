"""Triton kernels of mobile_to_former. plan.py says what they are launched with.

Units, slices and blocks of tokens are those of mvkernels/triton/bridge, tiles those of mvkernels/triton. The forward
leaves nothing for the backward, which reads the map twice: for what softmax's derivative needs of each token's row of
scores, a few numbers; then for the gradients, which are made of the same scores and products. (A row's sum made of the
output, which was rounded, leaves a rounding error for the gradient of a pixel that has nearly all of the softmax, and
large queries multiply it.) Every sum over pixels has two stages: in
a program, pixel by pixel; then over the slices, in their order. Sums are float32, float64 for float64.
"""

import triton
import triton.language as tl

from mvkernels.ops.mobile_to_former.triton.row_kernels import (
    add_tile,
    gradients,
    load_rows,
    masked,
    no_tile,
    rows_of,
    store_rows,
)
from mvkernels.triton.bridge.tiles import (
    GRAD,
    MAP,
    QUERY,
    SIZES,
    add_pixels,
    along_tokens,
    inside,
    load_tokens,
    no_sums,
    of_all,
    place,
    store_tokens,
    unit_of,
)
from mvkernels.triton.tiles import (
    dense_strides,
    divider,
    dot_nt,
    exact,
    load_tile,
    plane,
    round_tf32,
    slices_of,
    store_tile,
)


# One program: a block of tokens against one slice of a unit's pixels, running maximum. With one slice it writes
# the result; else (SPLIT) what it summed, not yet divided, for forward_merge, with the highest score, times log2(e),
# and the sum of the powers of two of the differences to it.
@triton.jit(do_not_specialize=QUERY + MAP + SIZES)
def forward_slices(
    q_ptr, x_ptr, out_ptr, stats_ptr, scale2, scale2_low,
    qsb, qsh, qsm, qsd, xsb, xsh, xsd, xsy, xsx, heads, H, W, blocks, slices, steps, rows,
    M: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    LQ: tl.constexpr, AQ: tl.constexpr, LX: tl.constexpr, AX: tl.constexpr, N_ALIGN: tl.constexpr,
    LINEAR: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr,
    WHOLE: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr, LOOP: tl.constexpr,
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
    width = divider(W)
    for step in range(0, steps if LOOP == 0 else LOOP):
        start = (part.to(tl.int32) * steps + step) * BLOCK
        keep = inside(start, pixels, BLOCK, WHOLE)
        tile, at = place(x_ptr, start, width, xsy, xsx, BLOCK, LX, AX, LINEAR, WIDE)
        x0, x1 = load_tile(tile, at, keep, xsd, D, D0, D1, LX, AX, WIDE, PRECISION)
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


# Second stage: one program takes ROWS rows (batch, head, token) over all slices, PARTS of them at once: loads that wait
# for each other would take longer than all else. What it has met of each PARTS-th slice has a running maximum of its
# own, and the order is the same in every run.
@triton.jit(do_not_specialize=["rows", "slices"])
def forward_merge(
    sums_ptr, stats_ptr, out_ptr, rows, slices,
    D: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr, LOOP: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = stats_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    keep = row < rows
    cols = tl.arange(0, WIDTH)
    top = tl.full([PARTS, ROWS], -float("inf"), ACC)
    total = tl.zeros([PARTS, ROWS], ACC)
    sums = tl.zeros([PARTS, ROWS, WIDTH], ACC)
    for step in range(0, (slices + PARTS - 1) // PARTS if LOOP == 0 else LOOP):
        part, there = slices_of(step, slices, PARTS)
        at = (part * rows)[:, None] + row[None, :]
        there = there[:, None] & keep[None, :]
        inside = there[:, :, None] & (cols < D)[None, None, :]
        more_top = tl.load(stats_ptr + at * 2, mask=there, other=-float("inf"))
        more_total = tl.load(stats_ptr + at * 2 + 1, mask=there, other=0.0)
        more = tl.load(sums_ptr + at[:, :, None] * D + cols[None, None, :], mask=inside, other=0.0)
        highest = tl.maximum(top, more_top)
        base = tl.where(highest == -float("inf"), 0.0, highest)
        fade = tl.exp2(top - base)
        weight = tl.exp2(more_top - base)
        total = total * fade + more_total * weight
        sums = sums * fade[:, :, None] + more * weight[:, :, None]
        top = highest
    highest = tl.max(top, 0)
    fade = tl.exp2(top - tl.where(highest == -float("inf"), 0.0, highest)[None, :])
    # Several warps may have each of these sums. With a choice after the product no sum is fused with one, and all
    # copies are the same bits.
    met = (tl.arange(0, PARTS) < slices)[:, None]
    total = tl.where(met, total * fade, 0.0)
    sums = tl.where(met[:, :, None], sums * fade[:, :, None], 0.0)
    out = tl.sum(sums, 0) / tl.sum(total, 0)[:, None]
    inside = keep[:, None] & (cols < D)[None, :]
    tl.store(out_ptr + row[:, None] * D + cols[None, :], out.to(out_ptr.dtype.element_ty), mask=inside)


# What is known of the rows of a block of tokens after the ``steps`` tiles of pixels from the ``first`` on.
@triton.jit
def _rows(
    x_ptr, q0, q1, g0, g1, keep_m, factor, first, steps, pixels, width, xsd, xsy, xsx,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, LX: tl.constexpr, AX: tl.constexpr,
    LINEAR: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, WHOLE: tl.constexpr,
    TOKENS: tl.constexpr, BLOCK: tl.constexpr, LOOP: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    top, total, index, base, rest = no_tile(BLOCK, TOKENS, ACC)
    for step in range(0, steps if LOOP == 0 else LOOP):
        start = (first + step) * BLOCK
        n = start + tl.arange(0, BLOCK)
        tile, at = place(x_ptr, start, width, xsy, xsx, BLOCK, LX, AX, LINEAR, WIDE, LX == 1)
        x0, x1 = load_tile(tile, at, inside(start, pixels, BLOCK, WHOLE), xsd, D, D0, D1, LX, AX, WIDE, PRECISION)
        scores = masked(dot_nt(x0, x1, q0, q1, D1, PRECISION), factor, (n < pixels)[:, None] & keep_m[None, :])
        dp = dot_nt(x0, x1, g0, g1, D1, PRECISION)
        top, total, index, base, rest = add_tile(scores, dp, n, top, total, index, base, rest)
    return rows_of(top, total, index, base, rest)


# The backward's first stage. One program: a block of tokens against one slice of a unit's pixels. It has the tokens and
# their gradient in registers, reads the slice once, and writes four numbers and an index of each token.
@triton.jit(do_not_specialize=GRAD + QUERY + MAP + SIZES)
def backward_rows(
    g_ptr, q_ptr, x_ptr, stats_ptr, index_ptr, scale2, scale2_low,
    gsb, gsh, gsm, gsd, qsb, qsh, qsm, qsd, xsb, xsh, xsd, xsy, xsx, heads, H, W, blocks, slices, steps, rows,
    M: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    LG: tl.constexpr, AG: tl.constexpr, LQ: tl.constexpr, AQ: tl.constexpr, LX: tl.constexpr, AX: tl.constexpr,
    N_ALIGN: tl.constexpr, LINEAR: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    WHOLE: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr, LOOP: tl.constexpr,
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
    top, total, index, base, rest = _rows(
        x_ptr, q0, q1, g0, g1, keep_m, factor, part.to(tl.int32) * steps, steps, pixels, divider(W), xsd, xsy, xsx,
        D, D0, D1, LX, AX, LINEAR, WIDE, PRECISION, WHOLE, TOKENS, BLOCK, LOOP, ACC,
    )  # fmt: skip
    store_rows(stats_ptr, index_ptr, unit * M + m + part * rows, keep_m, top, total, index, base, rest)


# Where there is more than one slice: one program takes ROWS rows over all slices, PARTS of them at once, as
# forward_merge does. The next stage then reads a row once, however many slices there are: with many tokens it reads
# each row for every tile of pixels.
@triton.jit(do_not_specialize=["rows", "slices"])
def backward_merge(
    stats_parts_ptr, index_parts_ptr, stats_ptr, index_ptr, rows, slices,
    PARTS: tl.constexpr, ROWS: tl.constexpr, LOOP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    keep = row < rows
    top, total, index, base, rest = no_tile(PARTS, ROWS, stats_ptr.dtype.element_ty)
    for step in range(0, (slices + PARTS - 1) // PARTS if LOOP == 0 else LOOP):
        part, there = slices_of(step, slices, PARTS)
        at = (part * rows)[:, None] + row[None, :]
        top_b, total_b, index_b, base_b, rest_b = load_rows(
            stats_parts_ptr, index_parts_ptr, at, there[:, None] & keep[None, :], -float("inf"), 0.0
        )
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
    top, total, index, base, rest = rows_of(top, total, index, base, rest)
    store_rows(stats_ptr, index_ptr, row, keep, top, total, index, base, rest)


# Queries of a block of tokens, their gradient, which there are, and their rows.
@triton.jit
def _token_block(
    block, batch, head, unit, q_ptr, g_ptr,
    qsb, qsh, qsm, qsd, gsb, gsh, gsm, gsd,
    M: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    LQ: tl.constexpr, AQ: tl.constexpr, LG: tl.constexpr, AG: tl.constexpr, TOKENS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    m = block * TOKENS + tl.arange(0, TOKENS)
    keep = m < M
    q0, q1 = load_tokens(q_ptr, batch, head, m, keep, qsb, qsh, qsm, qsd, D, D0, D1, LQ, AQ, PRECISION)
    g0, g1 = load_tokens(g_ptr, batch, head, m, keep, gsb, gsh, gsm, gsd, D, D0, D1, LG, AG, PRECISION)
    return q0, q1, g0, g1, keep, unit * M + m


@triton.jit
def _gradients(
    x0, x1, n, keep, q0, q1, g0, g1, keep_m, top, total, index, base, rest, factor,
    D1: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    scores = masked(dot_nt(x0, x1, q0, q1, D1, PRECISION), factor, keep[:, None] & keep_m[None, :])
    dp = dot_nt(x0, x1, g0, g1, D1, PRECISION)
    p, ds = gradients(scores, dp, n, top, total, index, base, rest)
    p = round_tf32(p.to(x0.dtype), PRECISION)
    return along_tokens(p), along_tokens(round_tf32(ds.to(x0.dtype), PRECISION))


# One program, one slice of a unit's pixels: DX, their gradient, from all tokens; DTOKENS, what they add to dquery.
# Both at once with one block of tokens; beyond that a launch each, the second with a program for each block. ALONE:
# with one block and one slice the program finds what is known of the rows itself, and reads the map again from the
# caches.
@triton.jit(do_not_specialize=GRAD + QUERY + MAP + SIZES)
def backward_slices(
    g_ptr, q_ptr, x_ptr, stats_ptr, index_ptr, dq_ptr, dx_ptr, scale, scale_low, scale2, scale2_low,
    gsb, gsh, gsm, gsd, qsb, qsh, qsm, qsd, xsb, xsh, xsd, xsy, xsx,
    heads, H, W, blocks, slices, steps, rows,
    M: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    LG: tl.constexpr, AG: tl.constexpr, LQ: tl.constexpr, AQ: tl.constexpr,
    LX: tl.constexpr, AX: tl.constexpr, LD: tl.constexpr, AD: tl.constexpr, N_ALIGN: tl.constexpr,
    LINEAR: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, DX: tl.constexpr, DTOKENS: tl.constexpr,
    ALONE: tl.constexpr, PARTS: tl.constexpr, WHOLE: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
    LOOP: tl.constexpr,
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
    q0, q1, g0, g1, keep_m, row = _token_block(
        block, batch, head, unit, q_ptr, g_ptr,
        qsb, qsh, qsm, qsd, gsb, gsh, gsm, gsd, M, D, D0, D1, LQ, AQ, LG, AG, TOKENS, PRECISION,
    )  # fmt: skip
    # As operands of products that sum over tokens, along_tokens.
    ACROSS: tl.constexpr = max(TOKENS, 16)
    wq0, wq1, wg0, wg1, keep_w, row_w = _token_block(
        block, batch, head, unit, q_ptr, g_ptr,
        qsb, qsh, qsm, qsd, gsb, gsh, gsm, gsd, M, D, D0, D1, LQ, AQ, LG, AG, ACROSS, PRECISION,
    )  # fmt: skip
    dq0 = no_sums(PARTS, ACROSS, D0, ACC)
    dq1 = no_sums(PARTS, ACROSS, D1 if D1 > 0 else 1, ACC)
    width = divider(W)
    if ALONE:
        top, total, index, base, rest = _rows(
            x_ptr, q0, q1, g0, g1, keep_m, factor, 0, steps, pixels, width, xsd, xsy, xsx,
            D, D0, D1, LX, AX, LINEAR, WIDE, PRECISION, WHOLE, TOKENS, BLOCK, LOOP, ACC,
        )  # fmt: skip
        total = tl.where(keep_m, total, 1.0)  # of no token: gradients of 0
    else:
        top, total, index, base, rest = load_rows(stats_ptr, index_ptr, row, keep_m)
    for step in range(0, steps if LOOP == 0 else LOOP):
        start = (part.to(tl.int32) * steps + step) * BLOCK
        n = start + tl.arange(0, BLOCK)
        keep = n < pixels
        there = inside(start, pixels, BLOCK, WHOLE)
        tile, at = place(x_ptr, start, width, xsy, xsx, BLOCK, LX, AX, LINEAR, WIDE, LX == 1)
        x0, x1 = load_tile(tile, at, there, xsd, D, D0, D1, LX, AX, WIDE, PRECISION)
        p, ds = _gradients(
            x0, x1, n, keep, q0, q1, g0, g1, keep_m, top, total, index, base, rest, factor, D1, PRECISION
        )
        if DTOKENS:
            dq0 = add_pixels(ds, x0, dq0, PARTS, PRECISION, ACC)
            if D1 > 0:
                dq1 = add_pixels(ds, x1, dq1, PARTS, PRECISION, ACC)
        if DX:
            dx0 = tl.dot(ds, wq0, input_precision=PRECISION, out_dtype=ACC) * scale
            dx0 = tl.dot(p, wg0, dx0, input_precision=PRECISION, out_dtype=ACC)
            dx1 = dx0
            if D1 > 0:
                dx1 = tl.dot(ds, wq1, input_precision=PRECISION, out_dtype=ACC) * scale
                dx1 = tl.dot(p, wg1, dx1, input_precision=PRECISION, out_dtype=ACC)
            if M > TOKENS:
                for other in range(1, (M + TOKENS - 1) // TOKENS):
                    a0, a1, b0, b1, keep_b, row_b = _token_block(
                        other, batch, head, unit, q_ptr, g_ptr,
                        qsb, qsh, qsm, qsd, gsb, gsh, gsm, gsd, M, D, D0, D1, LQ, AQ, LG, AG, TOKENS, PRECISION,
                    )  # fmt: skip
                    top_b, total_b, index_b, base_b, rest_b = load_rows(stats_ptr, index_ptr, row_b, keep_b)
                    p, ds = _gradients(
                        x0, x1, n, keep, a0, a1, b0, b1, keep_b, top_b, total_b, index_b, base_b, rest_b, factor,
                        D1, PRECISION,
                    )  # fmt: skip
                    dx0 += tl.dot(ds, a0, input_precision=PRECISION, out_dtype=ACC) * scale
                    dx0 = tl.dot(p, b0, dx0, input_precision=PRECISION, out_dtype=ACC)
                    if D1 > 0:
                        dx1 += tl.dot(ds, a1, input_precision=PRECISION, out_dtype=ACC) * scale
                        dx1 = tl.dot(p, b1, dx1, input_precision=PRECISION, out_dtype=ACC)
            tile, at = place(dx_ptr, start, width, dxy, dxx, BLOCK, LD, AD, LINEAR, WIDE, LX == 1)
            store_tile(tile, dx0, dx1, at, there, dxd, D, D0, D1, LD, AD, WIDE)
    if DTOKENS:
        dq0 = of_all(dq0, PARTS) * scale
        dq1 = of_all(dq1, PARTS) * scale if D1 > 0 else dq0
        store_tokens(dq_ptr, dq0, dq1, row_w + part * rows, keep_w, D, D0, D1)
