"""Which CUDA C++ kernels run a call, with what: all that follows from shapes, strides and dtype alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from mvkernels.cuda.launch import Launch
from mvkernels.triton import configs
from mvkernels.triton.attention.problem import AttentionProblem
from mvkernels.triton.maps import INT32, PATCHES, WINDOWS, Geometry, Shape, window_of

TOKENS = 256
"""Of a group, at most."""
PARTS_BYTES = 64 << 20
"""Of partial sums of a bias's gradient, at most: small beside any map that makes so many."""
HELD = 64
"""Tokens of a group, at most, for sums of a bias's gradient to stay in shared memory."""
PADDED = 16, 24, 32, 40, 48, 64
"""Channels of a head that there are kernels for."""
SINGLE = 48
"""The most of float32: of more the operands, in two parts each, do not fit the registers."""


def padded(*dims: int) -> int:
    """Channels that the tiles of a head have."""
    for each in PADDED:  # no more than torch.compile can trace
        if each >= max(dims):
            return each
    raise ValueError(f"{max(dims)} channels: want at most {PADDED[-1]}")


class Tiles:
    """Sizes in shared memory, as csrc/cuda/common/fragments.cuh has them, and warps of a block."""

    def __init__(self, dtype: torch.dtype, dim: int, plain: bool) -> None:
        half = dtype.itemsize == 2
        self.row = dtype.itemsize * ((dim // 8 | 1) * 8 if half else dim + 4)
        """Bytes of a token's row."""
        self.size = dtype.itemsize
        self.gap = 8 if half else 4
        """Numbers after each key's row of dS."""
        self.forward_warps = 4 if half else 8
        self.keys = 16 if half and (plain or dim < 64) else 32
        """That a warp owns in the backward."""

    @property
    def backward_warps(self) -> int:
        """Of a block."""
        return 256 // self.keys

    def forward(self, rows: int, team: int) -> int:
        """Bytes of a block that has units of so many rows, one for each team of warps."""
        units = self.forward_warps // team
        return (units * 2 * rows + self.forward_warps * 32) * self.row + _tokens(units, rows)

    def backward(self, rows: int, queries: int, held: bool, team: int) -> int:
        """As :meth:`forward`, with dS of so many queries at once, and sums of it if they are ``held``."""
        units = self.backward_warps // team
        pairs = rows * (queries + self.gap) * self.size
        sums = 4 * rows**2 * held
        return units * (4 * rows * self.row + pairs + sums + 12 * rows + 48) + _tokens(units, rows)

    def queries(self, rows: int, team: int, held: bool, room: int) -> int:
        """Whose dS lies in shared memory at once: as many as fit."""
        found = rows
        while found > 16 and self.backward(rows, found, held, team) > room:
            found = -(-found // 32) * 16
        return found


def _tokens(units: int, rows: int) -> int:
    return 4 * units * (rows + rows // 16)


def rows_of(tokens: int) -> int:
    """Tokens of a unit in shared memory."""
    return -(-tokens // 16) * 16


def team_of(jobs: int, warps: int, needed: Callable[[int], int], room: int) -> int:
    """Warps of a unit that has so many jobs for a warp each, of the ``warps`` of a block: a power of two.

    ``needed`` says what shared memory a block needs with such teams, ``room`` how much there is.
    """
    team = int(min(warps, 1 << (jobs - 1).bit_length()))
    while team < warps and needed(team) > room:
        team *= 2
    return team


def _kind(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float16: "f16"}.get(dtype, "f32")


def _is_plain(problem: AttentionProblem, geometry: Geometry, positive: bool) -> bool:
    """Whether a call is for the kernels that have no masks, no bias and no scale below 0."""
    whole = geometry.kind in (WINDOWS, PATCHES) and _is_equal(geometry)
    half = problem.dtype.itemsize == 2
    return half and positive and problem.bias is None and whole and geometry.tokens % 16 == 0


def _is_equal(geometry: Geometry) -> bool:
    """Whether all groups are of one size; windows may be cut."""
    _, height, width, ph, pw = geometry.sizes
    return geometry.kind >= WINDOWS or (geometry.kind == PATCHES and height % ph == 0 and width % pw == 0)


def _name(problem: AttentionProblem, direction: str, more: str) -> str:
    kind = "tf32" if problem.precision == "tf32" else _kind(problem.dtype)
    return f"attention_{direction}_{kind}{more}_{padded(problem.shape[2], problem.value_dim)}"


def _strides(geometry: Geometry, names: tuple[str, ...]) -> tuple[Shape, Shape]:
    strides = [geometry.strides[name] for name in names]
    return sum((each[:2] for each in strides), ()), sum((each[2:] for each in strides), ())


def _groups(geometry: Geometry, rows: int, team: int) -> Shape:
    heads, height, width, ph, pw = geometry.sizes
    windows = geometry.kind >= WINDOWS
    down, across = ph, pw
    if windows:
        down, across = -(-(height - geometry.starts[0]) // ph), -(-(width - geometry.starts[1]) // pw)
    return (
        heads,
        height,
        width,
        ph,
        pw,
        *geometry.starts,
        down,
        across,
        int(windows),
        geometry.units,
        rows,
        team.bit_length() - 1,
    )


def _bias(problem: AttentionProblem, geometry: Geometry) -> tuple[int, Shape]:
    """Its stride over heads, negative if there is none; over queries and keys, and how many of these there are."""
    if problem.bias is None:
        return -1, (0, 0, geometry.tokens)
    return geometry.bias[0], (*geometry.bias[1:], geometry.tokens)


def ordered_size(heads: int, tokens: int, copies: int) -> Shape:
    """Of a bias in the order of csrc/cuda/attention/bias.cuh."""
    tiles = rows_of(tokens) // 16
    return copies, heads, tiles, tiles, 256


def _bias_tiles(problem: AttentionProblem, geometry: Geometry) -> int:
    """Of a row of scores; 0 if there is no bias."""
    return 0 if problem.bias is None else rows_of(geometry.tokens) // 16


def order_launches(problem: AttentionProblem, geometry: Geometry, copies: int, rows: int = 0) -> list[Launch]:
    """Brings ``bias`` into the order of ``ordered``; of two copies the second is for tiles whose rows are keys.

    ``rows``: of a unit in shared memory, if more than its tokens need.
    """
    if problem.bias is None:
        return []
    heads, tokens = problem.shape[1], geometry.tokens
    rows = rows or rows_of(tokens)
    threads = math.prod(ordered_size(heads, rows, copies)) // 8
    return [
        Launch("attention/order", f"attention_order_{_kind(problem.dtype)}", -(-threads // 128), 128, 0,
               ("bias", "ordered"), geometry.bias, (heads, tokens, rows // 16, copies), ())
    ]  # fmt: skip


@configs.memo
def forward_launches(problem: AttentionProblem, positive: bool) -> list[Launch]:
    """The launches of a forward call. ``positive``: the scale is.

    Tensors ``q k v o bias ordered``, floats ``scale scale2``.
    """
    geometry = problem.geometry
    d, dv = problem.shape[2], problem.value_dim
    plain = _is_plain(problem, geometry, positive)
    tiles = Tiles(problem.dtype, padded(d, dv), plain)
    rows = rows_of(geometry.tokens)
    room = configs.shared_memory_of(problem.device.arch)
    team = team_of(rows // 16, tiles.forward_warps, partial(tiles.forward, rows), room)
    longs, ints = _strides(geometry, ("q", "k", "v", "o"))
    warps = tiles.forward_warps
    name = _name(problem, "forward", "_plain" * plain)
    return [
        *order_launches(problem, geometry, 1),
        Launch(
            "attention/forward", name, -(-geometry.units // (warps // team)), 32 * warps, tiles.forward(rows, team),
            ("q", "k", "v", "o", "ordered"), longs,
            (*ints, _bias_tiles(problem, geometry), d, dv, *_groups(geometry, rows, team)), ("scale", "scale2"),
        ),
    ]  # fmt: skip


def _parts_of(problem: AttentionProblem, geometry: Geometry, how: _Backward) -> tuple[int, int, int]:
    """(blocks of a head, units in turn of each team, units of a head): as many blocks as all processors hold at once.

    Each has partial sums of its own.
    """
    heads, units = problem.shape[1], how.warps // how.team
    items = geometry.units // heads
    room = configs.shared_memory_of(problem.device.arch)
    resident = max(1, min(16 // how.warps, (room + 1024) // (how.shared_bytes + 1024)))
    most = max(1, resident * problem.device.processors // heads)
    most = max(1, min(most, -(-items // units), PARTS_BYTES // (4 * heads * how.rows**2 * units)))
    steps = -(-items // (most * units))
    return -(-items // (steps * units)), steps, items


def divisor_of(n: int) -> tuple[int, int]:
    """A Divisor of csrc/cuda/attention/groups.cuh: the two numbers that divide by ``n``, from 1 to 2**30."""
    shift = (n - 1).bit_length()
    by = -(-(1 << (31 + shift)) // n)
    return by - (1 << 32 if by >= 1 << 31 else 0), shift


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


def row_bytes(problem: AttentionProblem, geometry: Geometry, aligned: int) -> int:
    """16 or 8 where every row of every map can be moved by so many, else less. ``aligned``: to what tensors are."""
    size = problem.dtype.itemsize
    found = [aligned, size * problem.shape[2], size * problem.value_dim]
    for batch, head, channel, y, x in geometry.strides.values():
        if channel != 1 or max(abs(batch), abs(head)) >= INT32:
            return size
        found += [size * abs(step) for step in (batch, head, y, x)]
    return math.gcd(16, *found)


def _whole_tokens(problem: AttentionProblem, geometry: Geometry, plain: bool) -> int:
    """Of the smallest kernel that has whole rows of scores in registers; 0 if none is for these groups."""
    tokens, dim = geometry.tokens, padded(problem.shape[2], problem.value_dim)
    if problem.dtype.itemsize != 2 or not _is_equal(geometry):
        return 0
    if plain and tokens in (16, 64):
        return tokens
    # Those of 144 tokens want more registers than later architectures leave.
    large = (144,) if problem.device.arch.startswith(("sm_8", "sm_9")) else ()
    kernels = (56, 64, *large) if dim == 32 else (64,)
    # Of fewer tokens most would be padding.
    return next((each for each in kernels if each * 0.5 < tokens <= each and (each != 144 or tokens > 128)), 0)


def _in_registers(problem: AttentionProblem, tokens: int, need_bias: bool, plain: bool, row: int) -> _Backward:
    # Whole rows of scores: csrc/cuda/attention/backward_whole.cuh.
    tiles = Tiles(problem.dtype, padded(problem.shape[2], problem.value_dim), plain)
    rows = rows_of(tokens)
    team = rows // 16
    warps = max(team, 4)
    pairs, sums = 2 * rows * (rows + tiles.gap) * tiles.size, 4 * rows**2 * need_bias
    state = (team + (10 if team > 4 else 3)) // 4 * 16
    needed = warps // team * (4 * rows * tiles.row + pairs + 4 * rows + state + sums)
    kind = "_plain" * plain + f"_{tokens}"
    return _Backward("backward_whole", kind, warps, team, rows, 0, need_bias, needed, 1, row)


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
    plain, row = _is_plain(problem, geometry, positive), row_bytes(problem, geometry, aligned)
    if row >= 8 and (tokens := _whole_tokens(problem, geometry, plain)):
        found = _in_registers(problem, tokens, need_bias, plain and geometry.tokens in (16, 64), row)
        if found.shared_bytes <= configs.shared_memory_of(problem.device.arch):
            return found
    return _by_keys(problem, geometry, need_bias, plain)


@configs.memo
def backward_launches(
    problem: AttentionProblem, need_bias: bool, positive: bool, aligned: int = 16
) -> tuple[list[Launch], dict[str, Shape]]:
    """(launches, shapes of the tensors ``partial`` and ``ordered``). ``aligned``: bytes, to which all maps are.

    Tensors ``q k v g bias dq dk dv partial dbias ordered``, floats ``scale scale2``.
    """
    geometry = problem.geometry
    d, dv = problem.shape[2], problem.value_dim
    how = _divided(problem, geometry, need_bias, positive, aligned)
    longs, ints = _strides(geometry, ("q", "k", "v", "g", "dq", "dk", "dv"))
    units = how.warps // how.team
    grid, steps, items, parts = -(-geometry.units // units), 0, 0, 0
    if need_bias:
        blocks, steps, items = _parts_of(problem, geometry, how)
        grid, parts = blocks * problem.shape[1], blocks * (1 if how.held else units)
    groups, heads = _groups(geometry, how.rows, how.team), problem.shape[1]
    pointers = ("q", "k", "v", "g", "ordered", "dq", "dk", "dv", "partial")
    by_heads, by_across, by_down = divisor_of(heads), divisor_of(groups[8]), divisor_of(groups[7])
    launches = [
        *order_launches(problem, geometry, how.copies, how.rows),
        Launch(
            f"attention/{how.module}", _name(problem, "backward", how.kind), grid, 32 * how.warps,
            how.shared_bytes, pointers, longs,
            (*ints, 0 if problem.bias is None else how.rows // 16, geometry.tokens, d, dv, *groups,
             steps, items, how.queries, int(how.held), how.bytes, *by_heads, *by_across, *by_down),
            ("scale", "scale2"),
        ),
    ]  # fmt: skip
    if need_bias:
        size, turned = heads * how.rows**2, int(how.copies > 1)
        launches.append(
            Launch("attention/bias", f"attention_bias_{_kind(problem.dtype)}", -(-size // 128), 128, 0,
                   ("partial", "dbias"), (size,), (parts, how.rows // 16, geometry.tokens, turned), ())
        )  # fmt: skip
    return launches, {
        "partial": (parts, heads, how.rows, how.rows),
        "ordered": ordered_size(heads, how.rows, how.copies),
    }


def why_not(
    shape: Shape,
    value_dim: int,
    dtype: torch.dtype,
    group: tuple[int, int],
    shift: tuple[int, int] | None,
    free: bool,
    arch: str,
) -> str | None:
    """Why a query map's shape and the size of its groups are not for these kernels, or None; ``free`` of a bias."""
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"dtype {str(dtype).removeprefix('torch.')}: want float16, bfloat16 or float32"
    batch, heads, d, height, width = shape
    for name, dim in (("head_dim", d), ("value_dim", value_dim)):
        if not PADDED[0] <= dim <= PADDED[-1] or dim % 4:
            return f"{name} {dim}: want a multiple of 4 from {PADDED[0]} to {PADDED[-1]}"
    if dtype == torch.float32 and max(d, value_dim) > SINGLE:
        return f"float32 heads of {max(d, value_dim)} channels: want at most {SINGLE}"
    dim = padded(d)
    if padded(value_dim) != dim:
        return f"value_dim {value_dim}: want one that is padded to {dim} channels, as head_dim {d}"
    tokens = tokens_of((height, width), group, shift, free)
    if tokens > TOKENS:
        return f"groups of {tokens} pixels: want at most {TOKENS}"
    if max(height, width) >= 1 << 15:
        return "a map is higher or wider than 32767 pixels"
    if heads * max(d, value_dim) * height * width >= INT32 or batch * heads * height * width >= INT32 - TOKENS:
        return "batch * heads * pixels, or an image, passes 2**31"
    rows = rows_of(tokens)
    tiles = Tiles(dtype, dim, plain=False)
    if tiles.backward(rows, 16, False, tiles.backward_warps) > configs.shared_memory_of(arch):
        return f"{rows} pixels of {dim} channels in {dtype.itemsize} bytes each do not fit the shared memory"
    return None


def spans_too_far(shape: Shape, strides: Shape) -> bool:
    """Whether 32-bit offsets do not reach all of a head of an image."""
    reach = [(size - 1) * abs(stride) for size, stride in zip(shape[2:], strides[2:])]
    return sum(reach) >= INT32


def tokens_of(sizes: Shape, group: tuple[int, int], shift: tuple[int, int] | None, free: bool) -> int:
    """Tokens of the largest group of a map, as :class:`~mvkernels.triton.maps.Geometry` has them."""
    (height, width), (ph, pw) = sizes, group
    if shift is None:
        return -(-height // min(height, ph)) * -(-width // min(width, pw))
    return window_of(height, ph, shift[0], free)[0] * window_of(width, pw, shift[1], free)[0]
