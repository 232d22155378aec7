"""What plans of forward and backward share: sizes, names and arguments of kernels, and which calls they take.

All of it follows from shapes, strides and dtype alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from mvkernels.cuda.launch import Launch
from mvkernels.triton import configs
from mvkernels.triton.attention.problem import AttentionProblem
from mvkernels.triton.maps import INT32, PATCHES, WINDOWS, Geometry, Shape, power_of_two, window_of

TOKENS = 256
"""Of a group, at most."""
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

    def walking(self, rows: int, warps: int) -> int:
        """Bytes of a block of csrc/cuda/attention/walk.cuh: q, k and v of two units, and what a Walk keeps of them."""
        return 6 * rows * self.row + 4 * (rows + 2 * 9 + 4 * warps)

    def whole(self, rows: int, keys: int, team: int, warps: int, held: bool) -> int:
        """Bytes of a block of csrc/cuda/attention/whole_unit.cuh: what a WholeUnit says of each team's."""
        pairs = 2 * rows * (keys + self.gap) * self.size
        masks_and_state = (team + (10 if team > 4 else 3)) // 4 * 16
        return warps // team * (4 * rows * self.row + pairs + 4 * rows + masks_and_state + 4 * rows**2 * held)

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
    team = min(warps, power_of_two(jobs))
    while team < warps and needed(team) > room:
        team *= 2
    return team


def kind_of(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float16: "f16"}.get(dtype, "f32")


def is_plain(problem: AttentionProblem, geometry: Geometry, positive: bool) -> bool:
    """Whether a call is for the kernels that have no masks, no bias and no scale below 0."""
    whole = geometry.kind in (WINDOWS, PATCHES) and is_equal(geometry)
    half = problem.dtype.itemsize == 2
    return half and positive and problem.bias is None and whole and geometry.tokens % 16 == 0


def is_equal(geometry: Geometry) -> bool:
    """Whether all groups are of one size; windows may be cut."""
    _, height, width, ph, pw = geometry.sizes
    return geometry.kind >= WINDOWS or (geometry.kind == PATCHES and height % ph == 0 and width % pw == 0)


def name_of(problem: AttentionProblem, direction: str, more: str) -> str:
    """Of a kernel of csrc/cuda/attention; ``more`` says which of those of a type."""
    kind = "tf32" if problem.precision == "tf32" else kind_of(problem.dtype)
    return f"attention_{direction}_{kind}{more}_{padded(problem.shape[2], problem.value_dim)}"


def strides_of(geometry: Geometry, names: tuple[str, ...]) -> tuple[Shape, Shape]:
    """Of these maps: (over batch and heads, 64-bit; over channels, y and x, 32-bit)."""
    strides = [geometry.strides[name] for name in names]
    return sum((each[:2] for each in strides), ()), sum((each[2:] for each in strides), ())


def groups_along(geometry: Geometry) -> tuple[int, int]:
    """How many groups a map has along y and x."""
    _, height, width, ph, pw = geometry.sizes
    if geometry.kind < WINDOWS:
        return ph, pw
    return -(-(height - geometry.starts[0]) // ph), -(-(width - geometry.starts[1]) // pw)


def lattice_of(geometry: Geometry) -> Shape:
    """What Groups of csrc/cuda/attention/groups.cuh begins with: where the pixels of each group are."""
    return *geometry.sizes, *geometry.starts, *groups_along(geometry), int(geometry.kind >= WINDOWS)


def groups_of(geometry: Geometry, rows: int, team: int) -> Shape:
    """All of Groups, for teams of so many warps that each have so many ``rows`` of a unit in shared memory."""
    return *lattice_of(geometry), geometry.units, rows, team.bit_length() - 1


def ordered_size(heads: int, copies: int, tiles: int) -> Shape:
    """Of a bias in the order of csrc/cuda/attention/ordered_bias.cuh, in so many tiles of 16 x 16 along both axes."""
    return copies, heads, tiles, tiles, 256


def ordered_shapes(problem: AttentionProblem, copies: int, tiles: int) -> dict[str, Shape]:
    """Of the tensor ``ordered`` that :func:`order_launches` fills, if there is a bias to order."""
    return {} if problem.bias is None or not tiles else {"ordered": ordered_size(problem.shape[1], copies, tiles)}


def order_launches(problem: AttentionProblem, geometry: Geometry, copies: int, tiles: int) -> list[Launch]:
    """Brings ``bias`` into the order of ``ordered``; of two copies the second is for tiles whose rows are keys."""
    if problem.bias is None:
        return []
    heads, tokens = problem.shape[1], geometry.tokens
    size = ordered_size(heads, copies, tiles)
    return [
        Launch("attention/order", f"attention_order_{kind_of(problem.dtype)}", -(-math.prod(size) // 1024), 128, 0,
               ("bias", "ordered"), geometry.bias, (heads, tokens, tiles, copies), ())
    ]  # fmt: skip


def row_bytes(problem: AttentionProblem, geometry: Geometry, aligned: int) -> int:
    """16 or 8 where every row of every map can be moved by so many, else less. ``aligned``: to what tensors are."""
    size = problem.dtype.itemsize
    found = [aligned, size * problem.shape[2], size * problem.value_dim]
    for batch, head, channel, y, x in geometry.strides.values():
        if channel != 1 or max(abs(batch), abs(head)) >= INT32:
            return size
        found += [size * abs(step) for step in (batch, head, y, x)]
    return math.gcd(16, *found)


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
