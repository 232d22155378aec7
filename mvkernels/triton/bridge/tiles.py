"""Which part of a call a program of a bridge has, and its tokens.

A *unit* is one (batch, head). Its pixels are cut into slices, a program each, so that few units fill a machine; tokens
come in blocks, padded by mask.

PAIR: a unit is two heads that are neighbours in the map, which is then read as one head of twice the channels (D). Half
of a block of tokens are those of the first head, the others those of the second, each with zeros in the channels of
the other head. Products, and the exponentials of what they give, take 16 tokens at least: no more of them are padding
than with one head, in half as many tiles. And a sector of memory is read by one program where channels are contiguous.
"""

import triton
import triton.language as tl

from mvkernels.triton.tiles import load_tile, pixel_of, plane, round_tf32, row_offsets, store_tile

# Arguments that differ from call to call, and are not specialised.
GRAD = ["gsb", "gsh", "gsm", "gsd"]
QUERY = ["qsb", "qsh", "qsm", "qsd"]
MAP = ["xsb", "xsh", "xsd", "xsy", "xsx"]
SIZES = ["heads", "H", "W", "blocks", "slices", "steps", "rows"]


@triton.jit
def tokens_of(unit, block, M: tl.constexpr, TOKENS: tl.constexpr, PAIR: tl.constexpr):
    """Of a block of tokens: (number of each, its head among the unit's, which there are, rows (batch, head, token))."""
    m = tl.arange(0, TOKENS)
    if PAIR:
        own = m // (TOKENS // 2)
        m = m % (TOKENS // 2)
        return m, own, m < M, (unit * 2 + own) * M + m
    else:
        m = block * TOKENS + m
        return m, m * 0, m < M, unit * M + m


@triton.jit
def _channels(START: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    # Of a pair of heads, channels [START, START + WIDTH) of their D: (head, number in it, which there are).
    cols = START + tl.arange(0, WIDTH)
    return cols // (D // 2), cols % (D // 2), cols < D


@triton.jit
def _load_own(
    ptr, rows, own, keep, sd,
    START: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, LAYOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # A piece of the channels of a pair's tokens, zeros in those of the other head.
    head, channel, there = _channels(START, WIDTH, D)
    along = channel if LAYOUT == 1 else channel.to(tl.int64) * sd
    tile = tl.load(ptr + rows[:, None] + along[None, :], mask=keep[:, None] & there[None, :], other=0.0)
    return round_tf32(tl.where(head[None, :] == own[:, None], tile, 0.0).to(tile.dtype), PRECISION)


@triton.jit
def load_tokens(
    ptr, batch, head, m, own, keep, sb, sh, sm, sd,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, LAYOUT: tl.constexpr, ALIGN: tl.constexpr,
    PRECISION: tl.constexpr, PAIR: tl.constexpr,
):  # fmt: skip
    """Both pieces of a (tokens, D) tile of a token set (B, heads, M, D) of any strides, as operands of products."""
    rows = m.to(tl.int64) * sm
    if PAIR:
        rows += (head * 2 + own) * sh
    if LAYOUT == 1:
        rows = tl.multiple_of(rows, ALIGN)
    if PAIR:
        base = ptr + plane(batch, 0, sb, sh, LAYOUT, ALIGN)
        first = _load_own(base, rows, own, keep, sd, 0, D0, D, LAYOUT, PRECISION)
        return first, _load_own(base, rows, own, keep, sd, D0, D1, D, LAYOUT, PRECISION) if D1 > 0 else first
    else:
        base = ptr + plane(batch, head, sb, sh, LAYOUT, ALIGN)
        return load_tile(base, rows, keep, sd, D, D0, D1, LAYOUT, ALIGN, True, PRECISION)


@triton.jit
def _store_own(ptr, value, rows, own, keep, START: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    head, channel, there = _channels(START, WIDTH, D)
    inside = (keep[:, None] & there[None, :]) & (head[None, :] == own[:, None])
    tl.store(ptr + rows[:, None] + channel[None, :], value.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def store_tokens(
    ptr, first, second, rows, own, keep,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, PAIR: tl.constexpr,
):  # fmt: skip
    """Write a (tokens, D) tile to the rows of a dense (..., D) buffer, in its dtype; of a pair its own channels."""
    if PAIR:
        rows = rows.to(tl.int64) * (D // 2)
        _store_own(ptr, first, rows, own, keep, 0, D0, D)
        if D1 > 0:
            _store_own(ptr, second, rows, own, keep, D0, D1, D)
    else:
        store_tile(ptr, first, second, rows.to(tl.int64) * D, keep, 1, D, D0, D1, 1, 1, True)


@triton.jit
def no_sums(PARTS: tl.constexpr, TOKENS: tl.constexpr, D: tl.constexpr, ACC: tl.constexpr):
    """What add_pixels begins with: (tokens, D) for each part."""
    return tl.zeros([TOKENS, D] if PARTS == 1 else [PARTS, TOKENS, D], ACC)


@triton.jit
def add_pixels(t, x, acc, PARTS: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr):
    """acc + tᵀ x of tiles (pixels, tokens) and (pixels, D).

    With PARTS, part of the pixels by part, one for each warp: of one product of a few tokens each warp would make all.
    """
    if PARTS == 1:
        return tl.dot(tl.trans(t), x, acc, input_precision=PRECISION, out_dtype=ACC)
    else:
        along: tl.constexpr = [PARTS, t.shape[0] // PARTS, t.shape[1]]
        across: tl.constexpr = [PARTS, x.shape[0] // PARTS, x.shape[1]]
        left = tl.permute(tl.reshape(t, along), (0, 2, 1))
        return tl.dot(left, tl.reshape(x, across), acc, input_precision=PRECISION, out_dtype=ACC)


@triton.jit
def of_all(acc, PARTS: tl.constexpr):
    """The sum of the parts."""
    return acc if PARTS == 1 else tl.sum(acc, 0)


@triton.jit
def place(
    ptr, start, width, sy, sx,
    BLOCK: tl.constexpr, LAYOUT: tl.constexpr, ALIGN: tl.constexpr, LINEAR: tl.constexpr, WIDE: tl.constexpr,
    KEPT: tl.constexpr = True,
):  # fmt: skip
    """(pointer, offsets) of the BLOCK pixels from ``start`` on.

    Where all pixels are at one distance from the next only the pointer depends on ``start``: no step of a loop has
    arithmetic for each pixel then. Without KEPT each step has: the offsets take registers.
    """
    n = tl.arange(0, BLOCK)
    if LINEAR and KEPT:
        first = start.to(tl.int64)
        if LAYOUT != 2:
            first *= sx
        if LAYOUT == 1:
            first = tl.multiple_of(first, ALIGN)
        ptr += first
    else:
        n += start
    y, x = pixel_of(n, width, 0, 0, 1, 1, LINEAR, WIDE)
    return ptr, row_offsets(y, x, sy, sx, LAYOUT, ALIGN, LINEAR)


@triton.jit
def inside(start, pixels, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    """Which of the BLOCK pixels from ``start`` on the map has. WHOLE: all, and nothing is compared."""
    n = start + tl.arange(0, BLOCK)
    return tl.full([BLOCK], True, tl.int1) if WHOLE else n < pixels


@triton.jit
def unit_of(pid, heads, blocks, slices):
    """(batch * heads + head as int64, block of tokens, slice) of a program.

    The head is fastest: heads of a pixel are neighbours in a channels-last map, and run together.
    """
    head = pid % heads
    rest = pid // heads
    part = rest % slices
    rest = rest // slices
    block = rest % blocks
    return (rest // blocks).to(tl.int64) * heads + head, block, part.to(tl.int64)
