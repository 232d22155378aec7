"""Which part of a call a program of a bridge has, and its tokens.

A *unit* is one (batch, head). Its pixels are cut into slices, a program each, so that few units fill a machine; tokens
come in blocks, padded by mask.
"""

import triton
import triton.language as tl

from mvkernels.triton.tiles import load_tile, pixel_of, plane, row_offsets, store_tile

# Arguments that differ from call to call, and are not specialised.
GRAD = ["gsb", "gsh", "gsm", "gsd"]
QUERY = ["qsb", "qsh", "qsm", "qsd"]
MAP = ["xsb", "xsh", "xsd", "xsy", "xsx"]
SIZES = ["heads", "H", "W", "blocks", "slices", "steps", "rows"]


@triton.jit
def load_tokens(
    ptr, batch, head, m, keep, sb, sh, sm, sd,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, LAYOUT: tl.constexpr, ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Both pieces of a (tokens, D) tile of a token set (B, heads, M, D) of any strides, as operands of products."""
    rows = m.to(tl.int64) * sm
    if LAYOUT == 1:
        rows = tl.multiple_of(rows, ALIGN)
    base = ptr + plane(batch, head, sb, sh, LAYOUT, ALIGN)
    return load_tile(base, rows, keep, sd, D, D0, D1, LAYOUT, ALIGN, True, PRECISION)


@triton.jit
def store_tokens(ptr, first, second, rows, keep, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """Write a (tokens, D) tile to the rows of a dense (..., D) buffer, in its dtype."""
    store_tile(ptr, first, second, rows.to(tl.int64) * D, keep, 1, D, D0, D1, 1, 1, True)


@triton.jit
def along_tokens(t):
    """A tile (pixels, tokens) as the left operand of a product, which sums over 16 tokens at least.

    After 8 tokens come as many zeros. Each thread keeps what it has: two columns of 8, and the same two of the zeros.
    """
    if t.shape[1] == 8:
        both = tl.permute(tl.join(t, tl.zeros_like(t)), (0, 2, 1))
        return tl.reshape(both, [t.shape[0], 16])
    else:
        return t


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
