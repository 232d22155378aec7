"""Forward Triton kernels. launcher.py says which runs when, groups.py what the tokens of a group are."""

import triton
import triton.language as tl

from mvkernels.triton.attention.groups import (
    CLIPPED,
    SIZES,
    UNEQUAL,
    extent_of,
    group_of,
    keys3,
    span_of,
    tokens3,
    tokens_of,
)
from mvkernels.triton.tiles import (
    LOG2E,
    dense_strides,
    divider,
    dot3_nt,
    dot_nt,
    load_tile,
    load_tile3,
    plane,
    round_tf32,
    row_offsets,
    rows3,
    store_tile,
    store_tile3,
)

_STRIDES = ["qsb", "qsh", "qsd", "qsy", "qsx", "ksb", "ksh", "ksd", "ksy", "ksx", "vsb", "vsh", "vsd", "vsy", "vsx"]


@triton.jit
def load_bias(bias_ptr, head, m, n, keep, bsh, bsm, bsn, BIAS_ALIGN: tl.constexpr):
    # (queries, keys) of the bias. BIAS_ALIGN > 0: keys are contiguous. Offsets inside a head are
    # 32-bit: a tile of 64-bit ones does not fit the registers.
    plane = head * bsh
    rows = m * bsm
    if BIAS_ALIGN > 0:
        plane = tl.multiple_of(plane, BIAS_ALIGN)
        offsets = tl.multiple_of(rows, BIAS_ALIGN)[:, None] + n[None, :]
    else:
        offsets = rows[:, None] + (n * bsn)[None, :]
    return tl.load(bias_ptr + plane + offsets, mask=keep, other=0.0)


@triton.jit
def bias_tile(bias_ptr, head, m, n, keep, bsh, bsm, bsn, BIAS_ALIGN: tl.constexpr):
    # In base 2.
    return load_bias(bias_ptr, head, m, n, keep, bsh, bsm, bsn, BIAS_ALIGN).to(tl.float32) * LOG2E


@triton.jit
def in_bias(keep_m, keep_n, m, n, tokens, KIND: tl.constexpr):
    # Where a tile of the bias may be read. It has an entry for the places of a clipped window outside the map as well:
    # what is read there is not used, and a mask of whole runs leaves loads wide.
    if KIND == CLIPPED:
        keep_m = m < tokens
        keep_n = n < tokens
    return keep_m[:, None] & keep_n[None, :]


