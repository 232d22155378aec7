"""Backward Triton kernel of groups that fit a tile, of which a program takes several. Terms are those of
backward_kernels.py.
"""

import triton
import triton.language as tl

from mvkernels.triton.attention.backward_kernels import GRAD, INPUTS
from mvkernels.triton.attention.forward_kernels import load_bias
from mvkernels.triton.attention.groups import (
    CLIPPED,
    SIZES,
    UNEQUAL,
    count_of,
    divider_of,
    dividers,
    equal_groups,
    extent_of,
    group_of,
    keys_map,
    next_group,
    span_of,
    tokens_of,
)
from mvkernels.triton.attention.row_kernels import masked, whole_rows, without_mean_key
from mvkernels.triton.tiles import (
    LOG2E,
    dense_strides,
    divider,
    dot_nt,
    load_tile,
    plane,
    round_tf32,
    row_offsets,
    store_tile,
)


# One program, units of one head in turn, each of at most BLOCK tokens, all in one tile: scores are computed once, each
# of q, k, v, dout is read once, each of dq, dk, dv written once, and delta needs no pass of its own. With a bias it has
# several units: the bias is read once for all of them, and with DBIAS they are summed up in registers, in their order,
# and written once to partial[part].
@triton.jit(do_not_specialize=INPUTS + GRAD + SIZES + ["steps", "items"])
def backward_unit(
    q_ptr, k_ptr, v_ptr, g_ptr, bias_ptr, dq_ptr, dk_ptr, dv_ptr, partial_ptr, scale, scale2,
    qsb, qsh, qsd, qsy, qsx, ksb, ksh, ksd, ksy, ksx, vsb, vsh, vsd, vsy, vsx,
    gsb, gsh, gsd, gsy, gsx, heads, H, W, ph, pw, KH, KW, sy, sx, bsh, bsm, bsn, steps, items,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, DV: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    LQ: tl.constexpr, AQ: tl.constexpr, LK: tl.constexpr, AK: tl.constexpr, LV: tl.constexpr, AV: tl.constexpr,
    LG: tl.constexpr, AG: tl.constexpr,
    DLQ: tl.constexpr, DLK: tl.constexpr, DLV: tl.constexpr, AD: tl.constexpr, ADV: tl.constexpr, PACKED: tl.constexpr,
    N_ALIGN: tl.constexpr, K_ALIGN: tl.constexpr, BIAS: tl.constexpr, BIAS_ALIGN: tl.constexpr, DBIAS: tl.constexpr,
    KIND: tl.constexpr, LINEAR: tl.constexpr, WIDE: tl.constexpr,
    WHOLE: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, LOOP: tl.constexpr,
):  # fmt: skip
    KH, KW = keys_map(H, W, KH, KW, KIND)
    head = tl.program_id(0) % heads
    part = tl.program_id(0) // heads
    n = tl.arange(0, BLOCK)
    bias = tl.zeros([BLOCK, BLOCK], bias_ptr.dtype.element_ty)
    if BIAS:  # all groups are equal
        queries, keys = equal_groups(H, W, ph, pw, KH, KW, N_ALIGN, K_ALIGN, KIND)
        inside = (n < queries)[:, None] & (n < keys)[None, :]
        bias = load_bias(bias_ptr, head.to(tl.int64), n, n, inside, bsh, bsm, bsn, BIAS_ALIGN)
    dbias = tl.zeros([BLOCK, BLOCK], tl.float32)
    dqb, dqh, dqd, dqy, dqx = dense_strides(heads * PACKED, D, H, W, DLQ)
    dkb, dkh, dkd, dky, dkx = dense_strides(heads * PACKED, D, KH, KW, DLK)
    dvb, dvh, dvd, dvy, dvx = dense_strides(heads * PACKED, DV, KH, KW, DLV)
    batch, _same, y0, x0 = group_of(part * steps * heads, heads, H, W, ph, pw, sy, sx, KIND)
    both = dividers(W, pw, KIND)
    wide_head = head.to(tl.int64)
    count = tl.minimum(steps, items - part * steps)
    for step in range(0, steps if LOOP == 0 else LOOP):
        rows, columns = extent_of(y0, x0, H, W, ph, pw, KIND)
        tokens = tl.multiple_of(rows * columns, N_ALIGN)
        _, end = span_of(tokens, y0, H, ph, pw, KIND)
        group = (y0, x0, ph, pw, W)
        y, x, keep = tokens_of(n, end, divider_of(columns, both), group, KIND, LINEAR, WIDE, WHOLE, COLUMNS)
        if BIAS:
            keep = keep & (step < count)
        keys = count_of(tokens, y0, x0, H, W, ph, pw, KIND)
        ny, nx, keep_n = y, x, keep
        if KIND == UNEQUAL:
            keys = tl.multiple_of(KH * KW, K_ALIGN)
            ny, nx, keep_n = tokens_of(n, keys, divider(KW), group, KIND, LINEAR, WIDE, WHOLE, COLUMNS)
            if BIAS:
                keep_n = keep_n & (step < count)
        g_rows = row_offsets(y, x, gsy, gsx, LG, AG, LINEAR)
        q_rows = row_offsets(y, x, qsy, qsx, LQ, AQ, LINEAR)
        k_rows = row_offsets(ny, nx, ksy, ksx, LK, AK, LINEAR)
        v_rows = row_offsets(ny, nx, vsy, vsx, LV, AV, LINEAR)
        g0, g1 = load_tile(g_ptr + plane(batch, wide_head, gsb, gsh, LG, AG), g_rows, keep, gsd, DV, V0, V1,
                           LG, AG, WIDE, PRECISION)  # fmt: skip
        q0, q1 = load_tile(q_ptr + plane(batch, wide_head, qsb, qsh, LQ, AQ), q_rows, keep, qsd, D, D0, D1,
                           LQ, AQ, WIDE, PRECISION)  # fmt: skip
        k0, k1 = load_tile(k_ptr + plane(batch, wide_head, ksb, ksh, LK, AK), k_rows, keep_n, ksd, D, D0, D1,
                           LK, AK, WIDE, PRECISION)  # fmt: skip
        v0, v1 = load_tile(v_ptr + plane(batch, wide_head, vsb, vsh, LV, AV), v_rows, keep_n, vsd, DV, V0, V1,
                           LV, AV, WIDE, PRECISION)  # fmt: skip
        scores = dot_nt(q0, q1, k0, k1, D1, PRECISION) * scale2
        if BIAS:
            scores += bias.to(tl.float32) * LOG2E
        dp = dot_nt(g0, g1, v0, v1, V1, PRECISION)
        if KIND == CLIPPED:  # what a key without weight adds to its row is 0: two vectors in place of a whole mask
            scores = masked(scores, keep_n[None, :])
        within = keep[:, None] if KIND == CLIPPED else keep[:, None] & keep_n[None, :]
        found = whole_rows(masked(scores, within), dp, within, n[None, :], 1)
        p = found[0]
        ds = found[1]
        if DBIAS:
            dbias += tl.where(keep_n[None, :], ds, 0.0) if KIND == CLIPPED else ds
        pt = tl.trans(round_tf32(p.to(g0.dtype), PRECISION))
        dv0 = tl.dot(pt, g0, input_precision=PRECISION)
        dv1 = dv0
        if V1 > 0:
            dv1 = tl.dot(pt, g1, input_precision=PRECISION)
        dv_rows = row_offsets(ny, nx, dvy, dvx, DLV, ADV, LINEAR)
        dv_at = dv_ptr + plane(batch, wide_head, dvb, dvh, DLV, ADV)
        store_tile(dv_at, dv0, dv1, dv_rows, keep_n, dvd, DV, V0, V1, DLV, ADV, WIDE)
        ds = round_tf32(ds.to(k0.dtype), PRECISION)
        dst = tl.trans(ds)
        over = 1.0 / keys.to(tl.float32)
        dq0 = without_mean_key(tl.dot(ds, k0, input_precision=PRECISION), ds, k0, over, 1) * scale
        dk0 = tl.dot(dst, q0, input_precision=PRECISION) * scale
        dq1 = dq0
        dk1 = dk0
        if D1 > 0:
            dq1 = without_mean_key(tl.dot(ds, k1, input_precision=PRECISION), ds, k1, over, 1) * scale
            dk1 = tl.dot(dst, q1, input_precision=PRECISION) * scale
        dq_rows = row_offsets(y, x, dqy, dqx, DLQ, AD, LINEAR)
        dk_rows = row_offsets(ny, nx, dky, dkx, DLK, AD, LINEAR)
        dq_at = dq_ptr + plane(batch, wide_head, dqb, dqh, DLQ, AD)
        dk_at = dk_ptr + plane(batch, wide_head, dkb, dkh, DLK, AD)
        store_tile(dq_at, dq0, dq1, dq_rows, keep, dqd, D, D0, D1, DLQ, AD, WIDE)
        store_tile(dk_at, dk0, dk1, dk_rows, keep_n, dkd, D, D0, D1, DLK, AD, WIDE)
        batch, y0, x0 = next_group(batch, y0, x0, H, W, ph, pw, sy, sx, KIND)
    if DBIAS:
        queries, keys = equal_groups(H, W, ph, pw, KH, KW, N_ALIGN, K_ALIGN, KIND)
        partial_ptr += (part * heads + head).to(tl.int64) * queries * keys
        inside = (n < queries)[:, None] & (n < keys)[None, :]
        tl.store(partial_ptr + n[:, None] * keys + n[None, :], dbias, mask=inside)
