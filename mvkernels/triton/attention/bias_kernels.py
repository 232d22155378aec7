"""Gradient of the bias: what slices of the units add to it, for sum_slices; no atomics, the same sum in every run."""

import triton
import triton.language as tl

from mvkernels.triton.attention.backward_kernels import GRAD, INPUTS
from mvkernels.triton.attention.forward_kernels import bias_tile
from mvkernels.triton.attention.groups import (
    CLIPPED,
    SIZES,
    UNEQUAL,
    WINDOWS,
    added_digits,
    digits_of,
    equal_groups,
    first_pixel,
    groups_of,
    span_of,
    tokens_of,
)
from mvkernels.triton.attention.row_kernels import ROWS, load_rows, masked
from mvkernels.triton.tiles import (
    divider,
    dot_nt,
    load_tile,
    plane,
    row_offsets,
)


# One program sums dS of one (head, BLOCK_M x BLOCK_N) tile over its slice of (batch, group), in that
# order, in registers, and writes it once to partial[slice]. Scores are computed anew: a pass over
# q, k, v and dout costs less than writing dS of every unit.
@triton.jit(do_not_specialize=INPUTS + GRAD + SIZES + ["slices", "items", "m_blocks", "n_blocks"])
def bias_partials(
    q_ptr, k_ptr, v_ptr, g_ptr, bias_ptr, rows_ptr, partial_ptr, scale2,
    qsb, qsh, qsd, qsy, qsx, ksb, ksh, ksd, ksy, ksx, vsb, vsh, vsd, vsy, vsx,
    gsb, gsh, gsd, gsy, gsx, heads, H, W, ph, pw, KH, KW, sy, sx, bsh, bsm, bsn, slices, items, m_blocks, n_blocks,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, DV: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    LQ: tl.constexpr, AQ: tl.constexpr, LK: tl.constexpr, AK: tl.constexpr, LV: tl.constexpr, AV: tl.constexpr,
    LG: tl.constexpr, AG: tl.constexpr, N_ALIGN: tl.constexpr, K_ALIGN: tl.constexpr, BIAS_ALIGN: tl.constexpr,
    KIND: tl.constexpr, LINEAR: tl.constexpr, WIDE: tl.constexpr,
    WHOLE: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, LOOP: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    head = pid % heads
    pid = pid // heads
    n = (pid % n_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    pid = pid // n_blocks
    m = (pid % m_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    part = pid // m_blocks
    # All groups are equal where there is a bias.
    queries, keys = equal_groups(H, W, ph, pw, KH, KW, N_ALIGN, K_ALIGN, KIND)
    width = divider(pw if KIND >= WINDOWS else W // pw)
    key_width = width
    if KIND == UNEQUAL:
        key_width = divider(KW)
    of_keys = n < keys
    inside = (m < queries)[:, None] & of_keys[None, :]
    bias = bias_tile(bias_ptr, head.to(tl.int64), m, n, inside, bsh, bsm, bsn, BIAS_ALIGN)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    down, across = groups_of(H, W, ph, pw, sy, sx, KIND)
    each, gy, gx = digits_of(part, down, across)
    further = digits_of(slices, down, across)
    wide_head = head.to(tl.int64)
    for step in range(0, (items - part + slices - 1) // slices if LOOP == 0 else LOOP):
        item = part + step * slices
        batch = each.to(tl.int64)
        y0, x0 = first_pixel(gy, gx, ph, pw, sy, sx, KIND)
        group = (y0, x0, ph, pw, W)
        _, end = span_of(queries, y0, H, ph, pw, KIND)
        my, mx, keep_m = tokens_of(m, end, width, group, KIND, LINEAR, WIDE, WHOLE, COLUMNS)
        keep_m = keep_m & (item < items)
        ny, nx, keep_n = tokens_of(
            n, end if KIND == CLIPPED else keys, key_width, group, KIND, LINEAR, WIDE, WHOLE, COLUMNS
        )
        here = inside
        if KIND == CLIPPED:
            here = inside & keep_n[None, :]
        at = rows_ptr + (batch * heads + head) * ROWS * H * W + (mx if LINEAR else my * W + mx)
        top, share, delta, rest, peak = load_rows(at, H * W, keep_m)
        q_at = q_ptr + plane(batch, wide_head, qsb, qsh, LQ, AQ)
        k_at = k_ptr + plane(batch, wide_head, ksb, ksh, LK, AK)
        v_at = v_ptr + plane(batch, wide_head, vsb, vsh, LV, AV)
        g_at = g_ptr + plane(batch, wide_head, gsb, gsh, LG, AG)
        q_rows = row_offsets(my, mx, qsy, qsx, LQ, AQ, LINEAR)
        k_rows = row_offsets(ny, nx, ksy, ksx, LK, AK, LINEAR)
        q0, q1 = load_tile(q_at, q_rows, keep_m, qsd, D, D0, D1, LQ, AQ, WIDE, PRECISION)
        k0, k1 = load_tile(k_at, k_rows, keep_n, ksd, D, D0, D1, LK, AK, WIDE, PRECISION)
        scores = masked(dot_nt(q0, q1, k0, k1, D1, PRECISION) * scale2 + bias, here)
        p = tl.exp2(scores - top[:, None]) * share[:, None]
        g_rows = row_offsets(my, mx, gsy, gsx, LG, AG, LINEAR)
        v_rows = row_offsets(ny, nx, vsy, vsx, LV, AV, LINEAR)
        g0, g1 = load_tile(g_at, g_rows, keep_m, gsd, DV, V0, V1, LG, AG, WIDE, PRECISION)
        v0, v1 = load_tile(v_at, v_rows, keep_n, vsd, DV, V0, V1, LV, AV, WIDE, PRECISION)
        dp = dot_nt(g0, g1, v0, v1, V1, PRECISION)
        beside = tl.where(n[None, :] == peak[:, None], -rest[:, None], dp - delta[:, None])
        total += tl.where(here & keep_m[:, None], p * beside, 0.0)
        each, gy, gx = added_digits((each, gy, gx), further, down, across)
    area = queries.to(tl.int64) * keys
    base = partial_ptr + (part * heads + head) * area
    tl.store(base + m[:, None] * keys.to(tl.int64) + n[None, :], total, mask=inside)
