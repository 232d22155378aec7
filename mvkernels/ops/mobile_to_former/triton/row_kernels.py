"""What mobile_to_former's backward knows of a token's row of scores, and the gradients made of it."""

import triton
import triton.language as tl


# Scores (pixels, tokens), -inf outside. With this choice after it the product is rounded in both stages alike: the
# compiler cannot fuse it with the difference to the highest score.
@triton.jit
def masked(products, factor, inside):
    return tl.where(inside, products * factor, -float("inf"))


# What is known of the rows of scores, one of a token, with one tile of scores and dP (pixels, tokens) more: the
# highest score; the sum of e = 2 ** (score - highest); which pixel has the highest; the base, that pixel's dP; and
# the rest, the sum of e (dP - base). The gradients of the scores do not depend on the base. With this one all terms
# of the rest are of other pixels: its error is relative to their weight, and not to a dP that cancels out.
# Each element of the tile has its own, of the pixels that it has met: nothing is exchanged between threads until
# rows_of puts them together.
# Of the old and the new score of an element one is the highest, and its power of two is 1.
@triton.jit
def add_tile(scores, dp, n, top, total, index, base, rest):
    higher = scores > top
    weight = tl.exp2(-tl.abs(scores - top))
    fade = tl.where(higher, weight, 1.0)
    other = dp - base
    # At the first pixel this adds 0 times the base: all of the row is NaN where that is not finite, as it should be.
    rest = rest * fade + weight * other * tl.where(higher, -total, 1.0)
    total = total * fade + tl.where(higher, 1.0, weight)
    index = tl.where(higher, n[:, None], index)
    return tl.maximum(top, scores), total, index, tl.where(higher, dp, base), rest


@triton.jit
def rows_of(top, total, index, base, rest):
    """(top, total, index, base, rest) of the tokens, from those of the elements of a tile."""
    highest = tl.max(top, 0)
    at = tl.min(tl.where(top == highest[None, :], index, 2147483647), 0)
    own = (top == highest[None, :]) & (index == at[None, :])
    moved = tl.sum(tl.where(own, base, 0.0), 0)
    fade = tl.exp2(top - tl.where(highest == -float("inf"), 0.0, highest)[None, :])
    rest = tl.sum(fade * (rest + total * (base - moved[None, :])), 0)
    # Where the highest is infinite the row is NaN, as inf - inf is: add_tile has not taken that difference.
    total = tl.where(highest == float("inf"), float("nan"), tl.sum(fade * total, 0))
    return highest, total, at, moved, rest


@triton.jit
def no_tile(BLOCK: tl.constexpr, TOKENS: tl.constexpr, ACC: tl.constexpr):
    """(top, total, index, base, rest) of the elements before the first tile: each pixel another's index.

    The top is the lowest number, and not -inf, whose difference to a score of -inf would be none.
    """
    LOWEST: tl.constexpr = -1.7976931348623157e308 if tl.float64 == ACC else -3.4028234663852886e38
    zero = tl.zeros([BLOCK, TOKENS], ACC)
    index = tl.zeros([BLOCK, TOKENS], tl.int32) + tl.arange(0, BLOCK)[:, None]
    return tl.full([BLOCK, TOKENS], LOWEST, ACC), zero, index, zero, zero


@triton.jit
def store_rows(stats_ptr, index_ptr, row, keep, top, total, index, base, rest):
    """What is known of rows, as add_tile names it, to (rows, 4) and (rows)."""
    tl.store(stats_ptr + row * 4, top, mask=keep)
    tl.store(stats_ptr + row * 4 + 1, total, mask=keep)
    tl.store(stats_ptr + row * 4 + 2, base, mask=keep)
    tl.store(stats_ptr + row * 4 + 3, rest, mask=keep)
    tl.store(index_ptr + row, index, mask=keep)


@triton.jit
def load_rows(stats_ptr, index_ptr, row, keep, TOP: tl.constexpr = 0.0, TOTAL: tl.constexpr = 1.0):
    """(top, total, index, base, rest) as store_rows left them; of no row TOP and TOTAL, which make gradients of 0."""
    top = tl.load(stats_ptr + row * 4, mask=keep, other=TOP)
    total = tl.load(stats_ptr + row * 4 + 1, mask=keep, other=TOTAL)
    base = tl.load(stats_ptr + row * 4 + 2, mask=keep, other=0.0)
    rest = tl.load(stats_ptr + row * 4 + 3, mask=keep, other=0.0)
    return top, total, tl.load(index_ptr + row, mask=keep, other=0), base, rest


# Probabilities and the gradient of the scores, (pixels, tokens), of a tile's scores and dP. backward_rows had the
# same scores, for it sums the same tiles in the same way: where a pixel is all of a row p is 1, and the gradient of
# its score 0. Outside scores are -inf, and both are 0.
@triton.jit
def gradients(scores, dp, n, top, total, index, base, rest):
    share = 1.0 / total
    shift = tl.where(top == -float("inf"), 0.0, top)
    rest = rest * share
    p = tl.exp2(scores - shift[None, :]) * share[None, :]
    # The base cancels out for the row's own pixel alone; for the others what it rounds off is relative to their weight.
    dp = tl.where(n[:, None] == index[None, :], -rest[None, :], dp - (base + rest)[None, :])
    return p, p * dp
