"""Triton kernels of multiscale_linear_attention's convolutions. triton_plan.py says what they are launched with.

A *unit* is one (batch, group): the D channels that a pointwise convolution mixes, q, k or v of one head. A tile is
(pixels, channels), padded by mask to a power of two. The depthwise convolution sums its taps in the order of
memory, (pixels, channels) or (channels, pixels), and is turned once, for the product.
"""

import triton
import triton.language as tl

from mvkernels.ops.patch_attention.triton_tiles import _piece, load_tile, pixel_of, plane, row_offsets, store_tile


@triton.jit
def _tile(ptr, y, x, keep, sd, sy, sx, D: tl.constexpr, WIDTH: tl.constexpr, LAYOUT: tl.constexpr,
          ALIGN: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    return load_tile(ptr, row_offsets(y, x, sy, sx, LAYOUT, ALIGN, False), keep, sd, D, WIDTH, 0, LAYOUT, ALIGN, WIDE)[
        0
    ]


@triton.jit
def _inside(y, x, keep, H, W):
    return keep & (y >= 0) & (y < H) & (x >= 0) & (x < W)


# The depthwise convolution of a unit at a tile of pixels; weights (D, K, K) from w_ptr. SIGN -1: its transpose.
@triton.jit
def _depthwise(
    x_ptr, w_ptr, y, x, keep, H, W, sd, sy, sx,
    D: tl.constexpr, WIDTH: tl.constexpr, K: tl.constexpr, SIGN: tl.constexpr, LAYOUT: tl.constexpr,
    ALIGN: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    cols = tl.arange(0, WIDTH)
    total = tl.zeros([BLOCK, WIDTH] if LAYOUT == 1 else [WIDTH, BLOCK], ACC)
    rows = row_offsets(y, x, sy, sx, LAYOUT, ALIGN, False)
    offsets, inside = _piece(rows, keep, sd, 0, WIDTH, D, LAYOUT, ALIGN, WIDE)
    if WIDE:
        sy = sy.to(tl.int64)
        sx = sx.to(tl.int64)
    for tap in range(0, K * K):
        dy = SIGN * (tap // K - K // 2)
        dx = SIGN * (tap % K - K // 2)
        there = (y + dy >= 0) & (y + dy < H) & (x + dx >= 0) & (x + dx < W)
        mask = inside & (there[:, None] if LAYOUT == 1 else there[None, :])
        shift = dy * sy + dx * sx
        if LAYOUT == 1:
            shift = tl.multiple_of(shift, ALIGN)
        value = tl.load(x_ptr + shift + offsets, mask=mask, other=0.0).to(ACC)
        weight = tl.load(w_ptr + cols * (K * K) + tap, mask=cols < D, other=0.0).to(ACC)
        total += value * (weight[None, :] if LAYOUT == 1 else weight[:, None])
    return total if LAYOUT == 1 else tl.trans(total)


@triton.jit
def _bias(ptr, GIVEN: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, ACC: tl.constexpr):
    cols = tl.arange(0, WIDTH)
    if GIVEN:
        return tl.load(ptr + cols, mask=cols < D, other=0.0).to(ACC)
    else:
        return tl.zeros([WIDTH], ACC)


_X = ["xsb", "xsh", "xsd", "xsy", "xsx"]
_O = ["osb", "osh", "osd", "osy", "osx"]
_SIZES = ["groups", "H", "W", "tiles", "slices", "steps"]


# One program: both convolutions of a unit at one tile. Between the two the value is rounded to the map's dtype, as
# the matrix instructions want it and as two convolutions one after the other would leave it.
@triton.jit(do_not_specialize=_X + _O + _SIZES)
def aggregate(
    x_ptr, w_ptr, m_ptr, wb_ptr, mb_ptr, o_ptr,
    xsb, xsh, xsd, xsy, xsx, osb, osh, osd, osy, osx, groups, H, W, tiles, slices, steps,
    D: tl.constexpr, WIDTH: tl.constexpr, K: tl.constexpr, WB: tl.constexpr, MB: tl.constexpr,
    LX: tl.constexpr, AX: tl.constexpr, LO: tl.constexpr, AO: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    pid = tl.program_id(0)
    group = (pid % groups).to(tl.int64)
    rest = pid // groups
    batch = (rest // tiles).to(tl.int64)
    n = (rest % tiles).to(tl.int32) * BLOCK + tl.arange(0, BLOCK)
    keep = n < H * W
    y, x = pixel_of(n, W, 0, 0, 1, 1, False, WIDE)
    first = group * D
    x_ptr += plane(batch, group, xsb, xsh, LX, AX)
    o_ptr += plane(batch, group, osb, osh, LO, AO)
    each = _depthwise(
        x_ptr, w_ptr + first * (K * K), y, x, keep, H, W, xsd, xsy, xsx, D, WIDTH, K, 1, LX, AX, WIDE, BLOCK, ACC
    )
    each = (each + _bias(wb_ptr + first, WB, D, WIDTH, ACC)[None, :]).to(x_ptr.dtype.element_ty)
    rows = tl.arange(0, WIDTH)
    inside = (rows < D)[:, None] & (rows < D)[None, :]
    mix = tl.load(m_ptr + first * D + rows[None, :] * D + rows[:, None], mask=inside, other=0.0)  # (in, out)
    out = tl.dot(each, mix, input_precision=PRECISION, out_dtype=ACC)
    out += _bias(mb_ptr + first, MB, D, WIDTH, ACC)[None, :]
    store_tile(o_ptr, out, out, row_offsets(y, x, osy, osx, LO, AO, False), keep, osd, D, WIDTH, 0, LO, AO, WIDE)


_G = ["gsb", "gsh", "gsd", "gsy", "gsx"]
_E = ["esb", "esh", "esd", "esy", "esx"]


# One program, a slice of a unit's tiles: e, the gradient of what the depthwise convolution made; with WEIGHTS the
# slice's part of the gradients of the pointwise weight and both biases, as rows of (D + 2, D).
@triton.jit(do_not_specialize=_X + _G + _E + _SIZES)
def pointwise_backward(
    g_ptr, x_ptr, w_ptr, m_ptr, wb_ptr, e_ptr, p_ptr,
    gsb, gsh, gsd, gsy, gsx, xsb, xsh, xsd, xsy, xsx, esb, esh, esd, esy, esx,
    groups, H, W, tiles, slices, steps,
    D: tl.constexpr, WIDTH: tl.constexpr, K: tl.constexpr, WB: tl.constexpr, MB: tl.constexpr,
    LG: tl.constexpr, AG: tl.constexpr, LX: tl.constexpr, AX: tl.constexpr, LE: tl.constexpr, AE: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, WEIGHTS: tl.constexpr, BLOCK: tl.constexpr, LOOP: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    pid = tl.program_id(0)
    group = (pid % groups).to(tl.int64)
    rest = pid // groups
    part = (rest % slices).to(tl.int64)
    batch = (rest // slices).to(tl.int64)
    first = group * D
    g_ptr += plane(batch, group, gsb, gsh, LG, AG)
    x_ptr += plane(batch, group, xsb, xsh, LX, AX)
    e_ptr += plane(batch, group, esb, esh, LE, AE)
    rows = tl.arange(0, WIDTH)
    inside = (rows < D)[:, None] & (rows < D)[None, :]
    mix = tl.load(m_ptr + first * D + rows[:, None] * D + rows[None, :], mask=inside, other=0.0)  # (out, in)
    dmix = tl.zeros([WIDTH, WIDTH], ACC)
    dmb = tl.zeros([WIDTH], ACC)
    dwb = tl.zeros([WIDTH], ACC)
    for step in range(0, steps if LOOP == 0 else LOOP):
        n = (part.to(tl.int32) * steps + step) * BLOCK + tl.arange(0, BLOCK)
        keep = n < H * W
        y, x = pixel_of(n, W, 0, 0, 1, 1, False, WIDE)
        g = _tile(g_ptr, y, x, keep, gsd, gsy, gsx, D, WIDTH, LG, AG, WIDE)
        e = tl.dot(g, mix, input_precision=PRECISION, out_dtype=ACC).to(e_ptr.dtype.element_ty)
        store_tile(e_ptr, e, e, row_offsets(y, x, esy, esx, LE, AE, False), keep, esd, D, WIDTH, 0, LE, AE, WIDE)
        if WEIGHTS:
            each = _depthwise(
                x_ptr, w_ptr + first * (K * K), y, x, keep, H, W, xsd, xsy, xsx,
                D, WIDTH, K, 1, LX, AX, WIDE, BLOCK, ACC,
            )  # fmt: skip
            each = (each + _bias(wb_ptr + first, WB, D, WIDTH, ACC)[None, :]).to(g.dtype)
            dmix = tl.dot(tl.trans(g), each, dmix, input_precision=PRECISION, out_dtype=ACC)
            dmb += tl.sum(g.to(ACC), 0)
            dwb += tl.sum(e.to(ACC), 0)
    if WEIGHTS:
        p_ptr += ((batch * slices + part) * groups + group) * ((D + 2) * D)
        tl.store(p_ptr + rows[:, None] * D + rows[None, :], dmix, mask=inside)
        tl.store(p_ptr + D * D + rows, dmb, mask=rows < D)
        tl.store(p_ptr + (D + 1) * D + rows, dwb, mask=rows < D)


# One program: the transposed depthwise convolution of e at one tile, added to what is in the map already.
@triton.jit(do_not_specialize=_E + _O + _SIZES)
def depthwise_backward(
    e_ptr, w_ptr, o_ptr,
    esb, esh, esd, esy, esx, osb, osh, osd, osy, osx, groups, H, W, tiles, slices, steps,
    D: tl.constexpr, WIDTH: tl.constexpr, K: tl.constexpr, WB: tl.constexpr, MB: tl.constexpr,
    LE: tl.constexpr, AE: tl.constexpr, LO: tl.constexpr, AO: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = tl.float64 if e_ptr.dtype.element_ty == tl.float64 else tl.float32
    pid = tl.program_id(0)
    group = (pid % groups).to(tl.int64)
    rest = pid // groups
    batch = (rest // tiles).to(tl.int64)
    n = (rest % tiles).to(tl.int32) * BLOCK + tl.arange(0, BLOCK)
    keep = n < H * W
    y, x = pixel_of(n, W, 0, 0, 1, 1, False, WIDE)
    e_ptr += plane(batch, group, esb, esh, LE, AE)
    o_ptr += plane(batch, group, osb, osh, LO, AO)
    total = _depthwise(
        e_ptr, w_ptr + group * D * (K * K), y, x, keep, H, W, esd, esy, esx,
        D, WIDTH, K, -1, LE, AE, WIDE, BLOCK, ACC,
    )  # fmt: skip
    total += _tile(o_ptr, y, x, keep, osd, osy, osx, D, WIDTH, LO, AO, WIDE).to(ACC)
    store_tile(o_ptr, total, total, row_offsets(y, x, osy, osx, LO, AO, False), keep, osd, D, WIDTH, 0, LO, AO, WIDE)


# One program: a slice of the (batch, tile) pairs of one group, and one row of taps, side by side in TAPS lanes.
# What it adds to the gradient of the depthwise weight goes to (slice, channel, K * K).
@triton.jit(do_not_specialize=_E + _X + _SIZES + ["items"])
def depthwise_weight(
    e_ptr, x_ptr, p_ptr,
    esb, esh, esd, esy, esx, xsb, xsh, xsd, xsy, xsx, groups, H, W, tiles, slices, steps, items,
    D: tl.constexpr, WIDTH: tl.constexpr, K: tl.constexpr, WB: tl.constexpr, MB: tl.constexpr,
    LE: tl.constexpr, AE: tl.constexpr, LX: tl.constexpr, AX: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, TAPS: tl.constexpr, BLOCK: tl.constexpr, LOOP: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    pid = tl.program_id(0)
    group = (pid % groups).to(tl.int64)
    rest = pid // groups
    row = rest % K
    part = (rest // K).to(tl.int64)
    cols = tl.arange(0, WIDTH)
    taps = tl.arange(0, TAPS)
    sums = tl.zeros([TAPS, WIDTH], ACC)
    for step in range(0, steps if LOOP == 0 else LOOP):
        item = part * steps + step
        batch = item // tiles
        n = (item % tiles).to(tl.int32) * BLOCK + tl.arange(0, BLOCK)
        keep = (n < H * W) & (item < items)
        y, x = pixel_of(n, W, 0, 0, 1, 1, False, WIDE)
        e = _tile(e_ptr + plane(batch, group, esb, esh, LE, AE), y, x, keep, esd, esy, esx, D, WIDTH, LE, AE, WIDE)
        ty = y[:, None] + (row - K // 2) + taps[None, :] * 0
        tx = x[:, None] + (taps - K // 2)[None, :]
        there = _inside(ty, tx, keep[:, None] & (taps < K)[None, :], H, W)
        offsets = (ty * xsy + tx * xsx)[:, :, None] + (cols.to(tl.int64) * xsd)[None, None, :]
        mask = there[:, :, None] & (cols < D)[None, None, :]
        values = tl.load(x_ptr + plane(batch, group, xsb, xsh, LX, AX) + offsets, mask=mask, other=0.0)
        sums += tl.sum(values.to(ACC) * e.to(ACC)[:, None, :], 0)
    at = ((part * groups + group) * D + cols)[None, :] * (K * K) + row * K + taps[:, None]
    tl.store(p_ptr + at, sums, mask=(taps < K)[:, None] & (cols < D)[None, :])
