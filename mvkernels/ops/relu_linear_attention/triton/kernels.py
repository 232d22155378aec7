"""Triton kernels of relu_linear_attention. plan.py says what they are launched with.

A *unit* is one (batch, head). Its pixels are cut into slices, a program each, so that few units fill a machine; a
unit that is one slice is done in one launch, and else each kernel runs twice, STAGE 1 and STAGE 2, with a sum over
the slices, in their order, between. A tile is (pixels, channels), padded by mask to a power of two
(mvkernels/triton/tiles.py).

What is summed over pixels, S, lies as (D + 1, D): row d < D is the sum of relu(k)_d v, row D the sum of relu(k).
Sums, division and every product with S are float32 (float64 for float64): PRODUCT says how matrix instructions
that take less do that. Of half types every product has an operand that was one, which is exact. The other goes in
parts, a product each: "tf32x2", for float16, in two that together hold 21 of its 24 bits; "bf16x3", for bfloat16, in
three that hold all, of which two are enough where the result is rounded at once and nothing is taken from it. With
"bf16x3" sums over pixels and over channels are products as well, with a few columns alike: no map becomes float32.
"""

import triton
import triton.language as tl

from mvkernels.triton.tiles import (
    divider,
    exact,
    load_tile,
    pixel_of,
    plane,
    round_tf32,
    row_offsets,
    store_tile,
)


@triton.jit
def relu(x, PRODUCT: tl.constexpr):
    """max(x, 0), NaN for NaN.

    Of half types NVIDIA has one instruction for two elements, which the compiler does not find ("bf16x3" and "tf32x2"
    are NVIDIA's alone): a comparison and a selection take six.
    """
    if PRODUCT == "bf16x3":
        return _relu_pairs(x, "{ .reg .b32 zero; mov.b32 zero, 0; max.NaN.bf16x2 $0, $1, zero; }")
    elif PRODUCT == "tf32x2" and x.dtype == tl.float16:
        return _relu_pairs(x, "{ .reg .b32 zero; mov.b32 zero, 0; max.NaN.f16x2 $0, $1, zero; }")
    else:
        return tl.where(x <= 0, 0.0, x).to(x.dtype)


@triton.jit
def _relu_pairs(x, INSTRUCTION: tl.constexpr):
    return tl.inline_asm_elementwise(INSTRUCTION, "=r,r", [x], dtype=x.dtype, is_pure=True, pack=2)


@triton.jit
def _cut(x, BITS: tl.constexpr):
    # x without its lowest bits: never past the largest number, as rounding might be.
    return (x.to(tl.int32, bitcast=True) & (-1 << BITS)).to(tl.float32, bitcast=True)


