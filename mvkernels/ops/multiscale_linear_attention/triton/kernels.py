"""Triton kernels of multiscale_linear_attention's convolutions. plan.py says what they are launched with.

A *unit* is one (batch, group): the D channels that a pointwise convolution mixes, q, k or v of one head. A tile is
(pixels, channels), padded by mask to a power of two. The depthwise convolution sums its taps in the order of
memory, (pixels, channels) or (channels, pixels), and is turned once, for the product.
"""

import triton
import triton.language as tl

from mvkernels.triton.tiles import (
    _piece,
    divider,
    load_tile,
    pixel_of,
    plane,
    round_tf32,
    row_offsets,
    store_tile,
)


@triton.jit
def _tile(ptr, y, x, keep, sd, sy, sx, D: tl.constexpr, WIDTH: tl.constexpr, LAYOUT: tl.constexpr,
          ALIGN: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    return load_tile(ptr, row_offsets(y, x, sy, sx, LAYOUT, ALIGN, False), keep, sd, D, WIDTH, 0, LAYOUT, ALIGN, WIDE)[
        0
    ]


@triton.jit
def _inside(y, x, keep, H, W):
    return keep & (y >= 0) & (y < H) & (x >= 0) & (x < W)


# The depthwise convolution of a unit at a tile of pixels; weights (K * K, channels of all groups) from w_ptr, in
# ACC, so that a thread loads those of its channels at once, as it does their values. SIGN -1: its transpose.
@triton.jit
def _depthwise(
    x_ptr, w_ptr, y, x, keep, H, W, sd, sy, sx, channels,
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
    for row in range(0, K):
        dy = SIGN * (row - K // 2)
        in_map = (y + dy >= 0) & (y + dy < H)
        for col in tl.static_range(K):
            dx = SIGN * (col - K // 2)
            there = in_map & (x + dx >= 0) & (x + dx < W)
            mask = inside & (there[:, None] if LAYOUT == 1 else there[None, :])
            shift = dy * sy + dx * sx
            if LAYOUT == 1:
                offsets = tl.multiple_of(rows + shift, ALIGN)[:, None] + cols[None, :]
                value = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(ACC)
            else:
                value = tl.load(x_ptr + shift + offsets, mask=mask, other=0.0).to(ACC)
            weight = tl.load(w_ptr + (row * K + col) * channels + cols, mask=cols < D, other=0.0)
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
    y, x = pixel_of(n, divider(W), 0, 0, 1, 1, False, WIDE)
    first = group * D
    x_ptr += plane(batch, group, xsb, xsh, LX, AX)
    o_ptr += plane(batch, group, osb, osh, LO, AO)
    each = _depthwise(
        x_ptr, w_ptr + first, y, x, keep, H, W, xsd, xsy, xsx, groups * D,
        D, WIDTH, K, 1, LX, AX, WIDE, BLOCK, ACC,
    )  # fmt: skip
    each = (each + _bias(wb_ptr + first, WB, D, WIDTH, ACC)[None, :]).to(x_ptr.dtype.element_ty)
    rows = tl.arange(0, WIDTH)
    inside = (rows < D)[:, None] & (rows < D)[None, :]
    mix = tl.load(m_ptr + first * D + rows[None, :] * D + rows[:, None], mask=inside, other=0.0)  # (in, out)
    each = round_tf32(each, PRECISION)
    out = tl.dot(each, round_tf32(mix, PRECISION), input_precision=PRECISION, out_dtype=ACC)
    out += _bias(mb_ptr + first, MB, D, WIDTH, ACC)[None, :]
    store_tile(o_ptr, out, out, row_offsets(y, x, osy, osx, LO, AO, False), keep, osd, D, WIDTH, 0, LO, AO, WIDE)


_G = ["gsb", "gsh", "gsd", "gsy", "gsx"]
_E = ["esb", "esh", "esd", "esy", "esx"]


# One program: at one tile of a unit the gradient of what the depthwise convolution made, in place of that of the scale.
@triton.jit(do_not_specialize=_E + _SIZES)
def pointwise_backward(
    e_ptr, m_ptr,
    esb, esh, esd, esy, esx, groups, H, W, tiles, slices, steps,
    D: tl.constexpr, WIDTH: tl.constexpr, K: tl.constexpr, WB: tl.constexpr, MB: tl.constexpr,
    LE: tl.constexpr, AE: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = tl.float64 if e_ptr.dtype.element_ty == tl.float64 else tl.float32
    pid = tl.program_id(0)
    group = (pid % groups).to(tl.int64)
    rest = pid // groups
    batch = (rest // tiles).to(tl.int64)
    n = (rest % tiles).to(tl.int32) * BLOCK + tl.arange(0, BLOCK)
    keep = n < H * W
    y, x = pixel_of(n, divider(W), 0, 0, 1, 1, False, WIDE)
    e_ptr += plane(batch, group, esb, esh, LE, AE)
    at = row_offsets(y, x, esy, esx, LE, AE, False)
    rows = tl.arange(0, WIDTH)
    inside = (rows < D)[:, None] & (rows < D)[None, :]
    mix = tl.load(m_ptr + group * D * D + rows[:, None] * D + rows[None, :], mask=inside, other=0.0)  # (out, in)
    g = load_tile(e_ptr, at, keep, esd, D, WIDTH, 0, LE, AE, WIDE, PRECISION)[0]
    e = tl.dot(g, round_tf32(mix, PRECISION), input_precision=PRECISION, out_dtype=ACC)
    store_tile(e_ptr, e, e, at, keep, esd, D, WIDTH, 0, LE, AE, WIDE)


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
    y, x = pixel_of(n, divider(W), 0, 0, 1, 1, False, WIDE)
    e_ptr += plane(batch, group, esb, esh, LE, AE)
    o_ptr += plane(batch, group, osb, osh, LO, AO)
    total = _depthwise(
        e_ptr, w_ptr + group * D, y, x, keep, H, W, esd, esy, esx, groups * D,
        D, WIDTH, K, -1, LE, AE, WIDE, BLOCK, ACC,
    )  # fmt: skip
    total += _tile(o_ptr, y, x, keep, osd, osy, osx, D, WIDTH, LO, AO, WIDE).to(ACC)
    store_tile(o_ptr, total, total, row_offsets(y, x, osy, osx, LO, AO, False), keep, osd, D, WIDTH, 0, LO, AO, WIDE)


# The gradients of both convolutions' weights are sums of the same products: with S[tap, c, o] the sum over pixels of
# x[pixel + tap, c] * g[pixel, o], that of the depthwise weight is the sum of S over o, times the pointwise weight, and
# that of the pointwise weight the sum of S over taps, times the depthwise weight. So x is read for both at once, by a
# matrix product, and nothing between the convolutions is made again.
#
# One program: a slice of the tiles and a slice of the batch of one group, and TAPS of the K * K taps, side by side in
# TAPS * WIDTH lanes. Images follow each other in the inner loop, so that where a tile's pixels and their neighbours
# lie, and whether these are inside, is found once for all of them. What it adds to S goes to (slice, group, K * K * D,
# D); with a bias there is one row more, for bias_sums. The sums stay in registers.
#
# Beyond the border x is 0 in these products. That times an infinity or NaN in g is NaN, where S has no such term. So
# if S is not finite it is summed again tap by tap, with 0 for the pixels of g from which the tap reaches nothing.
@triton.jit
def _products(
    g_ptr, x_ptr,
    gsb, gsh, gsd, gsy, gsx, xsb, xsh, xsd, xsy, xsx, group, H, W, begin, steps, first, batches, images, chunk, only,
    D: tl.constexpr, WIDTH: tl.constexpr, K: tl.constexpr,
    LG: tl.constexpr, AG: tl.constexpr, LX: tl.constexpr, AX: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, TAPS: tl.constexpr, BLOCK: tl.constexpr, LOOP: tl.constexpr, IMAGES: tl.constexpr,
    ALL: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """S of a chunk of taps; unless ALL are wanted, only that of the tap ``only`` is right."""
    lanes = tl.arange(0, TAPS * WIDTH)
    tap = chunk * TAPS + lanes // WIDTH
    channel = lanes % WIDTH
    used = (tap < K * K) & (channel < D)
    dy = tap // K - K // 2
    dx = tap % K - K // 2
    if WIDE:
        beside = dy * xsy.to(tl.int64) + dx * xsx.to(tl.int64)
        along = channel * xsd.to(tl.int64)
    else:
        beside = dy * xsy + dx * xsx
        along = channel * xsd
    if LX == 1:
        along = tl.multiple_of(beside, AX) + channel
    else:
        along += beside
    width = divider(W)
    sums = tl.zeros([TAPS * WIDTH, WIDTH], ACC)
    for step in range(0, steps if LOOP == 0 else LOOP):
        n = (begin + step) * BLOCK + tl.arange(0, BLOCK)
        keep = n < H * W
        y, x = pixel_of(n, width, 0, 0, 1, 1, False, WIDE)
        there = _reached(y, x, tap, used, keep, H, W, K)
        offsets = row_offsets(y, x, xsy, xsx, LX, AX, False)[:, None] + along[None, :]
        for image in range(0, tl.minimum(images, batches - first) if IMAGES == 0 else IMAGES):
            batch = first + image
            if IMAGES > 0:  # the interpreter's loops have as many steps in the last slice
                keep = keep & (batch < batches)
                there = there & (batch < batches)
            g_at = g_ptr + plane(tl.cast(batch, tl.int64), group, gsb, gsh, LG, AG)
            x_at = x_ptr + plane(tl.cast(batch, tl.int64), group, xsb, xsh, LX, AX)
            g = _tile(g_at, y, x, keep, gsd, gsy, gsx, D, WIDTH, LG, AG, WIDE)
            if not ALL:
                one = only + tl.zeros([1], tl.int32)
                g = tl.where(_reached(y, x, one, one < K * K, keep, H, W, K), g, 0.0).to(g.dtype)
            values = tl.load(x_at + offsets, mask=there, other=0.0)
            left = round_tf32(tl.trans(values), PRECISION)
            sums = tl.dot(left, round_tf32(g, PRECISION), sums, input_precision=PRECISION, out_dtype=ACC)
    return sums


@triton.jit
def _reached(y, x, tap, used, keep, H, W, K: tl.constexpr):
    # (pixels, taps): whether a tap reaches a pixel of the map from here.
    ty = y[:, None] + (tap // K - K // 2)[None, :]
    tx = x[:, None] + (tap % K - K // 2)[None, :]
    return keep[:, None] & used[None, :] & (ty >= 0) & (ty < H) & (tx >= 0) & (tx < W)


@triton.jit(do_not_specialize=_G + _X + _SIZES + ["batches", "images", "parts"])
def weight_sums(
    g_ptr, x_ptr, s_ptr,
    gsb, gsh, gsd, gsy, gsx, xsb, xsh, xsd, xsy, xsx, groups, H, W, tiles, slices, steps, batches, images, parts,
    D: tl.constexpr, WIDTH: tl.constexpr, K: tl.constexpr, WB: tl.constexpr, MB: tl.constexpr,
    LG: tl.constexpr, AG: tl.constexpr, LX: tl.constexpr, AX: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, TAPS: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr,
    LOOP: tl.constexpr, IMAGES: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    pid = tl.program_id(0)
    group = (pid % groups).to(tl.int64)
    rest = pid // groups
    chunk = rest % CHUNKS
    part = rest // CHUNKS
    begin = part % parts * steps
    first = part // parts * images
    sums = _products(
        g_ptr, x_ptr, gsb, gsh, gsd, gsy, gsx, xsb, xsh, xsd, xsy, xsx, group, H, W, begin, steps, first, batches,
        images, chunk, 0, D, WIDTH, K, LG, AG, LX, AX, WIDE, PRECISION, TAPS, BLOCK, LOOP, IMAGES, True, ACC,
    )  # fmt: skip
    lanes = tl.arange(0, TAPS * WIDTH)
    tap = chunk * TAPS + lanes // WIDTH
    channel = lanes % WIDTH
    cols = tl.arange(0, WIDTH)
    s_ptr += (part.to(tl.int64) * groups + group) * ((K * K * D + (1 if WB or MB else 0)) * D)
    at = (tap * D + channel)[:, None] * D + cols[None, :]
    used = ((tap < K * K) & (channel < D))[:, None] & (cols < D)[None, :]
    tl.store(s_ptr + at, sums, mask=used)
    if tl.sum(tl.sum(sums * 0.0, 1), 0) != 0.0:
        for only in range(chunk * TAPS, tl.minimum(chunk * TAPS + TAPS, K * K)):
            of_tap = _products(
                g_ptr, x_ptr, gsb, gsh, gsd, gsy, gsx, xsb, xsh, xsd, xsy, xsx, group, H, W, begin, steps, first,
                batches, images, chunk, only, D, WIDTH, K, LG, AG, LX, AX, WIDE, PRECISION, TAPS, BLOCK, LOOP, IMAGES,
                False, ACC,
            )  # fmt: skip
            tl.store(s_ptr + at, of_tap, mask=used & (tap == only)[:, None])


# One program, one group: the sum of g over a slice of the tiles and of the batch, in the row of S that is for it.
# weight_sums reads the same g, but Triton has one buffer for a tile that is multiplied and also summed, and overwrites
# what a product still reads (triton-lang/triton#6691).
@triton.jit(do_not_specialize=_G + _SIZES + ["batches", "images", "parts"])
def bias_sums(
    g_ptr, s_ptr, gsb, gsh, gsd, gsy, gsx, groups, H, W, tiles, slices, steps, batches, images, parts,
    D: tl.constexpr, WIDTH: tl.constexpr, K: tl.constexpr, WB: tl.constexpr, MB: tl.constexpr,
    LG: tl.constexpr, AG: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr,
    LOOP: tl.constexpr, IMAGES: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = s_ptr.dtype.element_ty
    pid = tl.program_id(0)
    group = (pid % groups).to(tl.int64)
    part = pid // groups
    begin = part % parts * steps
    first = part // parts * images
    width = divider(W)
    total = tl.zeros([BLOCK, WIDTH], ACC)
    for step in range(0, steps if LOOP == 0 else LOOP):
        n = (begin + step) * BLOCK + tl.arange(0, BLOCK)
        keep = n < H * W
        y, x = pixel_of(n, width, 0, 0, 1, 1, False, WIDE)
        for image in range(0, tl.minimum(images, batches - first) if IMAGES == 0 else IMAGES):
            batch = first + image
            if IMAGES > 0:
                keep = keep & (batch < batches)
            g_at = g_ptr + plane(tl.cast(batch, tl.int64), group, gsb, gsh, LG, AG)
            total += _tile(g_at, y, x, keep, gsd, gsy, gsx, D, WIDTH, LG, AG, WIDE).to(ACC)
    cols = tl.arange(0, WIDTH)
    s_ptr += (part.to(tl.int64) * groups + group) * ((K * K * D + 1) * D) + K * K * D * D
    tl.store(s_ptr + cols, tl.sum(total, 0), mask=cols < D)


# One program, one group and one tap: its column of the depthwise weight's gradient; or, after the last tap, all else.
@triton.jit
def weight_gradients(
    s_ptr, w_ptr, m_ptr, wb_ptr, dw_ptr, dm_ptr, dwb_ptr, dmb_ptr, groups,
    D: tl.constexpr, WIDTH: tl.constexpr, K: tl.constexpr, WB: tl.constexpr, MB: tl.constexpr, LOOP: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = s_ptr.dtype.element_ty
    pid = tl.program_id(0)
    group = pid // (K * K + 1)
    tap = pid % (K * K + 1)
    rows = tl.arange(0, WIDTH)
    inside = (rows < D)[:, None] & (rows < D)[None, :]  # (in, out)
    first = group * D
    s_ptr += group.to(tl.int64) * ((K * K * D + (1 if WB or MB else 0)) * D)
    tile = rows[:, None] * D + rows[None, :]
    turned = first.to(tl.int64) * D + rows[None, :] * D + rows[:, None]
    if tap < K * K:
        mix = tl.load(m_ptr + turned, mask=inside, other=0.0).to(ACC)
        sums = tl.load(s_ptr + tap * (D * D) + tile, mask=inside, other=0.0)
        found = tl.sum(sums * mix, 1)
        at = (first + rows).to(tl.int64) * (K * K) + tap
        tl.store(dw_ptr + at, found.to(dw_ptr.dtype.element_ty), mask=rows < D)
    else:
        dmix = tl.zeros([WIDTH, WIDTH], ACC)
        for each in range(0, K * K if LOOP == 0 else LOOP):
            weight = tl.load(w_ptr + each * (groups * D) + first + rows, mask=rows < D, other=0.0)
            dmix += tl.load(s_ptr + each * (D * D) + tile, mask=inside, other=0.0) * weight[:, None]
        if WB or MB:
            total = tl.load(s_ptr + K * K * D * D + rows, mask=rows < D, other=0.0)
            if MB:
                tl.store(dmb_ptr + first + rows, total.to(dmb_ptr.dtype.element_ty), mask=rows < D)
            if WB:
                mix = tl.load(m_ptr + turned, mask=inside, other=0.0).to(ACC)
                found = tl.sum(mix * total[None, :], 1)
                tl.store(dwb_ptr + first + rows, found.to(dwb_ptr.dtype.element_ty), mask=rows < D)
                bias = tl.load(wb_ptr + first + rows, mask=rows < D, other=0.0).to(ACC)
                dmix += bias[:, None] * total[None, :]
        tl.store(dm_ptr + turned, dmix.to(dm_ptr.dtype.element_ty), mask=inside)
