"""The launches of a backward: which of its kernels take a call, and how units are divided among blocks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from mvkernels.cuda.attention.plan import (
    Tiles,
    groups_along,
    groups_of,
    is_equal,
    is_plain,
    kind_of,
    name_of,
    order_launches,
    ordered_shapes,
    padded,
    row_bytes,
    rows_of,
    strides_of,
    team_of,
)
from mvkernels.cuda.launch import Launch, fitting
from mvkernels.triton import configs
from mvkernels.triton.attention.problem import AttentionProblem
from mvkernels.triton.maps import Geometry, Shape
from mvkernels.triton.problem import PARTS_BYTES

PARTS = 16, 24, 40
"""Channels of the heads that have a kernel for 256 tokens without a bias."""
HELD = 64
"""Tokens of a group, at most, for sums of a bias's gradient to stay in shared memory."""


@dataclass(frozen=True)
class _Backward:
    """How a backward is divided."""

    module: str
    kind: str
    """Part of the kernel's name."""
    warps: int
    """Of a block."""
    team: int
    """Of a unit."""
    rows: int
    """Of a unit in shared memory."""
    queries: int
    """Whose dS lies in shared memory at once."""
    held: bool
    """Whether sums of the bias's gradient stay in shared memory from unit to unit."""
    shared_bytes: int
    copies: int
    """Of the bias, in order."""
    bytes: int = 0
    """That rows are moved by."""


