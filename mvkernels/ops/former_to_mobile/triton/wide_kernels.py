"""Triton kernels of former_to_mobile for heads too wide for the registers.

Terms are those of mvkernels/triton/bridge/wide.py: a program has SLICE of a head's channels, and sums scores over
all of them DEPTH at a time.
"""

import triton
import triton.language as tl

from mvkernels.ops.former_to_mobile.triton.kernels import _TOKENS, _gradients, _rescale
from mvkernels.triton.bridge.tiles import MAP, SIZES, unit_of
from mvkernels.triton.bridge.wide import load_slice, products, store_slice, token_rows
from mvkernels.triton.tiles import dense_strides, divider, exact, pixel_of, plane, round_tf32, row_offsets


# Products of a tile of the map with a block of a token set, (pixels, tokens).
@triton.jit
def _products(
    x_ptr, at, keep, xsd, t_ptr, m, tsm, tsd,
    M: tl.constexpr, D: tl.constexpr, DEPTH: tl.constexpr, LX: tl.constexpr, AX: tl.constexpr, WIDE: tl.constexpr,
    LT: tl.constexpr, AT: tl.constexpr, PRECISION: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    return products(
        x_ptr, at, keep, xsd, t_ptr, token_rows(m, tsm, LT, AT), m < M, tsd,
        BLOCK, TOKENS, DEPTH, D, LX, AX, WIDE, LT, AT, True, PRECISION, ACC,
    )  # fmt: skip


# One program: as forward_pixels, of a piece of the channels.
@triton.jit(do_not_specialize=_TOKENS + MAP + SIZES)
def forward_wide(
    x_ptr, k_ptr, v_ptr, out_ptr, scale2, scale2_low,
    xsb, xsh, xsd, xsy, xsx, ksb, ksh, ksm, ksd, vsb, vsh, vsm, vsd, heads, H, W, slices,
    M: tl.constexpr, D: tl.constexpr, SLICE: tl.constexpr, DEPTH: tl.constexpr,
    LX: tl.constexpr, AX: tl.constexpr, LK: tl.constexpr, AK: tl.constexpr, LV: tl.constexpr, AV: tl.constexpr,
    LO: tl.constexpr, AO: tl.constexpr, N_ALIGN: tl.constexpr, LINEAR: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, RESIDUAL: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    PIECES: tl.constexpr = (D + SLICE - 1) // SLICE
    unit, piece, part = unit_of(tl.program_id(0), heads, PIECES, slices)
    batch = unit // heads
    head = unit % heads
    start = piece * SLICE
    factor = exact(scale2, scale2_low, ACC)
    ob, oh, od, oy, ox = dense_strides(heads, D, H, W, LO)
    x_ptr += plane(batch, head, xsb, xsh, LX, AX)
    k_ptr += plane(batch, head, ksb, ksh, LK, AK)
    v_ptr += plane(batch, head, vsb, vsh, LV, AV)
    out_ptr += plane(batch, head, ob, oh, LO, AO)
    n = part.to(tl.int32) * BLOCK + tl.arange(0, BLOCK)
    keep = n < tl.multiple_of(H * W, N_ALIGN)
    y, x = pixel_of(n, divider(W), 0, 0, 1, 1, LINEAR, WIDE)
    at = row_offsets(y, x, xsy, xsx, LX, AX, LINEAR)
    top = tl.full([BLOCK], -float("inf"), ACC)
    total = tl.zeros([BLOCK], ACC)
    sums = tl.zeros([BLOCK, SLICE], ACC)
    for block in range(0, (M + TOKENS - 1) // TOKENS):
        m = block * TOKENS + tl.arange(0, TOKENS)
        scores = _products(
            x_ptr, at, keep, xsd, k_ptr, m, ksm, ksd, M, D, DEPTH, LX, AX, WIDE, LK, AK, PRECISION, TOKENS, BLOCK, ACC
        )
        top, p, fade = _rescale(top, tl.where((m < M)[None, :], scores * factor, -float("inf")))
        total = total * fade + tl.sum(p, 1)
        v = load_slice(v_ptr, token_rows(m, vsm, LV, AV), m < M, vsd, start, SLICE, D, LV, AV, True, PRECISION)
        p = round_tf32(p.to(v.dtype), PRECISION)
        sums = tl.dot(p, v, sums * fade[:, None], input_precision=PRECISION, out_dtype=ACC)
    sums = sums / total[:, None]
    if RESIDUAL:
        sums += load_slice(x_ptr, at, keep, xsd, start, SLICE, D, LX, AX, WIDE).to(ACC)
    store_slice(out_ptr, sums, row_offsets(y, x, oy, ox, LO, AO, LINEAR), keep, od, start, SLICE, D, LO, AO, WIDE)


# One program: as backward_slices, of a piece of the channels. Pixels' maxima, sums and deltas come of a first pass
# over the tokens.
@triton.jit(do_not_specialize=_TOKENS + MAP + SIZES + ["gsb", "gsh", "gsd", "gsy", "gsx"])
def backward_wide(
    g_ptr, x_ptr, k_ptr, v_ptr, dx_ptr, dk_ptr, dv_ptr, scale, scale_low, scale2, scale2_low,
    gsb, gsh, gsd, gsy, gsx, xsb, xsh, xsd, xsy, xsx, ksb, ksh, ksm, ksd, vsb, vsh, vsm, vsd,
    heads, H, W, blocks, slices, steps, rows,
    M: tl.constexpr, D: tl.constexpr, SLICE: tl.constexpr, DEPTH: tl.constexpr,
    LG: tl.constexpr, AG: tl.constexpr, LX: tl.constexpr, AX: tl.constexpr, LK: tl.constexpr, AK: tl.constexpr,
    LV: tl.constexpr, AV: tl.constexpr, LD: tl.constexpr, AD: tl.constexpr, N_ALIGN: tl.constexpr,
    LINEAR: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, RESIDUAL: tl.constexpr,
    DX: tl.constexpr, DTOKENS: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr, LOOP: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    PIECES: tl.constexpr = (D + SLICE - 1) // SLICE
    BLOCKS: tl.constexpr = (M + TOKENS - 1) // TOKENS
    unit, block, part = unit_of(tl.program_id(0), heads, blocks, slices)
    batch = unit // heads
    head = unit % heads
    start = block % PIECES * SLICE
    block = block // PIECES
    factor = exact(scale2, scale2_low, ACC)
    scale = exact(scale, scale_low, ACC)
    x_ptr += plane(batch, head, xsb, xsh, LX, AX)
    g_ptr += plane(batch, head, gsb, gsh, LG, AG)
    k_ptr += plane(batch, head, ksb, ksh, LK, AK)
    v_ptr += plane(batch, head, vsb, vsh, LV, AV)
    dxb, dxh, dxd, dxy, dxx = dense_strides(heads, D, H, W, LD)
    dx_ptr += plane(batch, head, dxb, dxh, LD, AD)
    pixels = tl.multiple_of(H * W, N_ALIGN)
    dk = tl.zeros([TOKENS, SLICE], ACC)
    dv = tl.zeros([TOKENS, SLICE], ACC)
    width = divider(W)
    for step in range(0, steps if LOOP == 0 else LOOP):
        n = (part.to(tl.int32) * steps + step) * BLOCK + tl.arange(0, BLOCK)
        keep = n < pixels
        y, x = pixel_of(n, width, 0, 0, 1, 1, LINEAR, WIDE)
        at_x = row_offsets(y, x, xsy, xsx, LX, AX, LINEAR)
        at_g = row_offsets(y, x, gsy, gsx, LG, AG, LINEAR)
        top = tl.full([BLOCK], -float("inf"), ACC)
        total = tl.zeros([BLOCK], ACC)
        delta = tl.zeros([BLOCK], ACC)
        scores = tl.zeros([BLOCK, TOKENS], ACC)
        dp = tl.zeros([BLOCK, TOKENS], ACC)
        for other in range(0, BLOCKS):
            m = other * TOKENS + tl.arange(0, TOKENS)
            scores = _products(
                x_ptr, at_x, keep, xsd, k_ptr, m, ksm, ksd,
                M, D, DEPTH, LX, AX, WIDE, LK, AK, PRECISION, TOKENS, BLOCK, ACC,
            )  # fmt: skip
            scores = tl.where((m < M)[None, :], scores * factor, -float("inf"))
            dp = _products(
                g_ptr, at_g, keep, gsd, v_ptr, m, vsm, vsd,
                M, D, DEPTH, LG, AG, WIDE, LV, AV, PRECISION, TOKENS, BLOCK, ACC,
            )  # fmt: skip
            top, p, fade = _rescale(top, scores)
            total = total * fade + tl.sum(p, 1)
            delta = delta * fade + tl.sum(p * dp, 1)
        base = tl.where(top == -float("inf"), 0.0, top)
        share = 1.0 / total
        delta = delta * share
        dx = tl.zeros([BLOCK, SLICE], ACC)
        left = tl.zeros([BLOCK], ACC)
        keys = tl.zeros([SLICE], ACC)
        # Every block of tokens for the pixels' gradient, else the program's own.
        for other in range(0, BLOCKS if DX else 1):
            m = (other if DX else block) * TOKENS + tl.arange(0, TOKENS)
            if BLOCKS > 1:
                scores = factor * _products(
                    x_ptr, at_x, keep, xsd, k_ptr, m, ksm, ksd,
                    M, D, DEPTH, LX, AX, WIDE, LK, AK, PRECISION, TOKENS, BLOCK, ACC,
                )  # fmt: skip
                dp = _products(
                    g_ptr, at_g, keep, gsd, v_ptr, m, vsm, vsd,
                    M, D, DEPTH, LG, AG, WIDE, LV, AV, PRECISION, TOKENS, BLOCK, ACC,
                )  # fmt: skip
            p, ds = _gradients(scores, dp, keep, base, share, delta, m < M, x_ptr.dtype.element_ty, PRECISION)
            if DTOKENS:
                here = load_slice(g_ptr, at_g, keep, gsd, start, SLICE, D, LG, AG, WIDE, PRECISION)
                dv = tl.dot(tl.trans(p), here, dv, input_precision=PRECISION, out_dtype=ACC)
                here = load_slice(x_ptr, at_x, keep, xsd, start, SLICE, D, LX, AX, WIDE, PRECISION)
                dk = tl.dot(tl.trans(ds), here, dk, input_precision=PRECISION, out_dtype=ACC)
            if DX:
                k = load_slice(k_ptr, token_rows(m, ksm, LK, AK), m < M, ksd, start, SLICE, D, LK, AK, True, PRECISION)
                dx = tl.dot(ds, k, dx, input_precision=PRECISION, out_dtype=ACC)
                left += tl.sum(ds.to(ACC), 1)
                keys += tl.sum(k.to(ACC), 0)
        if DX:
            # As in kernels.py: what the rounding of ds leaves of their sum is taken off again.
            dx = (dx - (left / M)[:, None] * keys[None, :]) * scale
            if RESIDUAL:
                dx += load_slice(g_ptr, at_g, keep, gsd, start, SLICE, D, LG, AG, WIDE).to(ACC)
            to = row_offsets(y, x, dxy, dxx, LD, AD, LINEAR)
            store_slice(dx_ptr, dx, to, keep, dxd, start, SLICE, D, LD, AD, WIDE)
    if DTOKENS:
        m = block * TOKENS + tl.arange(0, TOKENS)
        row = (unit * M + m + part * rows).to(tl.int64) * D
        store_slice(dk_ptr, dk * scale, row, m < M, 1, start, SLICE, D, 1, 1, True)
        store_slice(dv_ptr, dv, row, m < M, 1, start, SLICE, D, 1, 1, True)
