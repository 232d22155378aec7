"""Which part of a call a program of a bridge has, and its tokens.

A *unit* is one (batch, head). Its pixels are cut into slices, a program each, so that few units fill a machine; tokens
come in blocks, padded by mask.
"""

import triton
import triton.language as tl

from mvkernels.triton.tiles import load_tile, plane, store_tile

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