def _parts_of(problem: AttentionProblem, geometry: Geometry, how: _Backward) -> tuple[int, int, int]:
    """(blocks of a head, units in turn of each team, units of a head): as many blocks as all processors hold at once.

    Each has partial sums of its own.
    """
    heads, units = problem.shape[1], how.warps // how.team
    items = geometry.units // heads
    resident = max(1, min(16 // how.warps, fitting(problem.device.arch, how.shared_bytes)))
    most = max(1, resident * problem.device.processors // heads)
    most = max(1, min(most, -(-items // units), PARTS_BYTES // (4 * heads * how.rows**2 * units)))
    steps = -(-items // (most * units))
    return -(-items // (steps * units)), steps, items


def divisor_of(n: int) -> tuple[int, int]:
    """A Divisor of csrc/cuda/attention/groups.cuh: the two numbers that divide by ``n``, from 1 to 2**30."""
    shift = (n - 1).bit_length()
    by = -(-(1 << (31 + shift)) // n)
    return by - (1 << 32 if by >= 1 << 31 else 0), shift


def _whole_tokens(problem: AttentionProblem, geometry: Geometry, plain: bool) -> int:
    """Of the smallest kernel whose warps have whole rows of scores; 0 if none is for these groups."""
    tokens, dim = geometry.tokens, padded(problem.shape[2], problem.value_dim)
    if problem.dtype.itemsize != 2 or not is_equal(geometry):
        return 0
    if plain and (tokens in (16, 64) or (tokens == 256 and dim in PARTS)):
        return tokens
    # With masks and a bias there are those of windows, whose heads have 32 channels. Those of 144 tokens want more
    # registers than later architectures leave.
    large = (144,) if problem.device.arch.startswith(("sm_8", "sm_9")) else ()
    kernels = (56, 64, *large) if dim == 32 else ()
    # Of fewer tokens most would be padding.
    return next((each for each in kernels if each * 0.5 < tokens <= each and (each != 144 or tokens > 128)), 0)


def _by_queries(problem: AttentionProblem, tokens: int, need_bias: bool, plain: bool, width: int) -> _Backward:
    # Of each warp some queries, with all keys: csrc/cuda/attention/backward_whole.cuh.
    tiles = Tiles(problem.dtype, padded(problem.shape[2], problem.value_dim), plain)
    rows = rows_of(tokens)
    team = rows // 16
    warps = max(team, 4)
    # Of 256 tokens half of the keys at a time: csrc/cuda/attention/backward_parts.cuh.
    module, keys = ("backward_parts", rows // 2) if tokens == 256 else ("backward_whole", rows)
    needed = tiles.whole(rows, keys, team, warps, need_bias)
    kind = "_plain" * plain + f"_{tokens}"
    return _Backward(module, kind, warps, team, rows, 0, need_bias, needed, 1, width)


def _by_keys(problem: AttentionProblem, geometry: Geometry, need_bias: bool, plain: bool) -> _Backward:
    # Of each warp some keys: csrc/cuda/attention/backward.cuh.
    tiles = Tiles(problem.dtype, padded(problem.shape[2], problem.value_dim), plain)
    rows = rows_of(geometry.tokens)
    room = configs.shared_memory_of(problem.device.arch)
    warps = tiles.backward_warps
    held = need_bias and rows <= HELD
    team = team_of(-(-rows // tiles.keys), warps, partial(tiles.backward, rows, 16, held), room)
    queries = tiles.queries(rows, team, held, room)
    kind = "_plain" * plain
    needed = tiles.backward(rows, queries, held, team)
    return _Backward("backward", kind, warps, team, rows, queries, held, needed, 2)


def _divided(problem: AttentionProblem, geometry: Geometry, need_bias: bool, positive: bool, aligned: int) -> _Backward:
    plain, width = is_plain(problem, geometry, positive), row_bytes(problem, geometry, aligned)
    if width >= 8 and (tokens := _whole_tokens(problem, geometry, plain)):
        found = _by_queries(problem, tokens, need_bias, plain and geometry.tokens in (16, 64, 256), width)
        if found.shared_bytes <= configs.shared_memory_of(problem.device.arch):
            return found
    return _by_keys(problem, geometry, need_bias, plain)


@configs.memo
def backward_launches(
    problem: AttentionProblem, need_bias: bool, positive: bool, aligned: int = 16
) -> tuple[list[Launch], dict[str, Shape]]:
    """(launches, shapes of the tensors that only these need). ``aligned``: bytes, to which all maps are.

    Tensors ``q k v g bias dq dk dv partial dbias ordered``, floats ``scale scale2``.
    """
    geometry = problem.geometry
    d, dv = problem.shape[2], problem.value_dim
    how = _divided(problem, geometry, need_bias, positive, aligned)
    longs, ints = strides_of(geometry, ("q", "k", "v", "g", "dq", "dk", "dv"))
    units = how.warps // how.team
    grid, steps, items, parts = -(-geometry.units // units), 0, 0, 0
    if need_bias:
        blocks, steps, items = _parts_of(problem, geometry, how)
        grid, parts = blocks * problem.shape[1], blocks * (1 if how.held else units)
    heads, (down, across) = problem.shape[1], groups_along(geometry)
    pointers = ("q", "k", "v", "g", "ordered", "dq", "dk", "dv", "partial")
    by_heads, by_across, by_down = divisor_of(heads), divisor_of(across), divisor_of(down)
    shapes = ordered_shapes(problem, how.copies, how.rows // 16)
    launches = [
        *order_launches(problem, geometry, how.copies, how.rows // 16),
        Launch(
            f"attention/{how.module}", name_of(problem, "backward", how.kind), grid, 32 * how.warps,
            how.shared_bytes, pointers, longs,
            (*ints, 0 if problem.bias is None else how.rows // 16, geometry.tokens, d, dv,
             *groups_of(geometry, how.rows, how.team),
             steps, items, how.queries, int(how.held), how.bytes, *by_heads, *by_across, *by_down),
            ("scale", "scale2"),
        ),
    ]  # fmt: skip
    if need_bias:
        size, turned = heads * how.rows**2, int(how.copies > 1)
        shapes["partial"] = parts, heads, how.rows, how.rows
        launches.append(
            Launch("attention/bias", f"attention_bias_{kind_of(problem.dtype)}", -(-size // 128), 128, 0,
                   ("partial", "dbias"), (size,), (parts, how.rows // 16, geometry.tokens, turned), ())
        )  # fmt: skip
    return launches, shapes