@triton.jit
def _to_bfloat16(x):
    # Two at a time, in the register that they go on in.
    return tl.inline_asm_elementwise("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [x], tl.bfloat16, is_pure=True, pack=2)


@triton.jit
def _parts(x, PRODUCT: tl.constexpr, FINITE: tl.constexpr = False):
    """(high, middle, low) of a float32: what matrix instructions take of it, and of the rest, 0 for an infinity.

    FINITE: of an infinity NaN, which spares two instructions.
    """
    if PRODUCT == "bf16x3":
        high = _cut(x, 16)
        rest = x - high if FINITE else tl.where(tl.abs(high) == float("inf"), 0.0, x - high)
        middle = _cut(rest, 16)
        return _to_bfloat16(high), _to_bfloat16(middle), _to_bfloat16(rest - middle)
    elif PRODUCT == "tf32x2":
        high = _cut(x, 13)
        return high, high, tl.where(tl.abs(high) == float("inf"), 0.0, x - high)
    else:
        high = round_tf32(x, PRODUCT)
        return high, high, high


@triton.jit
def _times(a, high, middle, low, acc, PRODUCT: tl.constexpr, ACC: tl.constexpr, LOW: tl.constexpr = True):
    """acc + a b, for the parts of b, and a of which the dtype of matrix instructions holds all.

    Without LOW of three parts only two, which is 16 bits: for what is rounded to 8 with nothing taken from it.
    """
    if PRODUCT == "bf16x3":
        if LOW:
            acc = tl.dot(a, low, acc)
        acc = tl.dot(a, middle, acc)
        return tl.dot(a, high, acc)
    elif PRODUCT == "tf32x2":
        acc = tl.dot(a.to(ACC), low, acc, input_precision="tf32")
        return tl.dot(a.to(ACC), high, acc, input_precision="tf32")
    else:
        return tl.dot(round_tf32(a.to(ACC), PRODUCT), high, acc, input_precision=PRODUCT, out_dtype=ACC)


@triton.jit
def _times_left(high, middle, low, b, acc, PRODUCT: tl.constexpr, ACC: tl.constexpr):
    """acc + a b, for the parts of a."""
    if PRODUCT == "bf16x3":
        acc = tl.dot(low, b, acc)
        acc = tl.dot(middle, b, acc)
        return tl.dot(high, b, acc)
    elif PRODUCT == "tf32x2":
        acc = tl.dot(low, b.to(ACC), acc, input_precision="tf32")
        return tl.dot(high, b.to(ACC), acc, input_precision="tf32")
    else:
        return tl.dot(high, round_tf32(b.to(ACC), PRODUCT), acc, input_precision=PRODUCT, out_dtype=ACC)


@triton.jit
def _sums_of_rows(q, high, middle, low, keys, PRODUCT: tl.constexpr, ACC: tl.constexpr):
    # q . keys of each pixel, (pixels, 1). Of half types a product with a few columns of the keys' parts, all alike: in
    # the layout that the other products have, and without a float32 of q.
    if PRODUCT == "bf16x3":
        none = tl.zeros([q.shape[0], 8], ACC)
        return tl.sum(_times(q, high, middle, low, none, PRODUCT, ACC), 1)[:, None] * 0.125
    else:
        return tl.sum(q.to(ACC) * keys[None, :], 1)[:, None]


@triton.jit
def _divided(x, divisor, HALF: tl.constexpr):
    # One reciprocal for a pixel: near enough where results are rounded to a half type. Below 3e-39 it is infinite.
    return x * (1.0 / divisor) if HALF else x / divisor


@triton.jit
def _columns(keys, PRODUCT: tl.constexpr):
    """The parts of the keys as :func:`_sums_of_rows` takes them."""
    return _parts(keys[:, None] + tl.zeros([1, 8], keys.dtype), PRODUCT)


@triton.jit
def _parts_side_by_side(x):
    """The parts of a column of float32 as three of 8 columns: of a product with them the columns are added."""
    high = _cut(x, 16)
    middle = _cut(x - high, 16)
    column = tl.arange(0, 8)[None, :]
    rest = tl.where(column == 2, x - high - middle, 0.0)
    return _to_bfloat16(tl.where(column == 0, high, tl.where(column == 1, middle, rest)))


@triton.jit
def _pixels(step, part, steps, pixels, width, BLOCK: tl.constexpr, LINEAR: tl.constexpr, WIDE: tl.constexpr):
    n = (part.to(tl.int32) * steps + step) * BLOCK + tl.arange(0, BLOCK)
    y, x = pixel_of(n, width, 0, 0, 1, 1, LINEAR, WIDE)
    return y, x, n < pixels


@triton.jit
def _load(
    ptr, y, x, keep, sd, sy, sx,
    D: tl.constexpr, WIDTH: tl.constexpr, LAYOUT: tl.constexpr, ALIGN: tl.constexpr, LINEAR: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    rows = row_offsets(y, x, sy, sx, LAYOUT, ALIGN, LINEAR)
    return load_tile(ptr, rows, keep, sd, D, WIDTH, 0, LAYOUT, ALIGN, WIDE)[0]


@triton.jit
def _store(
    ptr, value, y, x, keep, sd, sy, sx,
    D: tl.constexpr, WIDTH: tl.constexpr, LAYOUT: tl.constexpr, ALIGN: tl.constexpr, LINEAR: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    rows = row_offsets(y, x, sy, sx, LAYOUT, ALIGN, LINEAR)
    store_tile(ptr, value, value, rows, keep, sd, D, WIDTH, 0, LAYOUT, ALIGN, WIDE)


@triton.jit
def _load_sums(ptr, D: tl.constexpr, WIDTH: tl.constexpr):
    rows = tl.arange(0, WIDTH)
    inside = (rows < D)[:, None] & (rows < D)[None, :]
    kv = tl.load(ptr + rows[:, None] * D + rows[None, :], mask=inside, other=0.0)
    return kv, tl.load(ptr + D * D + rows, mask=rows < D, other=0.0)


@triton.jit
def _store_sums(ptr, kv, keys, D: tl.constexpr, WIDTH: tl.constexpr):
    rows = tl.arange(0, WIDTH)
    inside = (rows < D)[:, None] & (rows < D)[None, :]
    tl.store(ptr + rows[:, None] * D + rows[None, :], kv, mask=inside)
    tl.store(ptr + D * D + rows, keys, mask=rows < D)


@triton.jit
def _place(pid, heads, slices):
    # (batch, head, slice): the head is fastest, for heads of a pixel are neighbours in a channels-last map.
    head = pid % heads
    rest = pid // heads
    return (rest // slices).to(tl.int64), head.to(tl.int64), (rest % slices).to(tl.int64)


_Q = ["qsb", "qsh", "qsd", "qsy", "qsx"]
_K = ["ksb", "ksh", "ksd", "ksy", "ksx"]
_V = ["vsb", "vsh", "vsd", "vsy", "vsx"]
_OUT = ["osb", "osh", "osd", "osy", "osx"]
_SIZES = ["heads", "H", "W", "slices", "steps", "units"]


# STAGE 1: S of a slice of k and v. STAGE 2: the output of a slice of q from S of the whole unit.
# 0: one after the other.
@triton.jit(do_not_specialize=_Q + _K + _V + _OUT + _SIZES)
def forward_slices(
    q_ptr, k_ptr, v_ptr, o_ptr, s_ptr, eps, eps_low,
    qsb, qsh, qsd, qsy, qsx, ksb, ksh, ksd, ksy, ksx, vsb, vsh, vsd, vsy, vsx, osb, osh, osd, osy, osx,
    heads, H, W, slices, steps, units,
    D: tl.constexpr, WIDTH: tl.constexpr, LQ: tl.constexpr, AQ: tl.constexpr, LK: tl.constexpr, AK: tl.constexpr,
    LV: tl.constexpr, AV: tl.constexpr, LO: tl.constexpr, AO: tl.constexpr, N_ALIGN: tl.constexpr,
    LINEAR: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, PRODUCT: tl.constexpr, STAGE: tl.constexpr,
    BLOCK: tl.constexpr, LOOP: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = tl.float64 if q_ptr.dtype.element_ty == tl.float64 else tl.float32
    # Sums over pixels at the end: in every step they would be shuffled between threads. Of float64 there is no room.
    LATE: tl.constexpr = q_ptr.dtype.element_ty != tl.float64
    HALF: tl.constexpr = q_ptr.dtype.element_ty.primitive_bitwidth == 16
    batch, head, part = _place(tl.program_id(0), heads, slices)
    pixels = tl.multiple_of(H * W, N_ALIGN)
    width = divider(W)
    unit = batch * heads + head
    s_ptr += (part * units + unit if STAGE == 1 else unit) * ((D + 1) * D)
    if STAGE != 2:
        k_ptr += plane(batch, head, ksb, ksh, LK, AK)
        v_ptr += plane(batch, head, vsb, vsh, LV, AV)
        kv = tl.zeros([WIDTH, WIDTH], ACC)
        COUNTED: tl.constexpr = PRODUCT == "bf16x3"
        terms = tl.zeros([WIDTH, 8] if COUNTED else [BLOCK if LATE else 1, WIDTH], ACC)
        for step in range(0, steps if LOOP == 0 else LOOP):
            y, x, keep = _pixels(step, part, steps, pixels, width, BLOCK, LINEAR, WIDE)
            k = relu(_load(k_ptr, y, x, keep, ksd, ksy, ksx, D, WIDTH, LK, AK, LINEAR, WIDE), PRODUCT)
            v = _load(v_ptr, y, x, keep, vsd, vsy, vsx, D, WIDTH, LV, AV, LINEAR, WIDE)
            left = round_tf32(tl.trans(k), PRECISION)
            kv = tl.dot(left, round_tf32(v, PRECISION), kv, input_precision=PRECISION, out_dtype=ACC)
            if COUNTED:
                terms = tl.dot(left, tl.full([BLOCK, 8], 1.0, k.dtype), terms)
            else:
                terms += k.to(ACC) if LATE else tl.sum(k.to(ACC), 0)[None, :]
        keys = tl.sum(terms, 1) * 0.125 if COUNTED else tl.sum(terms, 0)
        _store_sums(s_ptr, kv, keys, D, WIDTH)
    else:
        kv, keys = _load_sums(s_ptr, D, WIDTH)
    if STAGE != 1:
        q_ptr += plane(batch, head, qsb, qsh, LQ, AQ)
        o_ptr += plane(batch, head, osb, osh, LO, AO)
        least = exact(eps, eps_low, ACC)
        high, middle, low = _parts(kv, PRODUCT)
        k_high, k_middle, k_low = _columns(keys, PRODUCT)
        none = tl.zeros([BLOCK, WIDTH], ACC)
        for step in range(0, steps if LOOP == 0 else LOOP):
            y, x, keep = _pixels(step, part, steps, pixels, width, BLOCK, LINEAR, WIDE)
            q = relu(_load(q_ptr, y, x, keep, qsd, qsy, qsx, D, WIDTH, LQ, AQ, LINEAR, WIDE), PRODUCT)
            divisor = _sums_of_rows(q, k_high, k_middle, k_low, keys, PRODUCT, ACC) + least
            out = _divided(_times(q, high, middle, low, none, PRODUCT, ACC, False), divisor, HALF)
            _store(o_ptr, out, y, x, keep, osd, osy, osx, D, WIDTH, LO, AO, LINEAR, WIDE)


_G = ["gsb", "gsh", "gsd", "gsy", "gsx"]
_DQ = ["dqsb", "dqsh", "dqsd", "dqsy", "dqsx"]
_DK = ["dksb", "dksh", "dksd", "dksy", "dksx"]
_DV = ["dvsb", "dvsh", "dvsd", "dvsy", "dvsx"]


# STAGE 1: dq of a slice, and the gradient of S from it. STAGE 2: dk and dv of a slice from that of the whole unit.
# 0: one after the other.
@triton.jit(do_not_specialize=_G + _Q + _K + _V + _DQ + _DK + _DV + _SIZES)
def backward_slices(
    g_ptr, q_ptr, k_ptr, v_ptr, s_ptr, dq_ptr, dk_ptr, dv_ptr, ds_ptr, eps, eps_low,
    gsb, gsh, gsd, gsy, gsx, qsb, qsh, qsd, qsy, qsx, ksb, ksh, ksd, ksy, ksx, vsb, vsh, vsd, vsy, vsx,
    dqsb, dqsh, dqsd, dqsy, dqsx, dksb, dksh, dksd, dksy, dksx, dvsb, dvsh, dvsd, dvsy, dvsx,
    heads, H, W, slices, steps, units,
    D: tl.constexpr, WIDTH: tl.constexpr, LG: tl.constexpr, AG: tl.constexpr, LQ: tl.constexpr, AQ: tl.constexpr,
    LK: tl.constexpr, AK: tl.constexpr, LV: tl.constexpr, AV: tl.constexpr, LDQ: tl.constexpr, ADQ: tl.constexpr,
    LDK: tl.constexpr, ADK: tl.constexpr, LDV: tl.constexpr, ADV: tl.constexpr, N_ALIGN: tl.constexpr,
    LINEAR: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, PRODUCT: tl.constexpr, STAGE: tl.constexpr,
    TURN: tl.constexpr, BLOCK: tl.constexpr, LOOP: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = tl.float64 if q_ptr.dtype.element_ty == tl.float64 else tl.float32
    # Sums over pixels at the end: in every step they would be shuffled between threads. Of float64 there is no room.
    LATE: tl.constexpr = q_ptr.dtype.element_ty != tl.float64
    HALF: tl.constexpr = q_ptr.dtype.element_ty.primitive_bitwidth == 16
    batch, head, part = _place(tl.program_id(0), heads, slices)
    pixels = tl.multiple_of(H * W, N_ALIGN)
    width = divider(W)
    unit = batch * heads + head
    ds_ptr += (part * units + unit if STAGE == 1 else unit) * ((D + 1) * D)
    if STAGE != 2:
        q_ptr += plane(batch, head, qsb, qsh, LQ, AQ)
        g_ptr += plane(batch, head, gsb, gsh, LG, AG)
        dq_ptr += plane(batch, head, dqsb, dqsh, LDQ, ADQ)
        kv, keys = _load_sums(s_ptr + unit * ((D + 1) * D), D, WIDTH)
        high, middle, low = _parts(kv if TURN else tl.trans(kv), PRODUCT)
        k_high, k_middle, k_low = _columns(keys, PRODUCT)
        none = tl.zeros([WIDTH, BLOCK] if TURN else [BLOCK, WIDTH], ACC)
        least = exact(eps, eps_low, ACC)
        dkv = tl.zeros([WIDTH, WIDTH], ACC)
        COUNTED: tl.constexpr = PRODUCT == "bf16x3"
        terms = tl.zeros([WIDTH, 8] if COUNTED else [BLOCK if LATE else 1, WIDTH], ACC)
        if COUNTED:
            # The compiler loads no tile ahead that is an operand on the left both as it lies and turned.
            y, x, keep = _pixels(0, part, steps, pixels, width, BLOCK, LINEAR, WIDE)
            ahead = _load(q_ptr, y, x, keep, qsd, qsy, qsx, D, WIDTH, LQ, AQ, LINEAR, WIDE)
        for step in range(0, steps if LOOP == 0 else LOOP):
            y, x, keep = _pixels(step, part, steps, pixels, width, BLOCK, LINEAR, WIDE)
            if COUNTED:
                q = relu(ahead, PRODUCT)
                y1, x1, keep1 = _pixels(step + 1, part, steps, pixels, width, BLOCK, LINEAR, WIDE)
                keep1 &= step + 1 < steps
                ahead = _load(q_ptr, y1, x1, keep1, qsd, qsy, qsx, D, WIDTH, LQ, AQ, LINEAR, WIDE)
            else:
                q = relu(_load(q_ptr, y, x, keep, qsd, qsy, qsx, D, WIDTH, LQ, AQ, LINEAR, WIDE), PRODUCT)
            g = _load(g_ptr, y, x, keep, gsd, gsy, gsx, D, WIDTH, LG, AG, LINEAR, WIDE)
            # Outside the map 0 / eps is 0, but not where eps is 0.
            divisor = _sums_of_rows(q, k_high, k_middle, k_low, keys, PRODUCT, ACC) + least
            divisor = tl.where(keep[:, None], divisor, 1.0)
            scaled = _divided(g.to(ACC), divisor, HALF)
            operand = g if HALF else scaled  # g of a half type: an exact operand
            if TURN:
                t = tl.trans(_times_left(high, middle, low, tl.trans(operand), none, PRODUCT, ACC))
            else:
                t = _times(operand, high, middle, low, none, PRODUCT, ACC)
            if HALF:
                t = _divided(t, divisor, HALF)
            # g . out / divisor: divided twice, for the square of a small divisor is 0.
            share = _divided(tl.sum(q.to(ACC) * t, 1)[:, None], divisor, HALF)
            dq = tl.where(q <= 0, 0.0, t - share * keys[None, :])
            _store(dq_ptr, dq, y, x, keep, dqsd, dqsy, dqsx, D, WIDTH, LDQ, ADQ, LINEAR, WIDE)
            g_high, g_middle, g_low = _parts(scaled, PRODUCT, True)
            dkv = _times(tl.trans(q), g_high, g_middle, g_low, dkv, PRODUCT, ACC)
            if COUNTED:
                terms = tl.dot(tl.trans(q), _parts_side_by_side(share), terms)
            else:
                terms += q.to(ACC) * share if LATE else tl.sum(q.to(ACC) * share, 0)[None, :]
        dkeys = -tl.sum(terms, 1 if COUNTED else 0)
        if STAGE == 1:
            _store_sums(ds_ptr, dkv, dkeys, D, WIDTH)
    else:
        dkv, dkeys = _load_sums(ds_ptr, D, WIDTH)
    if STAGE != 1:
        k_ptr += plane(batch, head, ksb, ksh, LK, AK)
        v_ptr += plane(batch, head, vsb, vsh, LV, AV)
        dk_ptr += plane(batch, head, dksb, dksh, LDK, ADK)
        dv_ptr += plane(batch, head, dvsb, dvsh, LDV, ADV)
        high, middle, low = _parts(dkv, PRODUCT)
        high_t, middle_t, low_t = _parts(tl.trans(dkv), PRODUCT)
        none = tl.zeros([BLOCK, WIDTH], ACC)
        for step in range(0, steps if LOOP == 0 else LOOP):
            y, x, keep = _pixels(step, part, steps, pixels, width, BLOCK, LINEAR, WIDE)
            k = _load(k_ptr, y, x, keep, ksd, ksy, ksx, D, WIDTH, LK, AK, LINEAR, WIDE)
            v = _load(v_ptr, y, x, keep, vsd, vsy, vsx, D, WIDTH, LV, AV, LINEAR, WIDE)
            dk = _times(v, high_t, middle_t, low_t, none, PRODUCT, ACC) + dkeys[None, :]
            dk = tl.where(k <= 0, 0.0, dk)
            _store(dk_ptr, dk, y, x, keep, dksd, dksy, dksx, D, WIDTH, LDK, ADK, LINEAR, WIDE)
            dv = _times(relu(k, PRODUCT), high, middle, low, none, PRODUCT, ACC, False)
            _store(dv_ptr, dv, y, x, keep, dvsd, dvsy, dvsx, D, WIDTH, LDV, ADV, LINEAR, WIDE)
