"""Triton kernels of former_to_mobile. Terms and helpers are those of mvkernels/triton/bridge."""

import triton
import triton.language as tl

from mvkernels.triton.bridge.tiles import MAP, SIZES, inside, load_tokens, place, store_tokens, unit_of
from mvkernels.triton.tiles import (
    dense_strides,
    divider,
    dot_nt,
    exact,
    load_tile,
    plane,
    round_tf32,
    round_tile,
    store_tile,
)

_TOKENS = ["ksb", "ksh", "ksm", "ksd", "vsb", "vsh", "vsm", "vsd"]


@triton.jit
def _token_block(
    block, batch, head, k_ptr, v_ptr, ksb, ksh, ksm, ksd, vsb, vsh, vsm, vsd,
    M: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    LK: tl.constexpr, AK: tl.constexpr, LV: tl.constexpr, AV: tl.constexpr, TOKENS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    # Keys and values of a block of tokens, and which of them are tokens.
    m = block * TOKENS + tl.arange(0, TOKENS)
    keep = m < M
    k0, k1 = load_tokens(k_ptr, batch, head, m, keep, ksb, ksh, ksm, ksd, D, D0, D1, LK, AK, PRECISION)
    v0, v1 = load_tokens(v_ptr, batch, head, m, keep, vsb, vsh, vsm, vsd, D, D0, D1, LV, AV, PRECISION)
    return k0, k1, v0, v1, keep


@triton.jit
def _scores(x0, x1, k0, k1, keep_m, factor, D1: tl.constexpr, PRECISION: tl.constexpr):
    # (pixels, tokens), -inf past the last token.
    return tl.where(keep_m[None, :], dot_nt(x0, x1, k0, k1, D1, PRECISION) * factor, -float("inf"))


@triton.jit
def _rescale(top, scores):
    # Running maximum: (the new one, exponentials of the scores, factor for what was summed before).
    highest = tl.maximum(top, tl.max(scores, 1))
    # A row with no score above -inf yet has to stay 0, not become inf - inf.
    base = tl.where(highest == -float("inf"), 0.0, highest)
    return highest, tl.exp2(scores - base[:, None]), tl.exp2(top - base)


# One program: BLOCK pixels of a unit against all tokens, in blocks with a running maximum.
@triton.jit(do_not_specialize=_TOKENS + MAP + SIZES)
def forward_pixels(
    x_ptr, k_ptr, v_ptr, out_ptr, scale2, scale2_low,
    xsb, xsh, xsd, xsy, xsx, ksb, ksh, ksm, ksd, vsb, vsh, vsm, vsd, heads, H, W, slices,
    M: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    LX: tl.constexpr, AX: tl.constexpr, LK: tl.constexpr, AK: tl.constexpr, LV: tl.constexpr, AV: tl.constexpr,
    LO: tl.constexpr, AO: tl.constexpr, N_ALIGN: tl.constexpr, LINEAR: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, RESIDUAL: tl.constexpr, WHOLE: tl.constexpr,
    TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    unit, _block, part = unit_of(tl.program_id(0), heads, 1, slices)
    batch = unit // heads
    head = unit % heads
    factor = exact(scale2, scale2_low, ACC)
    ob, oh, od, oy, ox = dense_strides(heads, D, H, W, LO)
    x_ptr += plane(batch, head, xsb, xsh, LX, AX)
    out_ptr += plane(batch, head, ob, oh, LO, AO)
    start = part.to(tl.int32) * BLOCK
    keep = inside(start, tl.multiple_of(H * W, N_ALIGN), BLOCK, WHOLE)
    width = divider(W)
    tile, at = place(x_ptr, start, width, xsy, xsx, BLOCK, LX, AX, LINEAR, WIDE)
    x0, x1 = load_tile(tile, at, keep, xsd, D, D0, D1, LX, AX, WIDE)
    q0, q1 = round_tile(x0, x1, D1, PRECISION)
    if M <= TOKENS:
        k0, k1, v0, v1, keep_m = _token_block(
            0, batch, head, k_ptr, v_ptr, ksb, ksh, ksm, ksd, vsb, vsh, vsm, vsd,
            M, D, D0, D1, LK, AK, LV, AV, TOKENS, PRECISION,
        )  # fmt: skip
        scores = _scores(q0, q1, k0, k1, keep_m, factor, D1, PRECISION)
        p = tl.exp2(scores - tl.max(scores, 1)[:, None])
        p = p * (1.0 / tl.sum(p, 1))[:, None]
        p = round_tf32(p.to(v0.dtype), PRECISION)
        sum0 = tl.dot(p, v0, input_precision=PRECISION, out_dtype=ACC)
        sum1 = tl.dot(p, v1, input_precision=PRECISION, out_dtype=ACC) if D1 > 0 else sum0
    else:
        top = tl.full([BLOCK], -float("inf"), ACC)
        total = tl.zeros([BLOCK], ACC)
        sum0 = tl.zeros([BLOCK, D0], ACC)
        sum1 = tl.zeros([BLOCK, D1 if D1 > 0 else 1], ACC)
        for block in range(0, (M + TOKENS - 1) // TOKENS):
            k0, k1, v0, v1, keep_m = _token_block(
                block, batch, head, k_ptr, v_ptr, ksb, ksh, ksm, ksd, vsb, vsh, vsm, vsd,
                M, D, D0, D1, LK, AK, LV, AV, TOKENS, PRECISION,
            )  # fmt: skip
            top, p, fade = _rescale(top, _scores(q0, q1, k0, k1, keep_m, factor, D1, PRECISION))
            total = total * fade + tl.sum(p, 1)
            p = round_tf32(p.to(v0.dtype), PRECISION)
            sum0 = tl.dot(p, v0, sum0 * fade[:, None], input_precision=PRECISION, out_dtype=ACC)
            if D1 > 0:
                sum1 = tl.dot(p, v1, sum1 * fade[:, None], input_precision=PRECISION, out_dtype=ACC)
        sum0 = sum0 / total[:, None]
        sum1 = sum1 / total[:, None]
    if RESIDUAL:
        sum0 += x0.to(ACC)
        if D1 > 0:
            sum1 += x1.to(ACC)
    tile, at = place(out_ptr, start, width, oy, ox, BLOCK, LO, AO, LINEAR, WIDE)
    store_tile(tile, sum0, sum1, at, keep, od, D, D0, D1, LO, AO, WIDE)


# Probabilities and the gradient of the scores, (pixels, tokens), of a tile whose maxima and sums are known.
@triton.jit
def _gradients(scores, dp, keep, base, share, delta, keep_m, dtype: tl.constexpr, PRECISION: tl.constexpr):
    there = keep[:, None] & keep_m[None, :]
    p = tl.where(there, tl.exp2(scores - base[:, None]) * share[:, None], 0.0)
    ds = tl.where(there, p * (dp - delta[:, None]), 0.0)
    return round_tf32(p.to(dtype), PRECISION), round_tf32(ds.to(dtype), PRECISION)


# One program, one slice of a unit's pixels: DX, their gradient, from all tokens; DTOKENS, what they add to dkey and
# dvalue. Both at once with one block of tokens; beyond that a launch each, the second with a program for each block,
# and each finds the pixels' maxima, sums and deltas anew.
@triton.jit(do_not_specialize=_TOKENS + MAP + SIZES + ["gsb", "gsh", "gsd", "gsy", "gsx"])
def backward_slices(
    g_ptr, x_ptr, k_ptr, v_ptr, dx_ptr, dk_ptr, dv_ptr, scale, scale_low, scale2, scale2_low,
    gsb, gsh, gsd, gsy, gsx, xsb, xsh, xsd, xsy, xsx, ksb, ksh, ksm, ksd, vsb, vsh, vsm, vsd,
    heads, H, W, blocks, slices, steps, rows,
    M: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    LG: tl.constexpr, AG: tl.constexpr, LX: tl.constexpr, AX: tl.constexpr, LK: tl.constexpr, AK: tl.constexpr,
    LV: tl.constexpr, AV: tl.constexpr, LD: tl.constexpr, AD: tl.constexpr, N_ALIGN: tl.constexpr,
    LINEAR: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, RESIDUAL: tl.constexpr,
    WHOLE: tl.constexpr, DX: tl.constexpr, DTOKENS: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
    LOOP: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    unit, block, part = unit_of(tl.program_id(0), heads, blocks, slices)
    batch = unit // heads
    head = unit % heads
    factor = exact(scale2, scale2_low, ACC)
    scale = exact(scale, scale_low, ACC)
    x_ptr += plane(batch, head, xsb, xsh, LX, AX)
    g_ptr += plane(batch, head, gsb, gsh, LG, AG)
    dxb, dxh, dxd, dxy, dxx = dense_strides(heads, D, H, W, LD)
    dx_ptr += plane(batch, head, dxb, dxh, LD, AD)
    pixels = tl.multiple_of(H * W, N_ALIGN)
    k0, k1, v0, v1, keep_m = _token_block(
        block, batch, head, k_ptr, v_ptr, ksb, ksh, ksm, ksd, vsb, vsh, vsm, vsd,
        M, D, D0, D1, LK, AK, LV, AV, TOKENS, PRECISION,
    )  # fmt: skip
    dk0 = tl.zeros([TOKENS, D0], ACC)
    dk1 = tl.zeros([TOKENS, D1 if D1 > 0 else 1], ACC)
    dv0 = tl.zeros([TOKENS, D0], ACC)
    dv1 = tl.zeros([TOKENS, D1 if D1 > 0 else 1], ACC)
    width = divider(W)
    for step in range(0, steps if LOOP == 0 else LOOP):
        start = (part.to(tl.int32) * steps + step) * BLOCK
        keep = inside(start, pixels, BLOCK, WHOLE)
        tile, at = place(x_ptr, start, width, xsy, xsx, BLOCK, LX, AX, LINEAR, WIDE, False)
        x0, x1 = load_tile(tile, at, keep, xsd, D, D0, D1, LX, AX, WIDE, PRECISION)
        tile, at = place(g_ptr, start, width, gsy, gsx, BLOCK, LG, AG, LINEAR, WIDE, False)
        r0, r1 = load_tile(tile, at, keep, gsd, D, D0, D1, LG, AG, WIDE)
        g0, g1 = round_tile(r0, r1, D1, PRECISION)
        scores = _scores(x0, x1, k0, k1, keep_m, factor, D1, PRECISION)
        dp = dot_nt(g0, g1, v0, v1, D1, PRECISION)
        if M <= TOKENS:
            base = tl.max(scores, 1)
            p = tl.exp2(scores - base[:, None])
            share = 1.0 / tl.sum(p, 1)
            delta = tl.sum(p * dp, 1) * share
        else:
            top = tl.full([BLOCK], -float("inf"), ACC)
            total = tl.zeros([BLOCK], ACC)
            delta = tl.zeros([BLOCK], ACC)
            for other in range(0, (M + TOKENS - 1) // TOKENS):
                a0, a1, b0, b1, keep_b = _token_block(
                    other, batch, head, k_ptr, v_ptr, ksb, ksh, ksm, ksd, vsb, vsh, vsm, vsd,
                    M, D, D0, D1, LK, AK, LV, AV, TOKENS, PRECISION,
                )  # fmt: skip
                top, p, fade = _rescale(top, _scores(x0, x1, a0, a1, keep_b, factor, D1, PRECISION))
                total = total * fade + tl.sum(p, 1)
                delta = delta * fade + tl.sum(p * dot_nt(g0, g1, b0, b1, D1, PRECISION), 1)
            base = tl.where(top == -float("inf"), 0.0, top)
            share = 1.0 / total
            delta = delta * share
        p, ds = _gradients(scores, dp, keep, base, share, delta, keep_m, x0.dtype, PRECISION)
        if DTOKENS:
            pt = tl.trans(p)
            dst = tl.trans(ds)
            dv0 = tl.dot(pt, g0, dv0, input_precision=PRECISION, out_dtype=ACC)
            dk0 = tl.dot(dst, x0, dk0, input_precision=PRECISION, out_dtype=ACC)
            if D1 > 0:
                dv1 = tl.dot(pt, g1, dv1, input_precision=PRECISION, out_dtype=ACC)
                dk1 = tl.dot(dst, x1, dk1, input_precision=PRECISION, out_dtype=ACC)
        if DX:
            dx0 = tl.dot(ds, k0, input_precision=PRECISION, out_dtype=ACC)
            dx1 = dx0
            if D1 > 0:
                dx1 = tl.dot(ds, k1, input_precision=PRECISION, out_dtype=ACC)
            # The sum of a pixel's ds is 0, but for their rounding to a half type: what that leaves is taken off again,
            # times the mean key.
            left = tl.sum(ds.to(ACC), 1)
            keys0 = tl.sum(k0.to(ACC), 0)
            keys1 = tl.sum(k1.to(ACC), 0)
            for other in range(1, (M + TOKENS - 1) // TOKENS):
                a0, a1, b0, b1, keep_b = _token_block(
                    other, batch, head, k_ptr, v_ptr, ksb, ksh, ksm, ksd, vsb, vsh, vsm, vsd,
                    M, D, D0, D1, LK, AK, LV, AV, TOKENS, PRECISION,
                )  # fmt: skip
                scores = _scores(x0, x1, a0, a1, keep_b, factor, D1, PRECISION)
                dp = dot_nt(g0, g1, b0, b1, D1, PRECISION)
                p, ds = _gradients(scores, dp, keep, base, share, delta, keep_b, x0.dtype, PRECISION)
                dx0 = tl.dot(ds, a0, dx0, input_precision=PRECISION, out_dtype=ACC)
                if D1 > 0:
                    dx1 = tl.dot(ds, a1, dx1, input_precision=PRECISION, out_dtype=ACC)
                left += tl.sum(ds.to(ACC), 1)
                keys0 += tl.sum(a0.to(ACC), 0)
                keys1 += tl.sum(a1.to(ACC), 0)
            left = (left / M)[:, None]
            dx0 = (dx0 - left * keys0[None, :]) * scale
            if D1 > 0:
                dx1 = (dx1 - left * keys1[None, :]) * scale
            if RESIDUAL:
                dx0 += r0.to(ACC)
                if D1 > 0:
                    dx1 += r1.to(ACC)
            tile, at = place(dx_ptr, start, width, dxy, dxx, BLOCK, LD, AD, LINEAR, WIDE, False)
            store_tile(tile, dx0, dx1, at, keep, dxd, D, D0, D1, LD, AD, WIDE)
    if DTOKENS:
        m = block * TOKENS + tl.arange(0, TOKENS)
        row = unit * M + m + part * rows
        if D1 > 0:
            dk1 = dk1 * scale
        store_tokens(dk_ptr, dk0 * scale, dk1, row, m < M, D, D0, D1)
        store_tokens(dv_ptr, dv0, dv1, row, m < M, D, D0, D1)
