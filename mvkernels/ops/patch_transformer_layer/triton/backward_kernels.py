"""Backward Triton kernels of the layer: what autograd would keep is made again from the map, block by block.

What the weights' gradients need (the normalised rows, the hidden rows and their gradient) is written once and
multiplied by PyTorch's own products. After its C channels a normalised row has a 1 and zeros, ONES numbers in all: so
the same product sums the gradient of the bias. Other sums over all rows (gradients of the norms, and of the biases that
are added to the map) are taken in two stages: each program writes its own, and they are added afterwards.
"""

import triton
import triton.language as tl

from mvkernels.ops.patch_transformer_layer.triton.row_kernels import (
    centred_rows,
    load_vector,
    normed_rows,
    product,
    sigmoid,
    store_sums,
)
from mvkernels.triton.tiles import load_tile, store_tile


# Of y = norm(x): dx = residual + the gradient through the norm, and the normalised rows. A program goes over its
# BLOCK_M rows ROWS at a time; its sums stay in registers: C each for gamma and beta, and with OUTER of the residual and
# of dx. Each map is read or written once.
@triton.jit(do_not_specialize=["rows"])
def norm_backward(
    d_ptr, x_ptr, residual_ptr, gamma_ptr, beta_ptr, normed_ptr, dx_ptr, sums_ptr, eps, rows,
    C: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    ONES: tl.constexpr, OUTER: tl.constexpr, BLOCK_M: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    ONE: tl.constexpr = C1 if C1 > 0 else 1
    pid = tl.program_id(0).to(tl.int64)
    first = pid * BLOCK_M
    left = rows - first
    d_ptr += first * C
    x_ptr += first * C
    residual_ptr += first * C
    normed_ptr += first * (C + ONES)
    dx_ptr += first * C
    sums_ptr += pid * ((4 if OUTER else 2) * C)
    g0, g1 = load_vector(gamma_ptr, C, C0, C1)
    b0, b1 = load_vector(beta_ptr, C, C0, C1)
    gammas0 = tl.zeros([ROWS, C0], tl.float32)
    gammas1 = tl.zeros([ROWS, ONE], tl.float32)
    betas0 = tl.zeros([ROWS, C0], tl.float32)
    betas1 = tl.zeros([ROWS, ONE], tl.float32)
    residuals0 = tl.zeros([ROWS, C0], tl.float32)
    residuals1 = tl.zeros([ROWS, ONE], tl.float32)
    outs0 = tl.zeros([ROWS, C0], tl.float32)
    outs1 = tl.zeros([ROWS, ONE], tl.float32)
    for start in range(0, BLOCK_M, ROWS):
        m = start + tl.arange(0, ROWS)
        keep = m < left
        at = tl.multiple_of(m * C, ALIGN)
        x0, x1 = load_tile(x_ptr, at, keep, 1, C, C0, C1, 1, ALIGN, False)
        d0, d1 = load_tile(d_ptr, at, keep, 1, C, C0, C1, 1, ALIGN, False)
        r0, r1 = load_tile(residual_ptr, at, keep, 1, C, C0, C1, 1, ALIGN, False)
        x0, x1, _, _, over = centred_rows(x_ptr, x0, x1, at, keep, eps, C, C0, C1)
        d0 = d0.to(tl.float32)
        d1 = d1.to(tl.float32)
        r0 = r0.to(tl.float32)
        r1 = r1.to(tl.float32)
        # Rows outside are 0 by selection: eps may be 0, and then their deviation is.
        x0 = tl.where(keep[:, None], x0 * over[:, None], 0.0)
        gammas0 += d0 * x0
        betas0 += d0
        n0 = x0 * g0[None, :] + b0[None, :]
        n1 = n0
        d0 = d0 * g0[None, :]
        along = tl.sum(d0 * x0, 1)
        total = tl.sum(d0, 1)
        if C1 > 0:
            x1 = tl.where(keep[:, None], x1 * over[:, None], 0.0)
            gammas1 += d1 * x1
            betas1 += d1
            n1 = x1 * g1[None, :] + b1[None, :]
            d1 = d1 * g1[None, :]
            along += tl.sum(d1 * x1, 1)
            total += tl.sum(d1, 1)
        to = tl.multiple_of(m * (C + ONES), ALIGN)
        store_tile(normed_ptr, n0, n1, to, keep, 1, C, C0, C1, 1, ALIGN, False)
        last = tl.arange(0, 16)
        one = tl.where(last[None, :] == 0, tl.full([ROWS, 16], 1.0, tl.float32), 0.0).to(normed_ptr.dtype.element_ty)
        tl.store(normed_ptr + C + to[:, None] + last[None, :], one, mask=keep[:, None] & (last < ONES)[None, :])
        along = along / C
        total = total / C
        d0 = tl.where(keep[:, None], (d0 - total[:, None] - x0 * along[:, None]) * over[:, None], 0.0) + r0
        if C1 > 0:
            d1 = tl.where(keep[:, None], (d1 - total[:, None] - x1 * along[:, None]) * over[:, None], 0.0) + r1
        store_tile(dx_ptr, d0, d1, at, keep, 1, C, C0, C1, 1, ALIGN, False)
        if OUTER:
            residuals0 += r0
            outs0 += tl.where((tl.arange(0, C0) < C)[None, :], d0, 0.0)
            if C1 > 0:
                residuals1 += r1
                outs1 += d1
    store_sums(sums_ptr, gammas0, gammas1, C, C0, C1)
    store_sums(sums_ptr + C, betas0, betas1, C, C0, C1)
    if OUTER:
        store_sums(sums_ptr + 2 * C, residuals0, residuals1, C, C0, C1)
        store_sums(sums_ptr + 3 * C, outs0, outs1, C, C0, C1)


# Of y = x + silu(norm(x) W1^T + b1) W2^T + b2, for a block of rows: the hidden rows and the gradient before the
# activation, BLOCK_F channels at a time.
@triton.jit(do_not_specialize=["rows"])
def ffn_backward(
    g_ptr, x_ptr, gamma_ptr, beta_ptr, w1_ptr, b1_ptr, w2_ptr, hidden_ptr, dhidden_ptr, eps, rows,
    C: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr, F: tl.constexpr, ALIGN: tl.constexpr, FALIGN: tl.constexpr,
    PRECISION: tl.constexpr, PTX: tl.constexpr, CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    WHOLE: tl.constexpr = "ieee" if CHUNK > 0 else PRECISION
    first = tl.program_id(0).to(tl.int64) * BLOCK_M
    m = tl.arange(0, BLOCK_M)
    keep = first + m < rows
    at = tl.multiple_of(m * C, ALIGN)
    x_ptr += first * C
    g_ptr += first * C
    hidden_ptr += first * F
    dhidden_ptr += first * F
    # First, so that it lies in shared memory when the rows that are normalised need the registers.
    g0, g1 = load_tile(g_ptr, at, keep, 1, C, C0, C1, 1, ALIGN, False, WHOLE)
    n0, n1, lead, mean, over = normed_rows(x_ptr, gamma_ptr, beta_ptr, at, keep, eps, C, C0, C1, ALIGN, WHOLE)
    for start in range(0, F, BLOCK_F):
        f = start + tl.arange(0, BLOCK_F)
        keep_f = f < F
        a = product(
            n0, n1, x_ptr, at, keep, lead, mean, over, gamma_ptr, beta_ptr, w1_ptr, f, keep_f,
            C, C0, C1, C, ALIGN, True, False, PRECISION, CHUNK,
        )  # fmt: skip
        a += tl.load(b1_ptr + f, mask=keep_f, other=0.0).to(tl.float32)[None, :]
        dh = product(
            g0, g1, g_ptr, at, keep, lead, mean, over, gamma_ptr, beta_ptr, w2_ptr, f, keep_f,
            C, C0, C1, F, ALIGN, False, True, PRECISION, CHUNK,
        )  # fmt: skip
        gate = sigmoid(a, PTX)
        hidden = a * gate
        inside = keep[:, None] & keep_f[None, :]
        to = tl.multiple_of(m * F, FALIGN)[:, None] + f[None, :]
        tl.store(hidden_ptr + to, hidden.to(hidden_ptr.dtype.element_ty), mask=inside)
        da = dh * (gate + hidden * (1.0 - gate))
        tl.store(dhidden_ptr + to, da.to(dhidden_ptr.dtype.element_ty), mask=inside)
