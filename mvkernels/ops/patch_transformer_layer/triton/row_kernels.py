"""Triton kernels of the layer that treat every pixel alike: a row of C channels of a dense channels-last map.

C is loaded as two power-of-two pieces, C0 and C1 (C1 may be 0), as patch_attention cuts a head: 144 channels cost 144
lanes. CHUNK is 0 where a block's rows are operands whole: on matrix units. Exact float32 products hold their operands
in registers, so there the channels go by in chunks, read again (from the cache) and normalised again each time.
Offsets inside a block are 32-bit, its first row's is 64-bit. ALIGN and FALIGN divide C and F, at most 16 bytes of them.
"""

import triton
import triton.language as tl

from mvkernels.triton.tiles import dot_nt, load_tile, round_tf32, round_tile, store_tile


@triton.jit
def sigmoid(x, PTX: tl.constexpr):
    """1 / (1 + exp(-x)), float32. With PTX by NVIDIA's approximate instructions alone.

    They are as exact as what the compiler makes of the formula: that takes three times as many instructions, for
    denormal numbers, which nothing here can tell from 0. And each of them waits for the one before.
    """
    if PTX:
        return tl.inline_asm_elementwise(
            "mul.f32 $0, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 $0, $0; add.f32 $0, $0, 0f3F800000;"
            "rcp.approx.ftz.f32 $0, $0;",
            "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def load_vector(ptr, C: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr):
    """Both pieces of a (C,) vector, float32, zeros past C."""
    cols = tl.arange(0, C0)
    first = tl.load(ptr + cols, mask=cols < C, other=0.0).to(tl.float32)
    second = first
    if C1 > 0:
        cols = C0 + tl.arange(0, C1)
        second = tl.load(ptr + cols, mask=cols < C, other=0.0).to(tl.float32)
    return first, second


@triton.jit
def store_sums(ptr, first, second, C: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr):
    """Write the column sums of a (rows, C) tile."""
    cols = tl.arange(0, C0)
    tl.store(ptr + cols, tl.sum(first, 0), mask=cols < C)
    if C1 > 0:
        cols = C0 + tl.arange(0, C1)
        tl.store(ptr + cols, tl.sum(second, 0), mask=cols < C)


@triton.jit
def _channels(x, START: tl.constexpr, C: tl.constexpr):
    # A piece with zeros past C.
    if START + x.shape[1] > C:
        x = tl.where((START + tl.arange(0, x.shape[1]) < C)[None, :], x, 0.0)
    return x


@triton.jit
def centred_rows(x_ptr, x0, x1, at, keep, eps, C: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr):
    """Rows of a tile less their mean, float32, zeros past C; (first channel, mean less that, 1 / standard deviation).

    The first channel is subtracted before the mean is taken, as in mvkernels/ops/common/norms.py: of nearly equal
    channels the mean is rounded by more than they differ. The tile's channels are across threads, and so it is read.
    """
    first = tl.load(x_ptr + at, mask=keep, other=0.0).to(tl.float32)
    x0 = _channels(x0.to(tl.float32) - first[:, None], 0, C)
    total = tl.sum(x0, 1)
    if C1 > 0:
        x1 = _channels(x1.to(tl.float32) - first[:, None], C0, C)
        total += tl.sum(x1, 1)
    mean = total / C
    x0 = _channels(x0 - mean[:, None], 0, C)
    square = tl.sum(x0 * x0, 1)
    if C1 > 0:
        x1 = _channels(x1 - mean[:, None], C0, C)
        square += tl.sum(x1 * x1, 1)
    return x0, x1, first, mean, 1.0 / tl.sqrt_rn(square / C + eps)


@triton.jit
def normed_rows(
    x_ptr, gamma_ptr, beta_ptr, at, keep, eps,
    C: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Both pieces of the normalised rows as operands of x's dtype; (first channel, mean less that, 1 / deviation)."""
    x0, x1 = load_tile(x_ptr, at, keep, 1, C, C0, C1, 1, ALIGN, False)
    x0, x1, first, mean, over = centred_rows(x_ptr, x0, x1, at, keep, eps, C, C0, C1)
    g0, g1 = load_vector(gamma_ptr, C, C0, C1)
    b0, b1 = load_vector(beta_ptr, C, C0, C1)
    n0 = (x0 * over[:, None] * g0[None, :] + b0[None, :]).to(x_ptr.dtype.element_ty)
    n1 = n0
    if C1 > 0:
        n1 = (x1 * over[:, None] * g1[None, :] + b1[None, :]).to(x_ptr.dtype.element_ty)
    n0, n1 = round_tile(n0, n1, C1, PRECISION)
    return n0, n1, first, mean, over


@triton.jit
def product(
    a0, a1, a_ptr, at, keep, lead, mean, over, gamma_ptr, beta_ptr, w_ptr, n, keep_n,
    C: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr, WIDTH: tl.constexpr, ALIGN: tl.constexpr,
    NORM: tl.constexpr, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """(rows, C) times the weights of outputs n, float32: weights (outputs, C), or with TRANSPOSED (C, outputs).

    WIDTH is the length of a row of the weights. The rows are the pieces a0, a1, or with CHUNK what lies at a_ptr,
    with NORM normalised on the way.
    """
    if CHUNK > 0:
        out = tl.zeros([keep.shape[0], keep_n.shape[0]], tl.float32)
        for start in range(0, C, CHUNK):
            k = start + tl.arange(0, CHUNK)
            keep_k = k < C
            a = tl.load(a_ptr + at[:, None] + k[None, :], mask=keep[:, None] & keep_k[None, :], other=0.0)
            if NORM:
                gamma = tl.load(gamma_ptr + k, mask=keep_k, other=0.0).to(tl.float32)
                beta = tl.load(beta_ptr + k, mask=keep_k, other=0.0).to(tl.float32)
                a = (a.to(tl.float32) - lead[:, None] - mean[:, None]) * over[:, None] * gamma[None, :] + beta[None, :]
                a = a.to(a_ptr.dtype.element_ty)
            a = round_tf32(a, PRECISION)
            inside = keep_k[:, None] & keep_n[None, :]
            if TRANSPOSED:
                w = tl.load(w_ptr + (k * WIDTH)[:, None] + n[None, :], mask=inside, other=0.0)
            else:
                w = tl.load(w_ptr + k[:, None] + (n * WIDTH)[None, :], mask=inside, other=0.0)
            out = tl.dot(a, round_tf32(w, PRECISION), out, input_precision=PRECISION)
    elif TRANSPOSED:
        w0, w1 = weight_columns(w_ptr, n, keep_n, C, C0, C1, WIDTH, PRECISION)
        out = tl.dot(a0, w0, input_precision=PRECISION)
        if C1 > 0:
            out = tl.dot(a1, w1, out, input_precision=PRECISION)
    else:
        rows = tl.multiple_of(n * WIDTH, ALIGN)
        w0, w1 = load_tile(w_ptr, rows, keep_n, 1, C, C0, C1, 1, ALIGN, False, PRECISION)
        out = dot_nt(a0, a1, w0, w1, C1, PRECISION)
    return out


@triton.jit
def weight_columns(
    w_ptr, n, keep_n,
    C: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Both pieces (along C) of columns n of weights (C, WIDTH), as operands: (C0, n) and (C1, n), zeros outside."""
    rows = tl.arange(0, C0)
    w0 = tl.load(w_ptr + (rows * WIDTH)[:, None] + n[None, :], mask=(rows < C)[:, None] & keep_n[None, :], other=0.0)
    w1 = w0
    if C1 > 0:
        rows = C0 + tl.arange(0, C1)
        w1 = tl.load(
            w_ptr + (rows * WIDTH)[:, None] + n[None, :], mask=(rows < C)[:, None] & keep_n[None, :], other=0.0
        )
    return round_tile(w0, w1, C1, PRECISION)


# A block of rows stays, as the operand that it is, while STEPS blocks of outputs pass by; several programs share the
# outputs where rows are few. With NORM rows are normalised first; with RESIDUAL a map of N channels is added.
@triton.jit(do_not_specialize=["rows"])
def linear_rows(
    x_ptr, gamma_ptr, beta_ptr, w_ptr, bias_ptr, residual_ptr, out_ptr, eps, rows,
    C: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr, N: tl.constexpr, ALIGN: tl.constexpr,
    NORM: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, PRECISION: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STEPS: tl.constexpr, PROGRAMS_PER_BLOCK,
):  # fmt: skip
    WHOLE: tl.constexpr = "ieee" if CHUNK > 0 else PRECISION  # of rows that are not operands nothing is rounded
    pid = tl.program_id(0)
    block = pid // PROGRAMS_PER_BLOCK
    part = pid - block * PROGRAMS_PER_BLOCK
    first = block.to(tl.int64) * BLOCK_M
    m = tl.arange(0, BLOCK_M)
    keep = first + m < rows
    at = tl.multiple_of(m * C, ALIGN)
    x_ptr += first * C
    residual_ptr += first * N
    out_ptr += first * N
    if NORM:
        a0, a1, lead, mean, over = normed_rows(x_ptr, gamma_ptr, beta_ptr, at, keep, eps, C, C0, C1, ALIGN, WHOLE)
    else:
        lead = tl.zeros([BLOCK_M], tl.float32)
        mean = lead
        over = lead
        a0, a1 = load_tile(x_ptr, at, keep, 1, C, C0, C1, 1, ALIGN, False, WHOLE)
    for step in range(STEPS):
        n = (part * STEPS + step) * BLOCK_N + tl.arange(0, BLOCK_N)
        keep_n = n < N
        out = product(
            a0, a1, x_ptr, at, keep, lead, mean, over, gamma_ptr, beta_ptr, w_ptr, n, keep_n,
            C, C0, C1, C, ALIGN, NORM, False, PRECISION, CHUNK,
        )  # fmt: skip
        if BIAS:
            out += tl.load(bias_ptr + n, mask=keep_n, other=0.0).to(tl.float32)[None, :]
        inside = keep[:, None] & keep_n[None, :]
        to = tl.multiple_of(m * N, ALIGN)[:, None] + n[None, :]
        if RESIDUAL:
            out += tl.load(residual_ptr + to, mask=inside, other=0.0).to(tl.float32)
        tl.store(out_ptr + to, out.to(out_ptr.dtype.element_ty), mask=inside)


# The second half of the layer on a block of rows: BLOCK_F hidden channels at a time are made, used and forgotten, and
# the sum over them stays in registers. The map is read twice (the second time from the cache) and written once.
@triton.jit(do_not_specialize=["rows"])
def norm_ffn(
    x_ptr, gamma_ptr, beta_ptr, w1_ptr, b1_ptr, w2_ptr, b2_ptr, out_ptr, eps, rows,
    C: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr, F: tl.constexpr, ALIGN: tl.constexpr,
    PRECISION: tl.constexpr, PTX: tl.constexpr, CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    WHOLE: tl.constexpr = "ieee" if CHUNK > 0 else PRECISION
    first = tl.program_id(0).to(tl.int64) * BLOCK_M
    m = tl.arange(0, BLOCK_M)
    keep = first + m < rows
    at = tl.multiple_of(m * C, ALIGN)
    x_ptr += first * C
    n0, n1, lead, mean, over = normed_rows(x_ptr, gamma_ptr, beta_ptr, at, keep, eps, C, C0, C1, ALIGN, WHOLE)
    out0 = tl.zeros([BLOCK_M, C0], tl.float32)
    out1 = tl.zeros([BLOCK_M, C1 if C1 > 0 else 1], tl.float32)
    for start in range(0, F, BLOCK_F):
        f = start + tl.arange(0, BLOCK_F)
        keep_f = f < F
        a = product(
            n0, n1, x_ptr, at, keep, lead, mean, over, gamma_ptr, beta_ptr, w1_ptr, f, keep_f,
            C, C0, C1, C, ALIGN, True, False, PRECISION, CHUNK,
        )  # fmt: skip
        a += tl.load(b1_ptr + f, mask=keep_f, other=0.0).to(tl.float32)[None, :]
        h = round_tf32((a * sigmoid(a, PTX)).to(x_ptr.dtype.element_ty), PRECISION)
        w0, w1 = weight_columns(w2_ptr, f, keep_f, C, C0, C1, F, PRECISION)
        out0 = tl.dot(h, tl.trans(w0), out0, input_precision=PRECISION)
        if C1 > 0:
            out1 = tl.dot(h, tl.trans(w1), out1, input_precision=PRECISION)
    b0, b1 = load_vector(b2_ptr, C, C0, C1)
    x0, x1 = load_tile(x_ptr, at, keep, 1, C, C0, C1, 1, ALIGN, False)
    out0 = out0 + b0[None, :] + x0.to(tl.float32)  # last: a residual may be far larger
    if C1 > 0:
        out1 = out1 + b1[None, :] + x1.to(tl.float32)
    store_tile(out_ptr + first * C, out0, out1, at, keep, 1, C, C0, C1, 1, ALIGN, False)
