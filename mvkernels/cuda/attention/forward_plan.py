"""The launches of a forward: which of its kernels take a call, and how units are divided among blocks."""

from __future__ import annotations

from functools import partial

from mvkernels.cuda.attention.plan import (
    Tiles,
    groups_of,
    is_equal,
    is_plain,
    kind_of,
    lattice_of,
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
from mvkernels.triton.maps import CLIPPED, WINDOWS, Geometry, Shape

WALKED = 49, 256
"""Tokens of a group for blocks to go from unit to unit: with 32 channels, as the heads of windows have, and a bias if
there are more than 64; with other numbers of channels only 64 tokens without a bias."""
LARGE = (9, 3, 2), (13, 5, 1), (16, 4, 1)
"""Of more than 64 tokens there, (warps of a block, tiles of 16 keys at once, blocks of a processor)."""


def _is_plain_small(problem: AttentionProblem, geometry: Geometry) -> bool:
    return problem.bias is None and geometry.kind != CLIPPED and geometry.tokens == 64


def _walks(problem: AttentionProblem, geometry: Geometry, aligned: int) -> bool:
    """Whether csrc/cuda/attention/walk.cuh takes the units and rows of a call."""
    tokens, dim = geometry.tokens, padded(problem.shape[2], problem.value_dim)
    if problem.dtype.itemsize != 2 or not is_equal(geometry) or not WALKED[0] <= tokens <= WALKED[-1]:
        return False
    if not _is_plain_small(problem, geometry) and (dim != 32 or (tokens > 64 and problem.bias is None)):
        return False
    if tokens > 64:
        # Each warp brings rows of its own, also one that has no queries.
        warps, _, rows = _large(tokens)
        if rows < 16 * warps:
            return False
    return row_bytes(problem, geometry, aligned) == 16


def _large(tokens: int) -> tuple[int, int, int]:
    """(warps of a block, blocks of a processor, rows in shared memory) for more than 64 tokens."""
    warps, at_once, blocks = next(each for each in LARGE if 16 * each[0] >= tokens)
    return warps, blocks, -(-tokens // (16 * at_once)) * 16 * at_once


def _bias(problem: AttentionProblem, geometry: Geometry) -> tuple[int, Shape]:
    """Its stride over heads, negative if there is none; over queries and keys, and how many of these there are."""
    if problem.bias is None:
        return -1, (0, 0, geometry.tokens)
    return geometry.bias[0], (*geometry.bias[1:], geometry.tokens)


def _walking(problem: AttentionProblem, geometry: Geometry) -> tuple[list[Launch], dict[str, Shape]]:
    """A forward whose blocks have several units of a head each, and a warp for each 16 tokens of a unit."""
    heads, d, dv = problem.shape[1], problem.shape[2], problem.value_dim
    dim, rows, tiles, order = padded(d, dv), rows_of(geometry.tokens), 0, list[Launch]()
    longs: Shape = ()
    more: Shape = ()
    if rows <= 64:
        bias_head, bias = _bias(problem, geometry)
        plain = _is_plain_small(problem, geometry)
        kind = "plain" if plain else "56" if geometry.tokens <= 56 else "64"
        size, warps, most, pointer, longs, ints = "small", 4, 4, "bias", (bias_head,), bias
    else:
        warps, most, rows = _large(geometry.tokens)
        tiles, order = rows // 16, order_launches(problem, geometry, 1, rows // 16)
        size, kind, pointer = "large", str(warps), "ordered"
        ints, more = (tiles, geometry.tokens), (rows,)
    shared = Tiles(problem.dtype, dim, True).walking(rows, warps)
    resident = max(1, min(most, fitting(problem.device.arch, shared)))
    items = geometry.units // heads
    steps = -(-items // max(1, resident * problem.device.processors // heads))
    _, height, width, ph, pw = geometry.sizes
    windows = geometry.kind >= WINDOWS
    walk = (items, steps, *((ph, pw, height - ph, width - pw) if windows else (1, 1, height, width)))
    strides, strides_inside = strides_of(geometry, ("q", "k", "v", "o"))
    launch = Launch(
        f"attention/forward_{size}", f"attention_forward_{size}_{kind_of(problem.dtype)}_{kind}_{dim}",
        -(-items // steps) * heads, 32 * warps, shared, ("q", "k", "v", "o", pointer), (*strides, *longs),
        (*strides_inside, *ints, d, dv, *lattice_of(geometry), *walk, *more), ("scale", "scale2"),
    )  # fmt: skip
    return [*order, launch], ordered_shapes(problem, 1, tiles)


@configs.memo
def forward_launches(
    problem: AttentionProblem, positive: bool, aligned: int = 16
) -> tuple[list[Launch], dict[str, Shape]]:
    """(launches, shapes of the tensors that only these need). ``aligned``: bytes, to which all maps are.

    Tensors ``q k v o bias ordered``, floats ``scale scale2``. ``positive``: the scale is.
    """
    geometry = problem.geometry
    room = configs.shared_memory_of(problem.device.arch)
    if positive and _walks(problem, geometry, aligned):
        walking = _walking(problem, geometry)
        if walking[0][-1].shared_bytes <= room:
            return walking
    d, dv = problem.shape[2], problem.value_dim
    plain = is_plain(problem, geometry, positive)
    tiles = Tiles(problem.dtype, padded(d, dv), plain)
    rows = rows_of(geometry.tokens)
    team = team_of(rows // 16, tiles.forward_warps, partial(tiles.forward, rows), room)
    longs, ints = strides_of(geometry, ("q", "k", "v", "o"))
    warps = tiles.forward_warps
    name = name_of(problem, "forward", "_plain" * plain)
    tiles_across = 0 if problem.bias is None else rows // 16
    launches = [
        *order_launches(problem, geometry, 1, tiles_across),
        Launch(
            "attention/forward", name, -(-geometry.units // (warps // team)), 32 * warps, tiles.forward(rows, team),
            ("q", "k", "v", "o", "ordered"), longs,
            (*ints, tiles_across, d, dv, *groups_of(geometry, rows, team)), ("scale", "scale2"),
        ),
    ]  # fmt: skip
    return launches, ordered_shapes(problem, 1, tiles_across)
