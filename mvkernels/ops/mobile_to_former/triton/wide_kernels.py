"""Triton kernels of mobile_to_former for heads too wide for the registers. Terms are those of kernels.py.

A program sums SLICE of a head's channels, and a launch has a program for each such *piece*. The scores need all
channels: they are summed DEPTH channels at a time, from a map that the pieces of a unit find in the caches. Nothing
that lies in registers grows with head_dim.
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
from mvkernels.triton.bridge.tiles import GRAD, MAP, QUERY, SIZES, unit_of
from mvkernels.triton.bridge.wide import load_slice, products, store_slice, token_rows
from mvkernels.triton.tiles import dense_strides, divider, exact, pixel_of, plane, round_tf32, row_offsets


# One program: as forward_slices, of a piece of the channels. The first piece writes what the slices are merged by.
@triton.jit(do_not_specialize=QUERY + MAP + SIZES)
def forward_wide(
    q_ptr, x_ptr, out_ptr, stats_ptr, scale2, scale2_low,
    qsb, qsh, qsm, qsd, xsb, xsh, xsd, xsy, xsx, heads, H, W, blocks, slices, steps, rows,
    M: tl.constexpr, D: tl.constexpr, SLICE: tl.constexpr, DEPTH: tl.constexpr,
    LQ: tl.constexpr, AQ: tl.constexpr, LX: tl.constexpr, AX: tl.constexpr, N_ALIGN: tl.constexpr,
    LINEAR: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr,
    TOKENS: tl.constexpr, BLOCK: tl.constexpr, LOOP: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    PIECES: tl.constexpr = (D + SLICE - 1) // SLICE
    unit, block, part = unit_of(tl.program_id(0), heads, blocks, slices)
    batch = unit // heads
    head = unit % heads
    start = block % PIECES * SLICE
    factor = exact(scale2, scale2_low, ACC)
    m = block // PIECES * TOKENS + tl.arange(0, TOKENS)
    keep_m = m < M
    q_ptr += plane(batch, head, qsb, qsh, LQ, AQ)
    q_rows = token_rows(m, qsm, LQ, AQ)
    x_ptr += plane(batch, head, xsb, xsh, LX, AX)
    pixels = tl.multiple_of(H * W, N_ALIGN)
    top = tl.full([TOKENS], -float("inf"), ACC)
    total = tl.zeros([TOKENS], ACC)
    sums = tl.zeros([TOKENS, SLICE], ACC)
    width = divider(W)
    for step in range(0, steps if LOOP == 0 else LOOP):
        n = (part.to(tl.int32) * steps + step) * BLOCK + tl.arange(0, BLOCK)
        keep = n < pixels
        y, x = pixel_of(n, width, 0, 0, 1, 1, LINEAR, WIDE)
        at = row_offsets(y, x, xsy, xsx, LX, AX, LINEAR)
        scores = products(
            q_ptr, q_rows, keep_m, qsd, x_ptr, at, keep, xsd,
            TOKENS, BLOCK, DEPTH, D, LQ, AQ, True, LX, AX, WIDE, PRECISION, ACC,
        )  # fmt: skip
        scores = tl.where(keep[None, :], scores * factor, -float("inf"))
        highest = tl.maximum(top, tl.max(scores, 1))
        # A row with no score above -inf yet has to stay 0, not become inf - inf.
        base = tl.where(highest == -float("inf"), 0.0, highest)
        p = tl.exp2(scores - base[:, None])
        fade = tl.exp2(top - base)
        top = highest
        total = total * fade + tl.sum(p, 1)
        here = load_slice(x_ptr, at, keep, xsd, start, SLICE, D, LX, AX, WIDE, PRECISION)
        p = round_tf32(p.to(here.dtype), PRECISION)
        sums = tl.dot(p, here, sums * fade[:, None], input_precision=PRECISION, out_dtype=ACC)
    row = unit * M + m
    if SPLIT:
        row += part * rows
        first = keep_m & (start == 0)
        tl.store(stats_ptr + row * 2, top, mask=first)
        tl.store(stats_ptr + row * 2 + 1, total, mask=first)
    else:
        sums = sums / total[:, None]
    store_slice(out_ptr, sums, row.to(tl.int64) * D, keep_m, 1, start, SLICE, D, 1, 1, True)


# Scores and dP, (pixels, tokens), of a tile and a block of tokens. Both stages of the backward call this, so that their
# scores are the same.
@triton.jit
def _scores(
    q_ptr, q_rows, g_ptr, g_rows, keep_m, x_ptr, at, keep, factor, qsd, gsd, xsd,
    D: tl.constexpr, DEPTH: tl.constexpr, LQ: tl.constexpr, AQ: tl.constexpr, LG: tl.constexpr, AG: tl.constexpr,
    LX: tl.constexpr, AX: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, TOKENS: tl.constexpr,
    BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    scores = products(
        x_ptr, at, keep, xsd, q_ptr, q_rows, keep_m, qsd,
        BLOCK, TOKENS, DEPTH, D, LX, AX, WIDE, LQ, AQ, True, PRECISION, ACC,
    )  # fmt: skip
    dp = products(
        x_ptr, at, keep, xsd, g_ptr, g_rows, keep_m, gsd,
        BLOCK, TOKENS, DEPTH, D, LX, AX, WIDE, LG, AG, True, PRECISION, ACC,
    )  # fmt: skip
    return masked(scores, factor, keep[:, None] & keep_m[None, :]), dp


# One program: as backward_rows. It needs no piece of the channels: all that it sums are scalars of a token.
@triton.jit(do_not_specialize=GRAD + QUERY + MAP + SIZES)
def rows_wide(
    g_ptr, q_ptr, x_ptr, stats_ptr, index_ptr, scale2, scale2_low,
    gsb, gsh, gsm, gsd, qsb, qsh, qsm, qsd, xsb, xsh, xsd, xsy, xsx, heads, H, W, blocks, slices, steps, rows,
    M: tl.constexpr, D: tl.constexpr, DEPTH: tl.constexpr,
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
    q_ptr += plane(batch, head, qsb, qsh, LQ, AQ)
    g_ptr += plane(batch, head, gsb, gsh, LG, AG)
    x_ptr += plane(batch, head, xsb, xsh, LX, AX)
    q_rows = token_rows(m, qsm, LQ, AQ)
    g_rows = token_rows(m, gsm, LG, AG)
    pixels = tl.multiple_of(H * W, N_ALIGN)
    top, total, index, base, rest = no_tile(BLOCK, TOKENS, ACC)
    width = divider(W)
    for step in range(0, steps if LOOP == 0 else LOOP):
        n = (part.to(tl.int32) * steps + step) * BLOCK + tl.arange(0, BLOCK)
        keep = n < pixels
        y, x = pixel_of(n, width, 0, 0, 1, 1, LINEAR, WIDE)
        at = row_offsets(y, x, xsy, xsx, LX, AX, LINEAR)
        scores, dp = _scores(
            q_ptr, q_rows, g_ptr, g_rows, keep_m, x_ptr, at, keep, factor, qsd, gsd, xsd,
            D, DEPTH, LQ, AQ, LG, AG, LX, AX, WIDE, PRECISION, TOKENS, BLOCK, ACC,
        )  # fmt: skip
        top, total, index, base, rest = add_tile(scores, dp, n, top, total, index, base, rest)
    top, total, index, base, rest = rows_of(top, total, index, base, rest)
    store_rows(stats_ptr, index_ptr, unit * M + m + part * rows, keep_m, top, total, index, base, rest)


# One program: as backward_slices, of a piece of the channels.
@triton.jit(do_not_specialize=GRAD + QUERY + MAP + SIZES)
def backward_wide(
    g_ptr, q_ptr, x_ptr, stats_ptr, index_ptr, dq_ptr, dx_ptr, scale, scale_low, scale2, scale2_low,
    gsb, gsh, gsm, gsd, qsb, qsh, qsm, qsd, xsb, xsh, xsd, xsy, xsx,
    heads, H, W, blocks, slices, steps, rows,
    M: tl.constexpr, D: tl.constexpr, SLICE: tl.constexpr, DEPTH: tl.constexpr,
    LG: tl.constexpr, AG: tl.constexpr, LQ: tl.constexpr, AQ: tl.constexpr,
    LX: tl.constexpr, AX: tl.constexpr, LD: tl.constexpr, AD: tl.constexpr, N_ALIGN: tl.constexpr,
    LINEAR: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, DX: tl.constexpr, DTOKENS: tl.constexpr,
    TOKENS: tl.constexpr, BLOCK: tl.constexpr, LOOP: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    PIECES: tl.constexpr = (D + SLICE - 1) // SLICE
    unit, block, part = unit_of(tl.program_id(0), heads, blocks, slices)
    batch = unit // heads
    head = unit % heads
    start = block % PIECES * SLICE
    block = block // PIECES
    factor = exact(scale2, scale2_low, ACC)
    scale = exact(scale, scale_low, ACC)
    q_ptr += plane(batch, head, qsb, qsh, LQ, AQ)
    g_ptr += plane(batch, head, gsb, gsh, LG, AG)
    x_ptr += plane(batch, head, xsb, xsh, LX, AX)
    dxb, dxh, dxd, dxy, dxx = dense_strides(heads, D, H, W, LD)
    dx_ptr += plane(batch, head, dxb, dxh, LD, AD)
    pixels = tl.multiple_of(H * W, N_ALIGN)
    dq = tl.zeros([TOKENS, SLICE], ACC)
    width = divider(W)
    for step in range(0, steps if LOOP == 0 else LOOP):
        n = (part.to(tl.int32) * steps + step) * BLOCK + tl.arange(0, BLOCK)
        keep = n < pixels
        y, x = pixel_of(n, width, 0, 0, 1, 1, LINEAR, WIDE)
        at = row_offsets(y, x, xsy, xsx, LX, AX, LINEAR)
        dx = tl.zeros([BLOCK, SLICE], ACC)
        # Every block of tokens for the pixels' gradient, else the program's own.
        for other in range(0, (M + TOKENS - 1) // TOKENS if DX else 1):
            m = (other if DX else block) * TOKENS + tl.arange(0, TOKENS)
            keep_m = m < M
            q_rows = token_rows(m, qsm, LQ, AQ)
            g_rows = token_rows(m, gsm, LG, AG)
            scores, dp = _scores(
                q_ptr, q_rows, g_ptr, g_rows, keep_m, x_ptr, at, keep, factor, qsd, gsd, xsd,
                D, DEPTH, LQ, AQ, LG, AG, LX, AX, WIDE, PRECISION, TOKENS, BLOCK, ACC,
            )  # fmt: skip
            top, total, index, base, rest = load_rows(stats_ptr, index_ptr, unit * M + m, keep_m)
            p, ds = gradients(scores, dp, n, top, total, index, base, rest)
            p = round_tf32(p.to(x_ptr.dtype.element_ty), PRECISION)
            ds = round_tf32(ds.to(x_ptr.dtype.element_ty), PRECISION)
            if DTOKENS:
                here = load_slice(x_ptr, at, keep, xsd, start, SLICE, D, LX, AX, WIDE, PRECISION)
                dq = tl.dot(tl.trans(ds), here, dq, input_precision=PRECISION, out_dtype=ACC)
            if DX:
                q = load_slice(q_ptr, q_rows, keep_m, qsd, start, SLICE, D, LQ, AQ, True, PRECISION)
                dx += tl.dot(ds, q, input_precision=PRECISION, out_dtype=ACC) * scale
                g = load_slice(g_ptr, g_rows, keep_m, gsd, start, SLICE, D, LG, AG, True, PRECISION)
                dx = tl.dot(p, g, dx, input_precision=PRECISION, out_dtype=ACC)
        if DX:
            to = row_offsets(y, x, dxy, dxx, LD, AD, LINEAR)
            store_slice(dx_ptr, dx, to, keep, dxd, start, SLICE, D, LD, AD, WIDE)
    if DTOKENS:
        m = block * TOKENS + tl.arange(0, TOKENS)
        row = unit * M + m + part * rows
        store_slice(dq_ptr, dq * scale, row.to(tl.int64) * D, m < M, 1, start, SLICE, D, 1, 1, True)
