"""The Triton kernel of inverted_residual. plan.py says what it is launched with.

A program has BLOCK *cells*, rectangles of SY x SX pixels of the result, of any maps of the batch, and all hidden
channels of theirs, BLOCK_H at a time. The pixels with the same place in their cells are a tile (cells, channels), so
that neighbours are in tiles of their own and the depthwise convolution adds whole tiles: no pixel moves between
threads, and nothing is indexed. For every place that the kernels of a cell reach, within the cell and around it, one
product makes the tile of the expanded map, which is activated, set to 0 outside of the map, and added to all sums that
have a tap there: ((SY - 1) STRIDE + K) ((SX - 1) STRIDE + K) products for a cell, where a stored map would take SY SX
STRIDE^2. With SY = 1 no sum uses two rows of its kernel at a time, so the rows are a loop, which takes fewer registers.

In registers: the SY SX tiles of depthwise sums of a block of hidden channels, and those of the result, BLOCK_O
channels. The expanded map is in no memory. With SY > 1 and an expansion the compiler takes the loads of x out of the
loop over hidden channels and keeps the tiles in shared memory, so each pixel is read once for each place at which a
cell reaches it; else once more for each block of hidden channels, from the cache. Weights are read once a program, the
result is written once. Sums are float32. What the projection multiplies is rounded to x's dtype, as its weights are.
"""

import triton
import triton.language as tl

from mvkernels.triton.tiles import LOG2E, round_tf32


@triton.jit
def _and(values, another):
    # A tuple of tiles and one more tile. Tuples are what is indexed by constants alone.
    return values + (another,)  # noqa: RUF005 (Triton's tuples have no star)


