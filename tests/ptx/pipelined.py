"""A kernel that Triton's compiler makes wrong, for what has to find it (triton-lang/triton#6691)."""

import triton
import triton.language as tl


@triton.jit
def multiplied_and_summed(
    a_ptr, w_ptr, out_ptr, sums_ptr, K: tl.constexpr, N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    TURNED: tl.constexpr,
):  # fmt: skip
    """a w, of a (BLOCK_M, K), which lies as its transpose if TURNED; and the sums of a over its rows."""
    m, n = tl.arange(0, BLOCK_M), tl.arange(0, N)
    out = tl.zeros([BLOCK_M, N], tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        w = tl.load(w_ptr + k[:, None] * N + n[None, :])
        if TURNED:
            a = tl.load(a_ptr + k[:, None] * BLOCK_M + m[None, :])
            tl.store(sums_ptr + k, tl.sum(a.to(tl.float32), 1))
            out = tl.dot(tl.trans(a), w, out)
        else:
            a = tl.load(a_ptr + m[:, None] * K + k[None, :])
            tl.store(sums_ptr + k, tl.sum(a.to(tl.float32), 0))
            out = tl.dot(a, w, out)
    tl.store(out_ptr + m[:, None] * N + n[None, :], out)
