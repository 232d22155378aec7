"""The Triton kernel of inverted_residual. plan.py says what it is launched with.

A program has one tile after the other, TY x TX pixels of the result, and all hidden channels of theirs, BLOCK_H at a
time. Of these it makes the expanded map once for all pixels that the depthwise kernels of the tile reach, BLOCK_M at a
time: one product, activated, set to 0 outside of the map, and stored in x's dtype to a slice of a buffer that is this
program's alone. After a barrier the depthwise convolution reads from there. A lane has a few channels of a *cell*, SX
pixels of the result next to each other: what it reads in a row of the kernel it adds to all sums that have a tap there.
The activated sums of all cells are the rows of one operand of the projection.

In registers: the sums of a block of hidden channels, and those of the result, BLOCK_O channels. The buffer is small
enough to stay in the second-level cache: half types of the expanded map are written and read there once, times what
tiles share at their borders, and read again from the first-level cache. x is read once for each block of hidden
channels, from the caches but for the first time; weights are read once a tile; the result is written once. The
depthwise weights are copied once a program, channels next to each other. Sums are float32. What is stored between, and
what the projection multiplies, is rounded to x's dtype.
"""

import triton
import triton.language as tl

from mvkernels.triton.tiles import LOG2E, round_tf32


@triton.jit
def _and(values, another):
    # A tuple of tiles and one more tile. Tuples are what is indexed by constants alone.
    return values + (another,)  # noqa: RUF005 (Triton's tuples have no star)