@triton.jit
def activate(x, ACT: tl.constexpr):
    """The activation of this name; NaN stays NaN."""
    if ACT == "relu":
        x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACT == "relu6":
        x = tl.maximum(tl.minimum(x, 6.0, propagate_nan=tl.PropagateNan.ALL), 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACT == "silu":
        x = x / (1.0 + tl.exp2(-LOG2E * x))
    elif ACT == "hardswish":
        x = x * tl.maximum(tl.minimum(x * (1.0 / 6.0) + 0.5, 1.0), 0.0)
    elif ACT == "gelu":
        # x F(x), F = (1 + erf(x / sqrt 2)) / 2, as x / (1 + 2^(x q(x^2))), with q as csrc/cpu/common/activate.h has it:
        # an erf would take branches.
        s = tl.minimum(x * x, 28.09)
        q = (-5.20101784e-09 * s + 3.84683772e-07) * s - 1.14470995e-05
        q = (q * s + 1.59353680e-04) * s + 9.57040076e-05
        x = x / (1.0 + tl.exp2(((q * s - 1.04838726e-01) * s - 2.30220715) * x))
    elif ACT == "gelu_tanh":  # 0.5 (1 + tanh(y)) = 1 / (1 + exp(-2 y))
        x = x / (1.0 + tl.exp2((-0.102943240 * (x * x) - 2.30220820) * x))
    return x


@triton.jit
def channels(
    ptr, rows, keep, stride, first,
    C: tl.constexpr, WIDTH: tl.constexpr, LAYOUT: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Channels [first, first + WIDTH) of pixels (or weights) that begin at ``rows``; zeros outside ``keep``, past C.

    Where channels are not contiguous neighbouring lanes take neighbouring rows.
    """
    cols = first + tl.arange(0, WIDTH)
    if LAYOUT == 1:
        mask = keep[:, None]
        if C % WIDTH != 0:
            mask = mask & (cols < C)[None, :]
        return tl.load(ptr + (tl.multiple_of(rows, ALIGN)[:, None] + cols[None, :]), mask=mask, other=0.0)
    else:
        mask = keep[None, :]
        if C % WIDTH != 0:
            mask = mask & (cols < C)[:, None]
        along = cols.to(tl.int64) * stride if WIDE else cols * stride
        return tl.trans(tl.load(ptr + (along[:, None] + rows[None, :]), mask=mask, other=0.0))


@triton.jit
def _vector(ptr, at, keep, step, GIVEN: tl.constexpr):
    # Parameters of these channels, float32; zeros if there are none.
    if GIVEN:
        return tl.load(ptr + at * step, mask=keep, other=0.0).to(tl.float32)
    else:
        return tl.zeros_like(at).to(tl.float32)


@triton.jit
def _taps(ptr, h, keep_h, COUNT: tl.constexpr, STEP: tl.constexpr):
    # So many taps of the depthwise kernels of these channels, which lie next to each other.
    taps = ()
    for tap in tl.static_range(COUNT):
        taps = _and(taps, _vector(ptr + tap, h, keep_h, STEP, True))
    return taps


@triton.jit
def _expanded(
    x_ptr, w_ptr, w0, w1, rows, inside, stride, h, keep_h,
    C: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr, LAYOUT: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr,
    WALIGN: tl.constexpr, PRECISION: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    # (cells, BLOCK_H), float32: the pixels at ``rows`` times the weights of the hidden channels h.
    if CHUNK > 0:
        out = tl.zeros([inside.shape[0], h.shape[0]], tl.float32)
        for first in range(0, C, CHUNK):
            x = round_tf32(channels(x_ptr, rows, inside, stride, first, C, CHUNK, LAYOUT, ALIGN, WIDE), PRECISION)
            w = round_tf32(channels(w_ptr, h * C, keep_h, 1, first, C, CHUNK, 1, WALIGN, False), PRECISION)
            out = tl.dot(x, tl.trans(w), out, input_precision=PRECISION)
    else:
        x = round_tf32(channels(x_ptr, rows, inside, stride, 0, C, C0, LAYOUT, ALIGN, WIDE), PRECISION)
        out = tl.dot(x, tl.trans(w0), input_precision=PRECISION)
        if C1 > 0:
            x = round_tf32(channels(x_ptr, rows, inside, stride, C0, C, C1, LAYOUT, ALIGN, WIDE), PRECISION)
            out = tl.dot(x, tl.trans(w1), out, input_precision=PRECISION)
    return out


@triton.jit
def _tap(total, each, taps, TY: tl.constexpr, TX: tl.constexpr, K: tl.constexpr):
    # A depthwise sum with what lies at this place of its kernel, if it is one.
    if TY >= 0 and TY < K and TX >= 0 and TX < K:
        total += each * taps[TY * K + TX][None, :]
    return total


@triton.jit
def _row(
    sums, taps, x_ptr, we_ptr, w0, w1, bias, corner, keep, y, x, dy, H, W, xsc, xsy, xsx, h, keep_h, first,
    DY: tl.constexpr, C: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr, HIDDEN: tl.constexpr, K: tl.constexpr,
    STRIDE: tl.constexpr, EXPANDS: tl.constexpr, ACT: tl.constexpr, LX: tl.constexpr, AX: tl.constexpr,
    AC: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, CHUNK: tl.constexpr, SY: tl.constexpr,
    SX: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    # The depthwise sums with what row dy of all that the kernels of a cell reach gives them. DY is dy, or 0 where the
    # taps are those of this row alone.
    for dx in tl.static_range((SX - 1) * STRIDE + K):
        inside = keep & (y >= -dy) & (y < H - dy) & (x >= -dx) & (x < W - dx)
        rows = corner + (dy * xsy + dx * xsx)
        if EXPANDS:
            each = _expanded(
                x_ptr, we_ptr, w0, w1, rows, inside, xsc, h, keep_h, C, C0, C1, LX, AX, WIDE, AC, PRECISION, CHUNK
            )
            # Outside of the map the hidden map is padded with 0, not with what a bias alone would give.
            each = tl.where(inside[:, None], activate(each + bias[None, :], ACT), 0.0)
        else:
            each = channels(x_ptr, rows, inside, xsc, first, HIDDEN, BLOCK_H, LX, AX, WIDE).to(tl.float32)
        added = ()
        for place in tl.static_range(SY * SX):
            total = _tap(sums[place], each, taps, DY - place // SX * STRIDE, dx - place % SX * STRIDE, K)
            added = _and(added, total)
        sums = added
    return sums


_INTS = ["xsb", "xsc", "xsy", "xsx", "H", "W", "OH", "OW", "down", "across", "cells"]


# One program: BLOCK cells, BLOCK_O channels of the result. Programs of the same cells follow each other.
@triton.jit(do_not_specialize=_INTS)
def forward_cells(
    x_ptr, we_ptr, be_ptr, wd_ptr, bd_ptr, wp_ptr, bp_ptr, o_ptr,
    xsb, xsc, xsy, xsx, H, W, OH, OW, down, across, cells,
    C: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr, HIDDEN: tl.constexpr, OUTPUTS: tl.constexpr, K: tl.constexpr,
    STRIDE: tl.constexpr, EXPANDS: tl.constexpr, BE: tl.constexpr, BD: tl.constexpr, BP: tl.constexpr,
    RESIDUAL: tl.constexpr, ACT: tl.constexpr, LX: tl.constexpr, AX: tl.constexpr, AC: tl.constexpr, AH: tl.constexpr,
    AO: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, CHUNK: tl.constexpr, SY: tl.constexpr,
    SX: tl.constexpr, BLOCK: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    O_BLOCKS: tl.constexpr = (OUTPUTS + BLOCK_O - 1) // BLOCK_O
    HALF: tl.constexpr = K // 2
    pid = tl.program_id(0)
    first_o = pid % O_BLOCKS * BLOCK_O
    cell = pid // O_BLOCKS * BLOCK + tl.arange(0, BLOCK)
    keep = cell < cells
    row = cell // across
    oy = row % down * SY
    ox = (cell - row * across) * SX
    batch = (row // down).to(tl.int64)
    y = oy * STRIDE - HALF
    x = ox * STRIDE - HALF
    corner = batch * xsb + y.to(tl.int64) * xsy + x.to(tl.int64) * xsx  # where a cell's first kernel begins
    if WIDE:
        xsy = xsy.to(tl.int64)
        xsx = xsx.to(tl.int64)

    o = first_o + tl.arange(0, BLOCK_O)
    keep_o = o < OUTPUTS
    outs = ()
    for _ in tl.static_range(SY * SX):
        outs = _and(outs, tl.zeros([BLOCK, BLOCK_O], tl.float32))
    for first in range(0, HIDDEN, BLOCK_H):
        h = first + tl.arange(0, BLOCK_H)
        keep_h = h < HIDDEN
        bias = _vector(be_ptr, h, keep_h, 1, BE)
        w0 = bias
        w1 = bias
        if EXPANDS and CHUNK == 0:
            w0 = round_tf32(channels(we_ptr, h * C, keep_h, 1, 0, C, C0, 1, AC, False), PRECISION)
            if C1 > 0:
                w1 = round_tf32(channels(we_ptr, h * C, keep_h, 1, C0, C, C1, 1, AC, False), PRECISION)
        sums = ()
        for _ in tl.static_range(SY * SX):
            sums = _and(sums, tl.zeros([BLOCK, BLOCK_H], tl.float32))
        if SY == 1:  # no sum has two rows of its kernel in one: a loop holds what one row takes
            for dy in range(0, K):
                taps = _taps(wd_ptr + dy * K, h, keep_h, K, K * K)
                sums = _row(
                    sums, taps, x_ptr, we_ptr, w0, w1, bias, corner, keep, y, x, dy, H, W, xsc, xsy, xsx, h, keep_h,
                    first, 0, C, C0, C1, HIDDEN, K, STRIDE, EXPANDS, ACT, LX, AX, AC, WIDE, PRECISION, CHUNK, SY, SX,
                    BLOCK_H,
                )  # fmt: skip
        else:
            taps = _taps(wd_ptr, h, keep_h, K * K, K * K)
            for dy in tl.static_range((SY - 1) * STRIDE + K):
                sums = _row(
                    sums, taps, x_ptr, we_ptr, w0, w1, bias, corner, keep, y, x, dy, H, W, xsc, xsy, xsx, h, keep_h,
                    first, dy, C, C0, C1, HIDDEN, K, STRIDE, EXPANDS, ACT, LX, AX, AC, WIDE, PRECISION, CHUNK, SY, SX,
                    BLOCK_H,
                )  # fmt: skip
        bias = _vector(bd_ptr, h, keep_h, 1, BD)
        narrow = round_tf32(channels(wp_ptr, o * HIDDEN, keep_o, 1, first, HIDDEN, BLOCK_H, 1, AH, False), PRECISION)
        added = ()
        for place in tl.static_range(SY * SX):
            hidden = activate(sums[place] + bias[None, :], ACT)
            if HIDDEN % BLOCK_H != 0:  # of an infinity that no weight asks for, NaN would be left
                hidden = tl.where(keep_h[None, :], hidden, 0.0)
            hidden = round_tf32(hidden.to(x_ptr.dtype.element_ty), PRECISION)
            added = _and(added, tl.dot(hidden, tl.trans(narrow), outs[place], input_precision=PRECISION))
        outs = added

    bias = _vector(bp_ptr, o, keep_o, 1, BP)
    area = OH.to(tl.int64) * OW
    for place in tl.static_range(SY * SX):
        there = keep & (oy + place // SX < OH) & (ox + place % SX < OW)
        out = outs[place] + bias[None, :]
        if RESIDUAL:
            rows = corner + ((place // SX + HALF) * xsy + (place % SX + HALF) * xsx)
            out += channels(x_ptr, rows, there, xsc, first_o, OUTPUTS, BLOCK_O, LX, AX, WIDE).to(tl.float32)
        pixel = (oy + place // SX).to(tl.int64) * OW + (ox + place % SX)
        value = out.to(o_ptr.dtype.element_ty)
        if LX == 1:
            to = tl.multiple_of((batch * area + pixel) * OUTPUTS, AO)[:, None] + o[None, :]
            tl.store(o_ptr + to, value, mask=there[:, None] & keep_o[None, :])
        else:
            to = (batch * OUTPUTS * area + pixel)[None, :] + (o * area)[:, None]
            tl.store(o_ptr + to, tl.trans(value), mask=keep_o[:, None] & there[None, :])
