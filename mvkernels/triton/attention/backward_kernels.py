"""Backward Triton kernels. launcher.py says which runs when, groups.py what the tokens of a group are.

With P the probabilities, dP = dout V^T and delta the row sums of P * dP:
dV = P^T dout, dS = P * (dP - delta), dQ = scale dS K, dK = scale dS^T Q, dbias = sum of dS.
row_kernels.py says how a row's P and dS are made so that large queries do not multiply rounding errors.
Where a row or key lies outside its group or the map, P and dS are set to 0 by selection, never by a product:
NaN and Inf stay in the unit that they came in.
PACKED: dq, dk and dv are each one of so many equal parts of a channels-last map, 1 or 3.
"""

import triton
import triton.language as tl

from mvkernels.triton.attention.forward_kernels import bias_tile, in_bias
from mvkernels.triton.attention.groups import (
    CLIPPED,
    SIZES,
    UNEQUAL,
    extent_of,
    group_of,
    keys_map,
    span_of,
    tokens_of,
)
from mvkernels.triton.attention.row_kernels import (
    ROWS,
    load_rows,
    masked,
    store_rows,
    weights_of,
)
from mvkernels.triton.tiles import (
    dense_strides,
    divider,
    dot_nt,
    load_tile,
    plane,
    round_tf32,
    row_offsets,
    store_tile,
)

INPUTS = ["qsb", "qsh", "qsd", "qsy", "qsx", "ksb", "ksh", "ksd", "ksy", "ksx", "vsb", "vsh", "vsd", "vsy", "vsx"]
GRAD = ["gsb", "gsh", "gsd", "gsy", "gsx"]


