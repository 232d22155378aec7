"""The backward Triton kernel for groups of up to 32 tokens, several a program."""

import triton
import triton.language as tl

from mvkernels.triton.attention.backward_kernels import GRAD, INPUTS
from mvkernels.triton.attention.groups import SIZES, UNEQUAL, count_of, group_of, keys3, keys_map, tokens3
from mvkernels.triton.attention.row_kernels import (
    ROWS,
    masked,
    store_rows,
    whole_rows,
    without_mean_key,
)
from mvkernels.triton.tiles import (
    LOG2E,
    dense_strides,
    dot3_nt,
    load_tile3,
    round_tf32,
    rows3,
    store_tile3,
)


# UNITS small units as one batched product, as in forward_packed: everything is in one tile, so scores
# are computed once, and each of q, k, v, dout is read once, each gradient written once.
@triton.jit(do_not_specialize=INPUTS + GRAD + SIZES + ["units"])
def backward_packed(
    q_ptr, k_ptr, v_ptr, g_ptr, bias_ptr, dq_ptr, dk_ptr, dv_ptr, rows_ptr, scale, scale2,
    qsb, qsh, qsd, qsy, qsx, ksb, ksh, ksd, ksy, ksx, vsb, vsh, vsd, vsy, vsx,
    gsb, gsh, gsd, gsy, gsx, heads, H, W, ph, pw, KH, KW, sy, sx, bsh, bsm, bsn, units,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, DV: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    LQ: tl.constexpr, AQ: tl.constexpr, LK: tl.constexpr, AK: tl.constexpr, LV: tl.constexpr, AV: tl.constexpr,
    LG: tl.constexpr, AG: tl.constexpr,
    DLQ: tl.constexpr, DLK: tl.constexpr, DLV: tl.constexpr, AD: tl.constexpr, ADV: tl.constexpr, PACKED: tl.constexpr,
    BIAS: tl.constexpr, KIND: tl.constexpr, STORE_ROWS: tl.constexpr, PRECISION: tl.constexpr,
    UNITS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    KH, KW = keys_map(H, W, KH, KW, KIND)
    unit = tl.program_id(0) * UNITS + tl.arange(0, UNITS)
    batch, head, y0, x0 = group_of(unit, heads, H, W, ph, pw, sy, sx, KIND)
    n = tl.arange(0, TOKENS)[None, :]
    y, x, keep, tokens = tokens3(n, unit < units, y0, x0, H, W, ph, pw, KIND)
    keys = count_of(tokens, y0, x0, H, W, ph, pw, KIND)
    ny, nx, keep_n = y, x, keep
    if KIND == UNEQUAL:
        keys = KH * KW + tl.zeros_like(tokens)
        ny, nx, keep_n = keys3(n, unit < units, KH, KW)
    inside = keep[:, :, None] & keep_n[:, None, :]

    q_rows = rows3(batch * qsb + head * qsh, y, x, qsy, qsx, LQ, AQ)
    k_rows = rows3(batch * ksb + head * ksh, ny, nx, ksy, ksx, LK, AK)
    v_rows = rows3(batch * vsb + head * vsh, ny, nx, vsy, vsx, LV, AV)
    g_rows = rows3(batch * gsb + head * gsh, y, x, gsy, gsx, LG, AG)
    g0, g1 = load_tile3(g_ptr, g_rows, keep, gsd, DV, V0, V1, LG, PRECISION)
    q0, q1 = load_tile3(q_ptr, q_rows, keep, qsd, D, D0, D1, LQ, PRECISION)
    k0, k1 = load_tile3(k_ptr, k_rows, keep_n, ksd, D, D0, D1, LK, PRECISION)
    v0, v1 = load_tile3(v_ptr, v_rows, keep_n, vsd, DV, V0, V1, LV, PRECISION)
    scores = dot3_nt(q0, q1, k0, k1, D1, PRECISION) * scale2
    if BIAS:
        at = n[:, :, None] * bsm.to(tl.int64) + n[:, None, :] * bsn.to(tl.int64) + (head * bsh)[:, None, None]
        scores += tl.load(bias_ptr + at, mask=inside, other=0.0).to(tl.float32) * LOG2E
    dp = dot3_nt(g0, g1, v0, v1, V1, PRECISION)
    p, ds, top, share, delta, rest, peak = whole_rows(masked(scores, inside), dp, inside, n[:, None, :], 2)
    if STORE_ROWS:
        rows = rows_ptr + ((batch * heads + head) * ROWS * H * W)[:, None] + y * W + x
        store_rows(rows, H * W, keep, top, share, delta, rest, peak)
    ds = round_tf32(ds.to(k0.dtype), PRECISION)
    dst = tl.permute(ds, (0, 2, 1))
    pt = tl.permute(round_tf32(p.to(g0.dtype), PRECISION), (0, 2, 1))

    dvb, dvh, dvd, dvy, dvx = dense_strides(heads * PACKED, DV, KH, KW, DLV)
    dv0 = tl.dot(pt, g0, input_precision=PRECISION)
    dv1 = dv0
    if V1 > 0:
        dv1 = tl.dot(pt, g1, input_precision=PRECISION)
    dv_rows = rows3(batch * dvb + head * dvh, ny, nx, dvy, dvx, DLV, ADV)
    store_tile3(dv_ptr, dv0, dv1, dv_rows, keep_n, dvd, DV, V0, V1, DLV)

    dqb, dqh, dqd, dqy, dqx = dense_strides(heads * PACKED, D, H, W, DLQ)
    dkb, dkh, dkd, dky, dkx = dense_strides(heads * PACKED, D, KH, KW, DLK)
    over = 1.0 / tl.maximum(keys, 1).to(tl.float32)[:, None]
    dq0 = without_mean_key(tl.dot(ds, k0, input_precision=PRECISION), ds, k0, over, 2) * scale
    dk0 = tl.dot(dst, q0, input_precision=PRECISION) * scale
    dq1 = dq0
    dk1 = dk0
    if D1 > 0:
        dq1 = without_mean_key(tl.dot(ds, k1, input_precision=PRECISION), ds, k1, over, 2) * scale
        dk1 = tl.dot(dst, q1, input_precision=PRECISION) * scale
    dq_rows = rows3(batch * dqb + head * dqh, y, x, dqy, dqx, DLQ, AD)
    dk_rows = rows3(batch * dkb + head * dkh, ny, nx, dky, dkx, DLK, AD)
    store_tile3(dq_ptr, dq0, dq1, dq_rows, keep, dqd, D, D0, D1, DLQ)
    store_tile3(dk_ptr, dk0, dk1, dk_rows, keep_n, dkd, D, D0, D1, DLK)
