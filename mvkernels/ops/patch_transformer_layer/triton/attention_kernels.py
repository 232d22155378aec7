"""Triton kernels of the layer that know of groups: attention of all heads, with the projection and the residual.

A program takes pixels of one group (or several small groups whole) through all heads: the output of a head, as it
comes, is multiplied by the head's columns of the projection, and the sum over heads stays in registers. q, k and v are
the thirds of the packed map that the first kernel wrote, (B, H, W, 3C).
"""

import triton
import triton.language as tl

from mvkernels.ops.patch_transformer_layer.triton.row_kernels import load_vector
from mvkernels.triton.tiles import (
    divider,
    dot3_nt,
    dot_nt,
    group_extent,
    load_tile,
    load_tile3,
    pixel_of,
    round_tf32,
    round_tile,
    store_tile,
    store_tile3,
)

_SIZES = ["H", "W", "ph", "pw"]


@triton.jit
def _projected(
    acc, a0, a1, w_ptr, c, head,
    C: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # acc + (rows, D) of this head times its columns of the rows c of the weights (C, C).
    rows = tl.multiple_of(c * C + head * D, ALIGN)
    w0, w1 = load_tile(w_ptr, rows, c < C, 1, D, D0, D1, 1, ALIGN, False)
    w0 = round_tf32(w0, PRECISION, PURE=True)
    acc = tl.dot(a0, tl.trans(w0), acc, input_precision=PRECISION)
    if D1 > 0:
        w1 = round_tf32(w1, PRECISION, PURE=True)
        acc = tl.dot(a1, tl.trans(w1), acc, input_precision=PRECISION)
    return acc


@triton.jit
def _softmax(scores, AXIS: tl.constexpr):
    # (exponentials, sum) of rows in base 2.
    top = tl.max(scores, AXIS)
    # A row of -inf alone must come out as NaN (0/0), without -inf - -inf on the way.
    top = tl.where(top == -float("inf"), 0.0, top)
    p = tl.exp2(scores - tl.expand_dims(top, AXIS))
    return p, tl.sum(p, AXIS)


# One head of BLOCK_M queries against all keys of their group: the output, its pieces in the map's dtype. With ONE_PASS
# a row of scores is whole in registers; else keys and values pass in blocks of BLOCK_N, with the running maximum and
# sum.
@triton.jit
def _head(
    qkv_ptr, head, m_rows, keep_m, tokens, width, gy, gx, ph, pw, W, scale2,
    C: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, ALIGN: tl.constexpr,
    PRECISION: tl.constexpr, ONE_PASS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, LOOP: tl.constexpr,
):  # fmt: skip
    q_at = tl.multiple_of(m_rows * (3 * C) + head * D, ALIGN)
    q0, q1 = load_tile(qkv_ptr, q_at, keep_m, 1, D, D0, D1, 1, ALIGN, False, PRECISION)
    if ONE_PASS:
        keys = tl.arange(0, BLOCK_N)
        keep = keys < tokens
        y, x = pixel_of(keys, width, gy, gx, ph, pw, False, False)
        at = tl.multiple_of((y * W + x) * (3 * C) + head * D, ALIGN)
        k0, k1 = load_tile(qkv_ptr + C, at, keep, 1, D, D0, D1, 1, ALIGN, False, PRECISION)
        scores = dot_nt(q0, q1, k0, k1, D1, PRECISION) * scale2
        scores = tl.where(keep[None, :], scores, -float("inf"))
        p, total = _softmax(scores, 1)
        v0, v1 = load_tile(qkv_ptr + 2 * C, at, keep, 1, D, D0, D1, 1, ALIGN, False, PRECISION)
        p = round_tf32(p.to(v0.dtype), PRECISION)
        a0 = tl.dot(p, v0, input_precision=PRECISION)
        a1 = a0
        if D1 > 0:
            a1 = tl.dot(p, v1, input_precision=PRECISION)
    else:
        top = tl.full([BLOCK_M], -float("inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        a0 = tl.zeros([BLOCK_M, D0], tl.float32)
        a1 = tl.zeros([BLOCK_M, D1 if D1 > 0 else 1], tl.float32)
        for start in range(0, tokens if LOOP == 0 else LOOP, BLOCK_N):
            keys = start + tl.arange(0, BLOCK_N)
            keep = keys < tokens
            y, x = pixel_of(keys, width, gy, gx, ph, pw, False, False)
            at = tl.multiple_of((y * W + x) * (3 * C) + head * D, ALIGN)
            k0, k1 = load_tile(qkv_ptr + C, at, keep, 1, D, D0, D1, 1, ALIGN, False, PRECISION)
            v0, v1 = load_tile(qkv_ptr + 2 * C, at, keep, 1, D, D0, D1, 1, ALIGN, False, PRECISION)
            scores = dot_nt(q0, q1, k0, k1, D1, PRECISION) * scale2
            scores = tl.where(keep[None, :], scores, -float("inf"))
            new_top = tl.maximum(top, tl.max(scores, 1))
            used = tl.where(new_top == -float("inf"), 0.0, new_top)
            p = tl.exp2(scores - used[:, None])
            shrink = tl.exp2(top - used)
            total = total * shrink + tl.sum(p, 1)
            top = new_top
            p = round_tf32(p.to(v0.dtype), PRECISION)
            a0 = tl.dot(p, v0, a0 * shrink[:, None], input_precision=PRECISION)
            if D1 > 0:
                a1 = tl.dot(p, v1, a1 * shrink[:, None], input_precision=PRECISION)
    over = (1.0 / total)[:, None]
    a0 = (a0 * over).to(q0.dtype)
    if D1 > 0:
        a1 = a1 * over
    return a0, a1.to(q0.dtype)


# One program: BLOCK_M pixels of one group.
@triton.jit(do_not_specialize=_SIZES)
def attend_rows(
    qkv_ptr, w_ptr, bias_ptr, x_ptr, out_ptr, attention_ptr, scale2, H, W, ph, pw,
    C: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr, HEADS: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, ALIGN: tl.constexpr, SAVE: tl.constexpr,
    PRECISION: tl.constexpr, ONE_PASS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    LOOP: tl.constexpr, PROGRAMS_PER_GROUP,
):  # fmt: skip
    pid = tl.program_id(0)
    group = pid // PROGRAMS_PER_GROUP
    first = (pid - group * PROGRAMS_PER_GROUP) * BLOCK_M
    gx = group % pw
    rest = group // pw
    gy = rest % ph
    batch = (rest // ph).to(tl.int64)
    wg = group_extent(gx, W, pw)
    width = divider(wg)
    tokens = group_extent(gy, H, ph) * wg
    if first >= tokens:
        return
    image = batch * H * W
    qkv_ptr += image * (3 * C)
    x_ptr += image * C
    out_ptr += image * C
    attention_ptr += image * C

    m = first + tl.arange(0, BLOCK_M)
    keep_m = m < tokens
    y, x = pixel_of(m, width, gy, gx, ph, pw, False, False)
    m_rows = y * W + x
    acc0 = tl.zeros([BLOCK_M, C0], tl.float32)
    acc1 = tl.zeros([BLOCK_M, C1 if C1 > 0 else 1], tl.float32)
    for head in range(HEADS):
        a0, a1 = _head(
            qkv_ptr, head, m_rows, keep_m, tokens, width, gy, gx, ph, pw, W, scale2,
            C, D, D0, D1, ALIGN, PRECISION, ONE_PASS, BLOCK_M, BLOCK_N, LOOP,
        )  # fmt: skip
        if SAVE:
            a_at = tl.multiple_of(m_rows * C + head * D, ALIGN)
            store_tile(attention_ptr, a0, a1, a_at, keep_m, 1, D, D0, D1, 1, ALIGN, False)
        a0, a1 = round_tile(a0, a1, D1, PRECISION)
        acc0 = _projected(acc0, a0, a1, w_ptr, tl.arange(0, C0), head, C, D, D0, D1, ALIGN, PRECISION)
        if C1 > 0:
            acc1 = _projected(acc1, a0, a1, w_ptr, C0 + tl.arange(0, C1), head, C, D, D0, D1, ALIGN, PRECISION)
    at = tl.multiple_of(m_rows * C, ALIGN)
    b0, b1 = load_vector(bias_ptr, C, C0, C1)
    x0, x1 = load_tile(x_ptr, at, keep_m, 1, C, C0, C1, 1, ALIGN, False)
    acc0 = acc0 + b0[None, :] + x0.to(tl.float32)  # last: a residual may be far larger
    if C1 > 0:
        acc1 = acc1 + b1[None, :] + x1.to(tl.float32)
    store_tile(out_ptr, acc0, acc1, at, keep_m, 1, C, C0, C1, 1, ALIGN, False)


# One program: UNITS small groups of at most TOKENS pixels, as a batched product; a group never meets another's values.
@triton.jit(do_not_specialize=[*_SIZES, "groups"])
def attend_packed(
    qkv_ptr, w_ptr, bias_ptr, x_ptr, out_ptr, attention_ptr, scale2, H, W, ph, pw, groups,
    C: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr, HEADS: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, ALIGN: tl.constexpr, SAVE: tl.constexpr,
    PRECISION: tl.constexpr, TOKENS: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    ROWS: tl.constexpr = UNITS * TOKENS
    group = tl.program_id(0) * UNITS + tl.arange(0, UNITS)
    gx = group % pw
    rest = group // pw
    gy = rest % ph
    batch = (rest // ph).to(tl.int64)
    wg = group_extent(gx, W, pw)
    tokens = tl.where(group < groups, group_extent(gy, H, ph) * wg, 0)
    n = tl.arange(0, TOKENS)[None, :]
    row = n // tl.maximum(wg, 1)[:, None]
    in_image = (gy[:, None] + row * ph).to(tl.int64) * W + (gx[:, None] + (n - row * wg[:, None]) * pw)
    keep = n < tokens[:, None]
    rows = (batch * H * W)[:, None] + in_image
    acc0 = tl.zeros([ROWS, C0], tl.float32)
    acc1 = tl.zeros([ROWS, C1 if C1 > 0 else 1], tl.float32)
    for head in range(HEADS):
        at = tl.multiple_of(rows * (3 * C) + head * D, [ALIGN, ALIGN])
        q0, q1 = load_tile3(qkv_ptr, at, keep, 1, D, D0, D1, 1, PRECISION)
        k0, k1 = load_tile3(qkv_ptr + C, at, keep, 1, D, D0, D1, 1, PRECISION)
        scores = dot3_nt(q0, q1, k0, k1, D1, PRECISION) * scale2
        scores = tl.where(keep[:, None, :], scores, -float("inf"))
        p, total = _softmax(scores, 2)
        v0, v1 = load_tile3(qkv_ptr + 2 * C, at, keep, 1, D, D0, D1, 1, PRECISION)
        p = round_tf32(p.to(v0.dtype), PRECISION)
        over = (1.0 / total)[:, :, None]
        a0 = (tl.dot(p, v0, input_precision=PRECISION) * over).to(v0.dtype)
        a1 = a0
        if D1 > 0:
            a1 = (tl.dot(p, v1, input_precision=PRECISION) * over).to(v0.dtype)
        if SAVE:
            a_at = tl.multiple_of(rows * C + head * D, [ALIGN, ALIGN])
            store_tile3(attention_ptr, a0, a1, a_at, keep, 1, D, D0, D1, 1)
        a0 = tl.reshape(a0, (ROWS, D0))
        a1 = tl.reshape(a1, (ROWS, D1 if D1 > 0 else D0))
        a0, a1 = round_tile(a0, a1, D1, PRECISION)
        acc0 = _projected(acc0, a0, a1, w_ptr, tl.arange(0, C0), head, C, D, D0, D1, ALIGN, PRECISION)
        if C1 > 0:
            acc1 = _projected(acc1, a0, a1, w_ptr, C0 + tl.arange(0, C1), head, C, D, D0, D1, ALIGN, PRECISION)
    at = tl.multiple_of(tl.reshape(rows, (ROWS,)) * C, ALIGN)
    keep_m = tl.reshape(keep, (ROWS,))
    b0, b1 = load_vector(bias_ptr, C, C0, C1)
    x0, x1 = load_tile(x_ptr, at, keep_m, 1, C, C0, C1, 1, ALIGN, False)
    acc0 = acc0 + b0[None, :] + x0.to(tl.float32)  # last: a residual may be far larger
    if C1 > 0:
        acc1 = acc1 + b1[None, :] + x1.to(tl.float32)
    store_tile(out_ptr, acc0, acc1, at, keep_m, 1, C, C0, C1, 1, ALIGN, False)