# dQ of one block of queries, while all keys pass by with a running peak: when another key becomes the peak, sums of
# P * (dP - base) are shifted to its dP by way of the sums of P. Pointers are those of the unit; strides come as
# (y, x, channel). What the keys' pass has to know of the rows is left on the way.
@triton.jit
def _queries(
    first, tokens, span, keys, width, key_width, group, area, head,
    q_ptr, k_ptr, v_ptr, g_ptr, bias_ptr, dq_ptr, rows_ptr,
    scale, scale2, qs, ks, vs, gs, dqs, bsh, bsm, bsn,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, DV: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    LQ: tl.constexpr, AQ: tl.constexpr, LK: tl.constexpr, AK: tl.constexpr, LV: tl.constexpr, AV: tl.constexpr,
    LG: tl.constexpr, AG: tl.constexpr, DLQ: tl.constexpr, AD: tl.constexpr,
    BIAS: tl.constexpr, BIAS_ALIGN: tl.constexpr,
    KIND: tl.constexpr, LINEAR: tl.constexpr, WIDE: tl.constexpr,
    WHOLE: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, LOOP: tl.constexpr,
):  # fmt: skip
    m = first + tl.arange(0, BLOCK_M)
    my, mx, keep_m = tokens_of(m, span[1], width, group, KIND, LINEAR, WIDE, WHOLE, COLUMNS)
    g0, g1 = load_tile(g_ptr, row_offsets(my, mx, gs[0], gs[1], LG, AG, LINEAR), keep_m, gs[2],
                       DV, V0, V1, LG, AG, WIDE, PRECISION)  # fmt: skip
    q0, q1 = load_tile(q_ptr, row_offsets(my, mx, qs[0], qs[1], LQ, AQ, LINEAR), keep_m, qs[2],
                       D, D0, D1, LQ, AQ, WIDE, PRECISION)  # fmt: skip
    dq0 = tl.zeros([BLOCK_M, D0], tl.float32)
    dq1 = tl.zeros([BLOCK_M, D1 if D1 > 0 else 1], tl.float32)
    pk0 = tl.zeros([BLOCK_M, D0], tl.float32)
    pk1 = tl.zeros([BLOCK_M, D1 if D1 > 0 else 1], tl.float32)
    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    base = tl.zeros([BLOCK_M], tl.float32)
    peak = tl.zeros([BLOCK_M], tl.int32)
    # Sums of what was rounded, so that the mean of the keys leaves nothing in dQ. Of half types they are products with
    # ones, SUMS equal columns: to sum them as they are, each would have to be turned back into float32.
    HALF: tl.constexpr = k_ptr.dtype.element_ty.primitive_bitwidth == 16
    SUMS: tl.constexpr = 16 if HALF else 1
    ones = tl.full([BLOCK_N, SUMS], 1.0, k_ptr.dtype.element_ty)
    total = tl.zeros([BLOCK_M, SUMS], tl.float32)
    rest = tl.zeros([BLOCK_M, SUMS], tl.float32)
    for start in range(span[0] // BLOCK_N * BLOCK_N if LOOP == 0 else 0, keys if LOOP == 0 else LOOP, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        y, x, keep_n = tokens_of(n, keys, key_width, group, KIND, LINEAR, WIDE, WHOLE, COLUMNS)
        inside = keep_m[:, None] & keep_n[None, :]
        k0, k1 = load_tile(k_ptr, row_offsets(y, x, ks[0], ks[1], LK, AK, LINEAR), keep_n, ks[2],
                           D, D0, D1, LK, AK, WIDE, PRECISION)  # fmt: skip
        v0, v1 = load_tile(v_ptr, row_offsets(y, x, vs[0], vs[1], LV, AV, LINEAR), keep_n, vs[2],
                           DV, V0, V1, LV, AV, WIDE, PRECISION)  # fmt: skip
        products = dot_nt(q0, q1, k0, k1, D1, PRECISION)
        scores = products * scale2
        if BIAS:
            within = in_bias(keep_m, keep_n, m, n, tokens, KIND)
            scores += bias_tile(bias_ptr, head, m, n, within, bsh, bsm, bsn, BIAS_ALIGN)
        scores = masked(scores, inside)
        dp = dot_nt(g0, g1, v0, v1, V1, PRECISION)
        highest, column = tl.max(scores, 1, return_indices=True)
        higher = highest > top
        peak = tl.where(higher, start + column, peak)
        is_peak = n[None, :] == peak[:, None]
        before = base
        base = tl.where(higher, tl.sum(tl.where(is_peak, dp, 0.0), 1), base)
        highest = tl.maximum(top, highest)
        # A row with no score above -inf yet has to stay 0, not become inf - inf.
        used = tl.where(highest == -float("inf"), 0.0, highest)
        fade = tl.exp2(top - used)
        top = highest
        p = weights_of(products, scale2, scores, inside, used[:, None], WHOLE, BIAS)
        ds = tl.where(inside, p * (dp - base[:, None]), 0.0)
        shift = (before - base)[:, None]
        fade = fade[:, None]
        p = round_tf32(p.to(k0.dtype), PRECISION)
        ds = round_tf32(ds.to(k0.dtype), PRECISION)
        total *= fade
        rest = rest * fade + total * shift
        if HALF:
            rest = tl.dot(ds, ones, rest)
            total = tl.dot(p, ones, total)
        else:
            rest += tl.sum(ds, 1)[:, None]
            total += tl.sum(p, 1)[:, None]
        pk0 *= fade
        dq0 = tl.dot(ds, k0, dq0 * fade + pk0 * shift, input_precision=PRECISION)
        pk0 = tl.dot(p, k0, pk0, input_precision=PRECISION)
        if D1 > 0:
            pk1 *= fade
            dq1 = tl.dot(ds, k1, dq1 * fade + pk1 * shift, input_precision=PRECISION)
            pk1 = tl.dot(p, k1, pk1, input_precision=PRECISION)
    total = tl.max(total, 1)
    rest = tl.max(rest, 1)
    share = 1.0 / total
    rest *= share
    store_rows(rows_ptr + (mx if LINEAR else my * group[4] + mx), area, keep_m, top, share, base + rest, rest, peak)
    # An infinite dP makes every dS of the row infinite or NaN, and dQ NaN; the two sums may be infinite alone.
    share = (share * scale + rest * 0.0)[:, None]
    dq0 = (dq0 - rest[:, None] * pk0) * share
    if D1 > 0:
        dq1 = (dq1 - rest[:, None] * pk1) * share
    rows = row_offsets(my, mx, dqs[0], dqs[1], DLQ, AD, LINEAR)
    store_tile(dq_ptr, dq0, dq1, rows, keep_m, dqs[2], D, D0, D1, DLQ, AD, WIDE)


# dK and dV of one block of keys, while all queries pass by, with the scores transposed (keys are the
# rows), so that P^T and dS^T are operands as they come.
@triton.jit
def _keys(
    first, tokens, span, keys, width, key_width, group, area, head,
    q_ptr, k_ptr, v_ptr, g_ptr, bias_ptr, dk_ptr, dv_ptr, rows_ptr,
    scale, scale2, qs, ks, vs, gs, dks, dvs, bsh, bsm, bsn,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, DV: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    LQ: tl.constexpr, AQ: tl.constexpr, LK: tl.constexpr, AK: tl.constexpr, LV: tl.constexpr, AV: tl.constexpr,
    LG: tl.constexpr, AG: tl.constexpr, DLK: tl.constexpr, DLV: tl.constexpr, AD: tl.constexpr, ADV: tl.constexpr,
    BIAS: tl.constexpr, BIAS_ALIGN: tl.constexpr, KIND: tl.constexpr, LINEAR: tl.constexpr, WIDE: tl.constexpr,
    WHOLE: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, LOOP: tl.constexpr,
):  # fmt: skip
    n = first + tl.arange(0, BLOCK_N)
    y, x, keep_n = tokens_of(n, keys, key_width, group, KIND, LINEAR, WIDE, WHOLE, COLUMNS)
    k0, k1 = load_tile(k_ptr, row_offsets(y, x, ks[0], ks[1], LK, AK, LINEAR), keep_n, ks[2],
                       D, D0, D1, LK, AK, WIDE, PRECISION)  # fmt: skip
    v0, v1 = load_tile(v_ptr, row_offsets(y, x, vs[0], vs[1], LV, AV, LINEAR), keep_n, vs[2],
                       DV, V0, V1, LV, AV, WIDE, PRECISION)  # fmt: skip
    dk0 = tl.zeros([BLOCK_N, D0], tl.float32)
    dk1 = tl.zeros([BLOCK_N, D1 if D1 > 0 else 1], tl.float32)
    dv0 = tl.zeros([BLOCK_N, V0], tl.float32)
    dv1 = tl.zeros([BLOCK_N, V1 if V1 > 0 else 1], tl.float32)
    for start in range(span[0] // BLOCK_M * BLOCK_M if LOOP == 0 else 0, span[1] if LOOP == 0 else LOOP, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        my, mx, keep_m = tokens_of(m, span[1], width, group, KIND, LINEAR, WIDE, WHOLE, COLUMNS)
        inside = keep_n[:, None] & keep_m[None, :]
        at = rows_ptr + (mx if LINEAR else my * group[4] + mx)
        top, share, delta, rest, peak = load_rows(at, area, keep_m)
        q0, q1 = load_tile(q_ptr, row_offsets(my, mx, qs[0], qs[1], LQ, AQ, LINEAR), keep_m, qs[2],
                           D, D0, D1, LQ, AQ, WIDE, PRECISION)  # fmt: skip
        g0, g1 = load_tile(g_ptr, row_offsets(my, mx, gs[0], gs[1], LG, AG, LINEAR), keep_m, gs[2],
                           DV, V0, V1, LG, AG, WIDE, PRECISION)  # fmt: skip
        products = dot_nt(k0, k1, q0, q1, D1, PRECISION)
        scores = products * scale2
        if BIAS:
            within = in_bias(keep_n, keep_m, n, m, tokens, KIND)
            if BIAS_ALIGN > 0:  # read along the rows of the bias, many keys at once
                scores += tl.trans(bias_tile(bias_ptr, head, m, n, tl.trans(within), bsh, bsm, bsn, BIAS_ALIGN))
            else:
                scores += bias_tile(bias_ptr, head, n, m, within, bsh, bsn, bsm, 0)
        pt = weights_of(products, scale2, scores, inside, top[None, :], WHOLE, BIAS) * share[None, :]
        dpt = dot_nt(v0, v1, g0, g1, V1, PRECISION)
        beside = tl.where(n[:, None] == peak[None, :], -rest[None, :], dpt - delta[None, :])
        dst = round_tf32(tl.where(inside, pt * beside, 0.0).to(q0.dtype), PRECISION)
        pt = round_tf32(pt.to(g0.dtype), PRECISION)
        dv0 = tl.dot(pt, g0, dv0, input_precision=PRECISION)
        dk0 = tl.dot(dst, q0, dk0, input_precision=PRECISION)
        if V1 > 0:
            dv1 = tl.dot(pt, g1, dv1, input_precision=PRECISION)
        if D1 > 0:
            dk1 = tl.dot(dst, q1, dk1, input_precision=PRECISION)
    dk0 = dk0 * scale
    if D1 > 0:
        dk1 = dk1 * scale
    dk_rows = row_offsets(y, x, dks[0], dks[1], DLK, AD, LINEAR)
    dv_rows = row_offsets(y, x, dvs[0], dvs[1], DLV, ADV, LINEAR)
    store_tile(dk_ptr, dk0, dk1, dk_rows, keep_n, dks[2], D, D0, D1, DLK, AD, WIDE)
    store_tile(dv_ptr, dv0, dv1, dv_rows, keep_n, dvs[2], DV, V0, V1, DLV, ADV, WIDE)


# PHASES 3: one program takes a unit whole, first the blocks of queries, then the blocks of keys. Scores
# are computed twice, but no accumulator of the whole unit has to live in registers, and what the second
# phase reads is still in cache: memory sees each map once. PHASES 1 and 2: one program takes one block,
# of queries or of keys; for large groups, and when units are too few to fill the machine.
@triton.jit(do_not_specialize=INPUTS + GRAD + SIZES)
def backward_blocks(
    q_ptr, k_ptr, v_ptr, g_ptr, bias_ptr, dq_ptr, dk_ptr, dv_ptr, rows_ptr, scale, scale2,
    qsb, qsh, qsd, qsy, qsx, ksb, ksh, ksd, ksy, ksx, vsb, vsh, vsd, vsy, vsx,
    gsb, gsh, gsd, gsy, gsx, heads, H, W, ph, pw, KH, KW, sy, sx, bsh, bsm, bsn,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, DV: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    LQ: tl.constexpr, AQ: tl.constexpr, LK: tl.constexpr, AK: tl.constexpr, LV: tl.constexpr, AV: tl.constexpr,
    LG: tl.constexpr, AG: tl.constexpr,
    DLQ: tl.constexpr, DLK: tl.constexpr, DLV: tl.constexpr, AD: tl.constexpr, ADV: tl.constexpr, PACKED: tl.constexpr,
    N_ALIGN: tl.constexpr, K_ALIGN: tl.constexpr, BIAS: tl.constexpr, BIAS_ALIGN: tl.constexpr,
    KIND: tl.constexpr, LINEAR: tl.constexpr, WIDE: tl.constexpr,
    WHOLE: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr, PHASES: tl.constexpr,
    Q_BLOCK_M: tl.constexpr, Q_BLOCK_N: tl.constexpr, K_BLOCK_M: tl.constexpr, K_BLOCK_N: tl.constexpr,
    LOOP: tl.constexpr, PROGRAMS_PER_UNIT,
):  # fmt: skip
    KH, KW = keys_map(H, W, KH, KW, KIND)
    pid = tl.program_id(0)
    unit = pid // PROGRAMS_PER_UNIT
    block = pid - unit * PROGRAMS_PER_UNIT
    batch, head, y0, x0 = group_of(unit, heads, H, W, ph, pw, sy, sx, KIND)
    rows, columns = extent_of(y0, x0, H, W, ph, pw, KIND)
    tokens = tl.multiple_of(rows * columns, N_ALIGN)
    begin, end = span_of(tokens, y0, H, ph, pw, KIND)
    span = (begin, end)
    group = (y0, x0, ph, pw, W)
    width = divider(columns)
    keys = end
    key_width = width
    if KIND == UNEQUAL:
        keys = tl.multiple_of(KH * KW, K_ALIGN)
        key_width = divider(KW)
    q_ptr += plane(batch, head, qsb, qsh, LQ, AQ)
    k_ptr += plane(batch, head, ksb, ksh, LK, AK)
    v_ptr += plane(batch, head, vsb, vsh, LV, AV)
    g_ptr += plane(batch, head, gsb, gsh, LG, AG)
    area = H * W
    rows_ptr += (batch * heads + head) * ROWS * area
    qs = (qsy, qsx, qsd)
    ks = (ksy, ksx, ksd)
    vs = (vsy, vsx, vsd)
    gs = (gsy, gsx, gsd)
    if PHASES != 2:
        dqb, dqh, dqd, dqy, dqx = dense_strides(heads * PACKED, D, H, W, DLQ)
        dq_ptr += plane(batch, head, dqb, dqh, DLQ, AD)
        first = block * Q_BLOCK_M
        last = tl.minimum(first + Q_BLOCK_M, end) if PHASES == 1 else end
        if KIND == CLIPPED:
            first = tl.maximum(first, begin // Q_BLOCK_M * Q_BLOCK_M)
        while first < last:
            _queries(
                first, tokens, span, keys, width, key_width, group, area, head,
                q_ptr, k_ptr, v_ptr, g_ptr, bias_ptr, dq_ptr, rows_ptr,
                scale, scale2, qs, ks, vs, gs, (dqy, dqx, dqd), bsh, bsm, bsn,
                D, D0, D1, DV, V0, V1, LQ, AQ, LK, AK, LV, AV, LG, AG, DLQ, AD, BIAS, BIAS_ALIGN,
                KIND, LINEAR, WIDE, WHOLE, COLUMNS, PRECISION, Q_BLOCK_M, Q_BLOCK_N, LOOP,
            )  # fmt: skip
            first += Q_BLOCK_M
    if PHASES == 3:
        tl.debug_barrier()  # the rows, written above by other threads of this program, are read below
    if PHASES != 1:
        dkb, dkh, dkd, dky, dkx = dense_strides(heads * PACKED, D, KH, KW, DLK)
        dvb, dvh, dvd, dvy, dvx = dense_strides(heads * PACKED, DV, KH, KW, DLV)
        dk_ptr += plane(batch, head, dkb, dkh, DLK, AD)
        dv_ptr += plane(batch, head, dvb, dvh, DLV, ADV)
        first = block * K_BLOCK_N
        last = tl.minimum(first + K_BLOCK_N, keys) if PHASES == 2 else keys
        if KIND == CLIPPED:
            first = tl.maximum(first, begin // K_BLOCK_N * K_BLOCK_N)
        while first < last:
            _keys(
                first, tokens, span, keys, width, key_width, group, area, head,
                q_ptr, k_ptr, v_ptr, g_ptr, bias_ptr, dk_ptr, dv_ptr, rows_ptr,
                scale, scale2, qs, ks, vs, gs, (dky, dkx, dkd), (dvy, dvx, dvd), bsh, bsm, bsn,
                D, D0, D1, DV, V0, V1, LQ, AQ, LK, AK, LV, AV, LG, AG, DLK, DLV, AD, ADV, BIAS, BIAS_ALIGN,
                KIND, LINEAR, WIDE, WHOLE, COLUMNS, PRECISION, K_BLOCK_M, K_BLOCK_N, LOOP,
            )  # fmt: skip
            first += K_BLOCK_N
