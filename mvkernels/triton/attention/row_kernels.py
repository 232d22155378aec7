"""Rows of the softmax in the backward: probabilities P, and dS = P * (dP - delta), with delta the row sum of P * dP.

delta is not taken from out * dout. Where one key has nearly all of a row, its dP is nearly delta, and what is left of
their difference would be a rounding error, which large queries multiply. So a row is told by its key with the highest
score, its *peak*: rest is the row sum of P * (dP - dP of the peak), in which the peak itself adds exactly 0. Then dS of
the peak is -P rest, and that of the others P * (dP - delta) with delta = dP of the peak + rest: every dS is as exact as
the weight of the keys beside the peak. A row of a single weight has dS = 0 in every bit.
In groups of one tile this is done in registers. In larger ones the queries' pass goes over the keys with a running
peak, and leaves what the keys' pass has to know of a row: :func:`store_rows`.
"""

import triton
import triton.language as tl

ROWS = tl.constexpr(5)
"""Planes of what ``store_rows`` leaves."""


@triton.jit
def masked(scores, inside):
    """Scores, -inf outside."""
    return tl.where(inside, scores, -float("inf"))


@triton.jit
def weights_of(products, scale2, scores, inside, top, WHOLE: tl.constexpr, BIAS: tl.constexpr):
    """2^(score - top), 0 outside; ``products`` are the scores without scale and bias.

    A row's weights are computed in two passes, and have to be the same bits in both. Without masks and a bias the
    compiler could fuse the product with the difference to the highest score, in one of them and not in the other: so
    they are fused here. A selection or a bias between the two leaves it no choice.
    """
    if WHOLE and not BIAS:
        return tl.exp2(tl.fma(products, scale2, -top))
    else:
        return tl.exp2(masked(scores, inside) - top)


@triton.jit
def whole_rows(scores, dp, inside, n, AXIS: tl.constexpr):
    """(P, dS, top, share, delta, rest, peak) of rows of masked scores that are whole in a tile, the keys n along AXIS.

    P = 2^(score - top) share. P and dS are 0 outside.
    """
    top = tl.max(scores, AXIS)
    highest = tl.expand_dims(top, AXIS)
    base = tl.max(tl.where(scores == highest, dp, -float("inf")), AXIS)
    beside = dp - tl.expand_dims(base, AXIS)
    peak = tl.max(tl.where((scores == highest) & (beside == 0.0), n, -1), AXIS)
    p = tl.exp2(scores - tl.where(highest == -float("inf"), 0.0, highest))
    share = 1.0 / tl.sum(p, AXIS)
    p = tl.where(inside, p * tl.expand_dims(share, AXIS), 0.0)
    rest = tl.sum(tl.where(inside, p * beside, 0.0), AXIS)
    ds = tl.where(inside, p * (beside - tl.expand_dims(rest, AXIS)), 0.0)
    return p, ds, top, share, base + rest, rest, peak


@triton.jit
def without_mean_key(dq, ds, k, over, AXIS: tl.constexpr):
    """dS K, given as dq, less what the mean key adds to it; ``over`` is 1 / the number of keys.

    The sum of a row of dS is 0, but for its rounding to a half type or tf32.
    """
    left = tl.expand_dims(tl.sum(ds.to(tl.float32), AXIS), AXIS)
    return dq - left * tl.expand_dims(tl.sum(k.to(tl.float32), AXIS - 1) * over, AXIS - 1)


@triton.jit
def store_rows(ptr, area, keep, top, share, delta, rest, peak):
    """Leave planes of ``area`` pixels for another kernel: P = 2^(score - top) share; delta, rest, and the peak."""
    tl.store(ptr, top, mask=keep)
    tl.store(ptr + area, share, mask=keep)
    tl.store(ptr + 2 * area, delta, mask=keep)
    tl.store(ptr + 3 * area, rest, mask=keep)
    tl.store(ptr + 4 * area, peak.to(tl.float32, bitcast=True), mask=keep)


@triton.jit
def load_rows(ptr, area, keep):
    """What ``store_rows`` wrote; rows outside have P = 0."""
    top = tl.load(ptr, mask=keep, other=0.0)
    share = tl.load(ptr + area, mask=keep, other=0.0)
    delta = tl.load(ptr + 2 * area, mask=keep, other=0.0)
    rest = tl.load(ptr + 3 * area, mask=keep, other=0.0)
    peak = tl.load(ptr + 4 * area, mask=keep, other=0.0).to(tl.int32, bitcast=True)
    return top, share, delta, rest, peak