@triton.jit
def _gated(x, power, PTX: tl.constexpr):
    # x / (1 + 2^power). With PTX by NVIDIA's approximate instructions alone: they are as exact as what the compiler
    # makes of the formula, which takes more instructions for denormal numbers, that nothing here can tell from 0.
    if PTX:
        return tl.inline_asm_elementwise(
            "{ .reg .f32 t; ex2.approx.ftz.f32 t, $2; add.f32 t, t, 0f3F800000; rcp.approx.ftz.f32 t, t;"
            " mul.f32 $0, $1, t; }",
            "=r,r,r", [x, power], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        return x / (1.0 + tl.exp2(power))


@triton.jit
def activate(x, ACT: tl.constexpr, PTX: tl.constexpr):
    """The activation of this name; NaN stays NaN."""
    if ACT == "relu":
        x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACT == "relu6":
        x = tl.maximum(tl.minimum(x, 6.0, propagate_nan=tl.PropagateNan.ALL), 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACT == "silu":
        x = _gated(x, x * -LOG2E, PTX)
    elif ACT == "hardswish":
        x = x * tl.maximum(tl.minimum(x * (1.0 / 6.0) + 0.5, 1.0), 0.0)
    elif ACT == "gelu":
        # x F(x), F = (1 + erf(x / sqrt 2)) / 2, as x / (1 + 2^(x q(x^2))), with q as csrc/cpu/common/activate.h has it:
        # an erf would take branches.
        s = tl.minimum(x * x, 28.09)
        q = (-5.20101784e-09 * s + 3.84683772e-07) * s - 1.14470995e-05
        q = (q * s + 1.59353680e-04) * s + 9.57040076e-05
        x = _gated(x, ((q * s - 1.04838726e-01) * s - 2.30220715) * x, PTX)
    elif ACT == "gelu_tanh":  # 0.5 (1 + tanh(y)) = 1 / (1 + exp(-2 y))
        x = _gated(x, (-0.102943240 * (x * x) - 2.30220820) * x, PTX)
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
def _wide(x, PAIRS: tl.constexpr):
    # x in float32. PAIRS: of NVIDIA's kernels, where each register has two: of such bfloat16 the compiler makes three
    # instructions and not two.
    if PAIRS and x.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xFFFF0000;", "=r,=r,r", [x], dtype=tl.float32, is_pure=True, pack=2
        )
    else:
        return x.to(tl.float32)


@triton.jit
def _vector(ptr, at, keep, GIVEN: tl.constexpr):
    # Parameters of these channels, float32; zeros if there are none.
    if GIVEN:
        return tl.load(ptr + at, mask=keep, other=0.0).to(tl.float32)
    else:
        return tl.zeros_like(at).to(tl.float32)


@triton.jit
def _taps(wd_ptr, taps_ptr, HIDDEN: tl.constexpr, PADDED: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr):
    # The depthwise weights (HIDDEN, K^2) as (K^2, PADDED), zeros past HIDDEN. Read as they lie: nothing waits for
    # what is written one by one.
    for first in range(0, K * K * PADDED, BLOCK):
        at = first + tl.arange(0, BLOCK)
        h = at // (K * K)
        tap = at - h * (K * K)
        weights = tl.load(wd_ptr + at, mask=at < HIDDEN * K * K, other=0.0)
        tl.store(taps_ptr + tap * PADDED + h, weights, mask=h < PADDED)


@triton.jit
def _expand(
    x_ptr, we_ptr, be_ptr, map_ptr, y0, x0, H, W, xsc, xsy, xsx, first_h, pixels,
    C: tl.constexpr, HIDDEN: tl.constexpr, BE: tl.constexpr, ACT: tl.constexpr, PTX: tl.constexpr, LX: tl.constexpr,
    AX: tl.constexpr, AC: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, RY: tl.constexpr,
    RX: tl.constexpr, CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    # BLOCK_H channels of the expanded map at the RY x RX pixels from (y0, x0), stored pixel after pixel.
    cols = tl.arange(0, BLOCK_H)
    h = first_h + cols
    keep_h = h < HIDDEN
    bias = _vector(be_ptr, h, keep_h, BE)
    first = 0
    while first < pixels:
        pixel = first + tl.arange(0, BLOCK_M)
        py = pixel // RX
        px = pixel - py * RX
        inside = (y0 + py >= 0) & (y0 + py < H) & (x0 + px >= 0) & (x0 + px < W)
        rows = py * xsy + px * xsx
        out = tl.zeros([BLOCK_M, BLOCK_H], tl.float32)
        for c in range(0, C, CHUNK):
            x = round_tf32(channels(x_ptr, rows, inside, xsc, c, C, CHUNK, LX, AX, WIDE), PRECISION)
            w = round_tf32(channels(we_ptr, h * C, keep_h, 1, c, C, CHUNK, 1, AC, False), PRECISION)
            out = tl.dot(x, tl.trans(w), out, input_precision=PRECISION)
        # Outside of the map the hidden map is padded with 0, not with what a bias alone would give.
        out = tl.where(inside[:, None], activate(out + bias[None, :], ACT, PTX), 0.0)
        tl.store(map_ptr + (pixel * BLOCK_H)[:, None] + cols[None, :], out.to(map_ptr.dtype.element_ty))
        first += BLOCK_M


@triton.jit
def _tap(total, each, weights, DX: tl.constexpr, K: tl.constexpr):
    # A depthwise sum with what lies at this place of a row of its kernel, if it is one.
    if DX >= 0 and DX < K:
        total += each * weights[DX]
    return total


@triton.jit
def _joined(parts, COUNT: tl.constexpr):
    # (M, N) tiles p_0 ... as one of (COUNT M, N): row COUNT m + i is row m of p_i.
    M: tl.constexpr = parts[0].shape[0]
    N: tl.constexpr = parts[0].shape[1]
    if COUNT == 1:
        return parts[0]
    elif COUNT == 2:
        return tl.reshape(tl.permute(tl.join(parts[0], parts[1]), (0, 2, 1)), (2 * M, N))
    else:
        even = tl.join(parts[0], parts[2])
        odd = tl.join(parts[1], parts[3])
        if COUNT == 8:
            even = tl.join(tl.join(parts[0], parts[4]), tl.join(parts[2], parts[6]))
            odd = tl.join(tl.join(parts[1], parts[5]), tl.join(parts[3], parts[7]))
            return tl.reshape(tl.permute(tl.join(even, odd), (0, 2, 3, 4, 1)), (8 * M, N))
        else:
            return tl.reshape(tl.permute(tl.join(even, odd), (0, 2, 3, 1)), (4 * M, N))


_INTS = ["xsb", "xsc", "xsy", "xsx", "H", "W", "OH", "OW", "down", "across", "tiles", "programs", "pixels"]


# One program: tiles pid, pid + programs, ...
@triton.jit(do_not_specialize=_INTS)
def forward_tiles(
    x_ptr, we_ptr, be_ptr, wd_ptr, bd_ptr, wp_ptr, bp_ptr, scratch_ptr, o_ptr,
    xsb, xsc, xsy, xsx, H, W, OH, OW, down, across, tiles, programs, pixels,
    C: tl.constexpr, HIDDEN: tl.constexpr, OUTPUTS: tl.constexpr, K: tl.constexpr,
    STRIDE: tl.constexpr, EXPANDS: tl.constexpr, BE: tl.constexpr, BD: tl.constexpr, BP: tl.constexpr,
    RESIDUAL: tl.constexpr, ACT: tl.constexpr, PTX: tl.constexpr, LX: tl.constexpr, AX: tl.constexpr,
    AC: tl.constexpr, AH: tl.constexpr, AO: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    PAIRS: tl.constexpr, HALO_Y: tl.constexpr, HALO_X: tl.constexpr, SLOT: tl.constexpr, TAPS: tl.constexpr,
    TY: tl.constexpr, TX: tl.constexpr, SX: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    O_BLOCKS: tl.constexpr = (OUTPUTS + BLOCK_O - 1) // BLOCK_O
    PADDED: tl.constexpr = (HIDDEN + BLOCK_H - 1) // BLOCK_H * BLOCK_H
    HALF: tl.constexpr = K // 2
    UP: tl.constexpr = HALF if HALO_Y else 0
    LEFT: tl.constexpr = HALF if HALO_X else 0
    RY: tl.constexpr = (TY - 1) * STRIDE + K if HALO_Y else TY * STRIDE
    RX: tl.constexpr = (TX - 1) * STRIDE + K if HALO_X else TX * STRIDE
    CELLS: tl.constexpr = TY * TX // SX
    if AX > 1:  # tells the compiler what divides them: of a number alone a hint is lost when it is folded
        xsb = xsb // AX * AX
        xsy = xsy // AX * AX
        xsx = xsx // AX * AX
    if WIDE:
        xsy = xsy.to(tl.int64)
        xsx = xsx.to(tl.int64)
    pid = tl.program_id(0)
    taps_ptr = scratch_ptr + pid.to(tl.int64) * SLOT
    map_ptr = taps_ptr + TAPS
    _taps(wd_ptr, taps_ptr, HIDDEN, PADDED, K, 1024)

    cell = tl.arange(0, CELLS)
    cy = cell // (TX // SX) * STRIDE
    cx = cell % (TX // SX) * (SX * STRIDE)
    cols = tl.arange(0, BLOCK_H)
    nowhere = tl.zeros([CELLS], tl.int32)
    # Where the first tap of a cell is in the rectangle.
    near_ptrs = map_ptr + (((cy + (UP - HALF)) * RX + cx + (LEFT - HALF)) * BLOCK_H)[:, None] + cols[None, :]
    at = tl.arange(0, TY * TX)
    py = at // TX
    px = at % TX
    area = OH.to(tl.int64) * OW

    # The place of a tile and the step to the next one: of the channels, across, down and in the batch. Nothing is
    # divided in the loop.
    part = pid % O_BLOCKS
    ix = pid // O_BLOCKS
    iy = ix // across
    batch = iy // down
    ix -= iy * across
    iy -= batch * down
    step_part = programs % O_BLOCKS
    step_x = programs // O_BLOCKS
    step_y = step_x // across
    step_batch = step_y // down
    step_x -= step_y * across
    step_y -= step_batch * down

    tile = pid
    while tile < tiles:
        first_o = part * BLOCK_O
        oy = iy * TY
        ox = ix * TX
        y0 = oy * STRIDE - UP
        x0 = ox * STRIDE - LEFT
        plane = batch.to(tl.int64) * xsb + (oy * STRIDE).to(tl.int64) * xsy + (ox * STRIDE).to(tl.int64) * xsx
        corner = batch.to(tl.int64) * xsb + y0.to(tl.int64) * xsy + x0.to(tl.int64) * xsx
        o = first_o + tl.arange(0, BLOCK_O)
        keep_o = o < OUTPUTS
        out = tl.zeros([TY * TX, BLOCK_O], tl.float32)
        for first in range(0, HIDDEN, BLOCK_H):
            # What follows writes where the block before has read, and reads what other threads have written.
            tl.debug_barrier()
            if EXPANDS:
                _expand(
                    x_ptr + corner, we_ptr, be_ptr, map_ptr, y0, x0, H, W, xsc, xsy, xsx, first, pixels, C, HIDDEN, BE,
                    ACT, PTX, LX, AX, AC, WIDE, PRECISION, RY, RX, CHUNK, BLOCK_M, BLOCK_H,
                )  # fmt: skip
                tl.debug_barrier()
            h = first + cols
            keep_h = h < HIDDEN
            bias = tl.zeros([CELLS, BLOCK_H], tl.float32)
            if BD:  # every row of the tile the same: each thread loads what it needs
                bias = tl.load(bd_ptr + (nowhere[:, None] + h[None, :]), mask=keep_h[None, :], other=0.0).to(tl.float32)
            sums = ()
            for _ in tl.static_range(SX):
                sums = _and(sums, bias)
            for dy in range(0, K):
                w_ptrs = taps_ptr + (dy * K * PADDED + first) + nowhere[:, None] + cols[None, :]
                weights = ()
                for dx in tl.static_range(K):
                    weights = _and(weights, _wide(tl.load(w_ptrs + dx * PADDED), PAIRS))
                for dx in tl.static_range((SX - 1) * STRIDE + K):
                    if EXPANDS:
                        there = nowhere == 0
                        if not HALO_Y:
                            there = there & (cy + dy >= HALF) & (cy + dy < RY + HALF)
                        if not HALO_X:
                            there = there & (cx + dx >= HALF) & (cx + dx < RX + HALF)
                        if HALO_X and HALO_Y:
                            each = tl.load(near_ptrs + (dy * RX + dx) * BLOCK_H)
                        else:
                            each = tl.load(near_ptrs + (dy * RX + dx) * BLOCK_H, mask=there[:, None], other=0.0)
                    else:
                        ty = oy * STRIDE + cy - HALF + dy
                        tx = ox * STRIDE + cx - HALF + dx
                        there = (ty >= 0) & (ty < H) & (tx >= 0) & (tx < W)
                        rows = (cy - HALF + dy) * xsy + (cx - HALF + dx) * xsx
                        each = channels(x_ptr + plane, rows, there, xsc, first, HIDDEN, BLOCK_H, LX, AX, WIDE)
                    each = _wide(each, PAIRS)
                    added = ()
                    for place in tl.static_range(SX):
                        added = _and(added, _tap(sums[place], each, weights, dx - place * STRIDE, K))
                    sums = added
            hidden = ()
            for place in tl.static_range(SX):
                each = activate(sums[place], ACT, PTX)
                if HIDDEN % BLOCK_H != 0:  # of an infinity that no weight asks for, NaN would be left
                    each = tl.where(keep_h[None, :], each, 0.0)
                hidden = _and(hidden, each.to(x_ptr.dtype.element_ty))
            narrow = channels(wp_ptr, o * HIDDEN, keep_o, 1, first, HIDDEN, BLOCK_H, 1, AH, False)
            out = tl.dot(round_tf32(_joined(hidden, SX), PRECISION), tl.trans(round_tf32(narrow, PRECISION)), out,
                         input_precision=PRECISION)  # fmt: skip

        there = (oy + py < OH) & (ox + px < OW)
        out += _vector(bp_ptr, o, keep_o, BP)[None, :]
        if RESIDUAL:
            rows = py * xsy + px * xsx
            out += channels(x_ptr + plane, rows, there, xsc, first_o, OUTPUTS, BLOCK_O, LX, AX, WIDE).to(tl.float32)
        value = out.to(o_ptr.dtype.element_ty)
        to = batch.to(tl.int64) * area + oy.to(tl.int64) * OW + ox
        within = py * OW + px
        if LX == 1:
            to = tl.multiple_of(to * OUTPUTS, AO)
            within = tl.multiple_of((within.to(tl.int64) if WIDE else within) * OUTPUTS, AO)
            tl.store(o_ptr + to + (within[:, None] + o[None, :]), value, mask=there[:, None] & keep_o[None, :])
        else:
            to += batch.to(tl.int64) * (OUTPUTS - 1) * area
            tl.store(o_ptr + to + (within[None, :] + (o * area)[:, None]), tl.trans(value),
                     mask=keep_o[:, None] & there[None, :])  # fmt: skip
        tile += programs
        part += step_part
        ix += step_x
        iy += step_y
        batch += step_batch
        if part >= O_BLOCKS:
            part -= O_BLOCKS
            ix += 1
        if ix >= across:
            ix -= across
            iy += 1
        if iy >= down:
            iy -= down
            batch += 1