# One program takes Q_BLOCKS blocks of BLOCK_M queries of one unit. With ONE_PASS all keys and values
# of the unit are in one tile of BLOCK_N, loaded once and kept (shared memory) over the query blocks;
# a row of scores is then whole in registers and its softmax needs no running maximum. Otherwise keys
# and values stream past each query block with the running maximum and sum. Either way the map is
# read in place, q and out move once, k and v once per program; scores never leave the registers.
# LOOP, here and elsewhere, is 0, or for the interpreter, which wants bounds as numbers, the bound.
@triton.jit(do_not_specialize=_STRIDES + SIZES)
def forward_rows(
    q_ptr, k_ptr, v_ptr, o_ptr, bias_ptr, scale2,
    qsb, qsh, qsd, qsy, qsx, ksb, ksh, ksd, ksy, ksx, vsb, vsh, vsd, vsy, vsx,
    heads, H, W, ph, pw, KH, KW, sy, sx, bsh, bsm, bsn,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, DV: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    LQ: tl.constexpr, AQ: tl.constexpr, LK: tl.constexpr, AK: tl.constexpr, LV: tl.constexpr, AV: tl.constexpr,
    LO: tl.constexpr, AO: tl.constexpr, N_ALIGN: tl.constexpr, K_ALIGN: tl.constexpr,
    BIAS: tl.constexpr, BIAS_ALIGN: tl.constexpr,
    KIND: tl.constexpr, LINEAR: tl.constexpr, WIDE: tl.constexpr,
    WHOLE: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr, ONE_PASS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, Q_BLOCKS: tl.constexpr,
    LOOP: tl.constexpr, PROGRAMS_PER_UNIT,
):  # fmt: skip
    pid = tl.program_id(0)
    unit = pid // PROGRAMS_PER_UNIT
    first = (pid - unit * PROGRAMS_PER_UNIT) * (Q_BLOCKS * BLOCK_M)
    batch, head, y0, x0 = group_of(unit, heads, H, W, ph, pw, sy, sx, KIND)
    rows, columns = extent_of(y0, x0, H, W, ph, pw, KIND)
    tokens = tl.multiple_of(rows * columns, N_ALIGN)
    begin, end = span_of(tokens, y0, H, ph, pw, KIND)
    if first >= end:
        return
    if KIND == CLIPPED and first + Q_BLOCKS * BLOCK_M <= begin:
        return
    group = (y0, x0, ph, pw, W)
    width = divider(columns)
    last = end
    key_width = width
    if KIND == UNEQUAL:
        last = tl.multiple_of(KH * KW, K_ALIGN)
        key_width = divider(KW)
    osb, osh, osd, osy, osx = dense_strides(heads, DV, H, W, LO)
    q_ptr += plane(batch, head, qsb, qsh, LQ, AQ)
    k_ptr += plane(batch, head, ksb, ksh, LK, AK)
    v_ptr += plane(batch, head, vsb, vsh, LV, AV)
    o_ptr += plane(batch, head, osb, osh, LO, AO)

    n = tl.arange(0, BLOCK_N)
    if ONE_PASS:
        y, x, keep_n = tokens_of(n, last, key_width, group, KIND, LINEAR, WIDE, WHOLE, COLUMNS)
        k0, k1 = load_tile(
            k_ptr, row_offsets(y, x, ksy, ksx, LK, AK, LINEAR), keep_n, ksd, D, D0, D1, LK, AK, WIDE, PRECISION
        )
        v0, v1 = load_tile(
            v_ptr, row_offsets(y, x, vsy, vsx, LV, AV, LINEAR), keep_n, vsd, DV, V0, V1, LV, AV, WIDE, PRECISION
        )

    for block in range(Q_BLOCKS):
        m = first + block * BLOCK_M + tl.arange(0, BLOCK_M)
        my, mx, keep_m = tokens_of(m, end, width, group, KIND, LINEAR, WIDE, WHOLE, COLUMNS)
        q_rows = row_offsets(my, mx, qsy, qsx, LQ, AQ, LINEAR)
        q0, q1 = load_tile(q_ptr, q_rows, keep_m, qsd, D, D0, D1, LQ, AQ, WIDE, PRECISION)
        if ONE_PASS:
            scores = dot_nt(q0, q1, k0, k1, D1, PRECISION) * scale2
            if BIAS:
                inside = in_bias(keep_m, keep_n, m, n, tokens, KIND)
                scores += bias_tile(bias_ptr, head, m, n, inside, bsh, bsm, bsn, BIAS_ALIGN)
            scores = tl.where(keep_n[None, :], scores, -float("inf"))
            top = tl.max(scores, 1)
            # A row of -inf alone must come out as NaN (0/0), without -inf - -inf on the way.
            top = tl.where(top == -float("inf"), 0.0, top)
            p = tl.exp2(scores - top[:, None])
            total = tl.sum(p, 1)
            p = round_tf32(p.to(v0.dtype), PRECISION)
            acc0 = tl.dot(p, v0, input_precision=PRECISION)
            acc1 = acc0
            if V1 > 0:
                acc1 = tl.dot(p, v1, input_precision=PRECISION)
        else:
            top = tl.full([BLOCK_M], -float("inf"), tl.float32)
            total = tl.zeros([BLOCK_M], tl.float32)
            acc0 = tl.zeros([BLOCK_M, V0], tl.float32)
            acc1 = tl.zeros([BLOCK_M, V1 if V1 > 0 else 1], tl.float32)
            for start in range(begin // BLOCK_N * BLOCK_N if LOOP == 0 else 0, last if LOOP == 0 else LOOP, BLOCK_N):
                at = start + n
                y, x, keep = tokens_of(at, last, key_width, group, KIND, LINEAR, WIDE, WHOLE, COLUMNS)
                k_rows = row_offsets(y, x, ksy, ksx, LK, AK, LINEAR)
                v_rows = row_offsets(y, x, vsy, vsx, LV, AV, LINEAR)
                kb0, kb1 = load_tile(k_ptr, k_rows, keep, ksd, D, D0, D1, LK, AK, WIDE, PRECISION)
                vb0, vb1 = load_tile(v_ptr, v_rows, keep, vsd, DV, V0, V1, LV, AV, WIDE, PRECISION)
                scores = dot_nt(q0, q1, kb0, kb1, D1, PRECISION) * scale2
                if BIAS:
                    inside = in_bias(keep_m, keep, m, at, tokens, KIND)
                    scores += bias_tile(bias_ptr, head, m, at, inside, bsh, bsm, bsn, BIAS_ALIGN)
                scores = tl.where(keep[None, :], scores, -float("inf"))
                new_top = tl.maximum(top, tl.max(scores, 1))
                used = tl.where(new_top == -float("inf"), 0.0, new_top)
                p = tl.exp2(scores - used[:, None])
                shrink = tl.exp2(top - used)
                total = total * shrink + tl.sum(p, 1)
                top = new_top
                p = round_tf32(p.to(vb0.dtype), PRECISION)
                acc0 = tl.dot(p, vb0, acc0 * shrink[:, None], input_precision=PRECISION)
                if V1 > 0:
                    acc1 = tl.dot(p, vb1, acc1 * shrink[:, None], input_precision=PRECISION)
        over = 1.0 / total
        acc0 = acc0 * over[:, None]
        if V1 > 0:
            acc1 = acc1 * over[:, None]
        o_rows = row_offsets(my, mx, osy, osx, LO, AO, LINEAR)
        store_tile(o_ptr, acc0, acc1, o_rows, keep_m, osd, DV, V0, V1, LO, AO, WIDE)


# One program takes UNITS small units (at most TOKENS tokens each) as one batched product, a warp per
# unit or more: heads of the same pixel lie side by side, so a program reads long runs of a
# channels-last map. q, k, v and out each move once; nothing is exchanged between units.
@triton.jit(do_not_specialize=_STRIDES + SIZES + ["units"])
def forward_packed(
    q_ptr, k_ptr, v_ptr, o_ptr, bias_ptr, scale2,
    qsb, qsh, qsd, qsy, qsx, ksb, ksh, ksd, ksy, ksx, vsb, vsh, vsd, vsy, vsx,
    heads, H, W, ph, pw, KH, KW, sy, sx, bsh, bsm, bsn, units,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, DV: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    LQ: tl.constexpr, AQ: tl.constexpr, LK: tl.constexpr, AK: tl.constexpr, LV: tl.constexpr, AV: tl.constexpr,
    LO: tl.constexpr, AO: tl.constexpr, BIAS: tl.constexpr, KIND: tl.constexpr, PRECISION: tl.constexpr,
    UNITS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    unit = tl.program_id(0) * UNITS + tl.arange(0, UNITS)
    batch, head, y0, x0 = group_of(unit, heads, H, W, ph, pw, sy, sx, KIND)
    n = tl.arange(0, TOKENS)[None, :]
    y, x, keep, _ = tokens3(n, unit < units, y0, x0, H, W, ph, pw, KIND)
    ny, nx, keep_n = y, x, keep
    if KIND == UNEQUAL:
        ny, nx, keep_n = keys3(n, unit < units, KH, KW)

    q_rows = rows3(batch * qsb + head * qsh, y, x, qsy, qsx, LQ, AQ)
    k_rows = rows3(batch * ksb + head * ksh, ny, nx, ksy, ksx, LK, AK)
    v_rows = rows3(batch * vsb + head * vsh, ny, nx, vsy, vsx, LV, AV)
    q0, q1 = load_tile3(q_ptr, q_rows, keep, qsd, D, D0, D1, LQ, PRECISION)
    k0, k1 = load_tile3(k_ptr, k_rows, keep_n, ksd, D, D0, D1, LK, PRECISION)
    scores = dot3_nt(q0, q1, k0, k1, D1, PRECISION) * scale2
    inside = keep[:, :, None] & keep_n[:, None, :]
    if BIAS:
        at = n[:, :, None] * bsm.to(tl.int64) + n[:, None, :] * bsn.to(tl.int64) + (head * bsh)[:, None, None]
        scores += tl.load(bias_ptr + at, mask=inside, other=0.0).to(tl.float32) * LOG2E
    scores = tl.where(keep_n[:, None, :], scores, -float("inf"))
    top = tl.max(scores, 2)
    top = tl.where(top == -float("inf"), 0.0, top)
    p = tl.exp2(scores - top[:, :, None])
    total = tl.sum(p, 2)
    over = (1.0 / total)[:, :, None]
    v0, v1 = load_tile3(v_ptr, v_rows, keep_n, vsd, DV, V0, V1, LV, PRECISION)
    p = round_tf32(p.to(v0.dtype), PRECISION)
    acc0 = tl.dot(p, v0, input_precision=PRECISION) * over
    acc1 = acc0
    if V1 > 0:
        acc1 = tl.dot(p, v1, input_precision=PRECISION) * over

    osb, osh, osd, osy, osx = dense_strides(heads, DV, H, W, LO)
    o_rows = rows3(batch * osb + head * osh, y, x, osy, osx, LO, AO)
    store_tile3(o_ptr, acc0, acc1, o_rows, keep, osd, DV, V0, V1, LO)
