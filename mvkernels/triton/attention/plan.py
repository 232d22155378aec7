"""Which kernels run a call, with what: all that follows from shapes, strides and dtype alone."""

from __future__ import annotations

from typing import Any

import torch

from mvkernels.triton import configs
from mvkernels.triton.attention import backward_kernels, bias_kernels, forward_kernels, packed_kernels, unit_kernels
from mvkernels.triton.attention.configs import WINDOW
from mvkernels.triton.attention.problem import AttentionProblem
from mvkernels.triton.launch import Launch, sum_slices
from mvkernels.triton.maps import CLIPPED, UNEQUAL, Geometry, Shape, lanes, pieces
from mvkernels.triton.problem import PARTS_BYTES


def _key(problem: AttentionProblem, geometry: Geometry) -> dict[str, Any]:
    inputs = [geometry.maps[name] for name in "qkv"]
    key: dict[str, Any] = {
        "n": min(512, lanes(max(geometry.tokens, geometry.keys))),
        "d": problem.shape[2],
        "dv": problem.value_dim,
        "bias": int(problem.bias is not None),
        "dtype": problem.key_dtype,
        "wide": int(all(layout == 1 and align * problem.dtype.itemsize >= 8 for layout, align in inputs)),
        "arch": problem.device.arch,
    }
    if problem.op == WINDOW:
        key["clipped"] = int(geometry.kind == CLIPPED)
    return key | {"unequal": 1} if geometry.kind == UNEQUAL else key


def _split(kernel: str, problem: AttentionProblem, geometry: Geometry) -> tuple[dict[str, Any], dict[str, int]]:
    return problem.split(problem.op, kernel, _key(problem, geometry))


def _common(problem: AttentionProblem, geometry: Geometry, names: str) -> dict[str, Any]:
    exact = problem.dtype == torch.float32 and problem.precision == "ieee"
    d0, d1 = pieces(problem.shape[2], exact)
    v0, v1 = pieces(problem.value_dim, exact)
    meta: dict[str, Any] = {"D": problem.shape[2], "D0": d0, "D1": d1, "DV": problem.value_dim, "V0": v0, "V1": v1}
    for name in names:
        meta["L" + name.upper()], meta["A" + name.upper()] = geometry.maps[name]
    return meta | {"KIND": geometry.kind, "PRECISION": problem.precision}


def _tiles(problem: AttentionProblem, geometry: Geometry, *sizes: int) -> dict[str, Any]:
    # WHOLE and COLUMNS of tokens_of, for kernels with tiles of so many tokens.
    counts = (geometry.tokens, geometry.keys)
    cut = any(count % size for count in counts for size in sizes)
    # Of exact float32 the compiler makes an fma of a product and what another lane has of a sum, unless there is a
    # selection between: the lanes of a sum would not have the same bits.
    exact = problem.dtype == torch.float32 and problem.precision == "ieee"
    whole = geometry.equal and geometry.kind != CLIPPED and not cut and not exact
    columns = geometry.columns if whole and geometry.kind != UNEQUAL else 0
    return {"WHOLE": whole, "COLUMNS": columns if columns & (columns - 1) == 0 else 0}


def _ints(geometry: Geometry, names: str) -> Shape:
    return geometry.ints(names) + geometry.sizes + geometry.partners + geometry.starts + geometry.bias


def _is_last(problem: AttentionProblem, name: str) -> bool:
    return dict(problem.strides)[name][2] == 1


@configs.memo
def forward_launches(problem: AttentionProblem) -> list[Launch]:
    """The launches of a forward call; tensors ``q k v o bias``, floats ``scale2``."""
    geometry = problem.geometry
    meta = _common(problem, geometry, "qkv")
    meta["LO"], meta["AO"] = geometry.dense(_is_last(problem, "q"), problem.value_dim)
    meta["BIAS"] = problem.bias is not None
    pointers = ("q", "k", "v", "o", "bias")
    ints = _ints(geometry, "qkv")
    if max(geometry.tokens, geometry.keys) <= 32:
        blocks, options = _split("forward_packed", problem, geometry)
        grid = -(-geometry.units // blocks["UNITS"])
        return [Launch(forward_kernels.forward_packed, "forward_packed", grid, pointers, ("scale2",),
                       (*ints, geometry.units), meta | blocks, options)]  # fmt: skip
    blocks, options = _split("forward_rows", problem, geometry)
    steps = -(-geometry.tokens // blocks["BLOCK_M"])
    # Several query blocks a program save reading k and v again, once there are programs for all processors.
    if geometry.units < 4 * problem.device.processors:
        blocks["Q_BLOCKS"] = 1
    blocks["Q_BLOCKS"] = min(blocks["Q_BLOCKS"], steps)
    programs = -(-steps // blocks["Q_BLOCKS"])
    meta |= {
        "N_ALIGN": geometry.n_align,
        "K_ALIGN": geometry.k_align,
        "BIAS_ALIGN": geometry.bias_align,
        "LINEAR": geometry.linear,
        "WIDE": geometry.wide,
        "ONE_PASS": geometry.keys <= blocks["BLOCK_N"],
        "PROGRAMS_PER_UNIT": programs,
        "LOOP": problem.loop(geometry.keys),
        **_tiles(problem, geometry, blocks["BLOCK_M"] * blocks["Q_BLOCKS"], blocks["BLOCK_N"]),
    }
    return [Launch(forward_kernels.forward_rows, "forward_rows", geometry.units * programs, pointers, ("scale2",),
                   ints, meta | blocks, options)]  # fmt: skip


def _parts_of(problem: AttentionProblem, geometry: Geometry, items: int) -> tuple[int, int]:
    """(parts, steps) of the units of a head, which share a bias: programs for every processor, and few partial sums."""
    size = 4 * problem.shape[1] * geometry.tokens * geometry.keys
    parts = max(1, min(8 * problem.device.processors // problem.shape[1], items, PARTS_BYTES // size))
    steps = -(-items // parts)
    return -(-items // steps), steps


@configs.memo
def backward_launches(problem: AttentionProblem, need_bias: bool, packed: int = 1) -> tuple[list[Launch], bool, int]:
    """(launches, whether they use ``rows``, slices of the bias's partial sums).

    With ``packed`` 3, dq, dk and dv are the thirds of one channels-last map.

    Tensors ``q k v g bias dq dk dv rows partial dbias``, floats ``scale scale2``.
    """
    geometry = problem.geometry
    d, dv = problem.shape[2], problem.value_dim
    unit_blocks, unit_options = _split("backward_unit", problem, geometry)
    most = max(geometry.tokens, geometry.keys)
    in_one = most <= max(32, unit_blocks.pop("MAX_TOKENS"))
    meta = _common(problem, geometry, "qkvg") | {"BIAS": problem.bias is not None, "PACKED": packed}
    for name, channels in ("q", d), ("k", d), ("v", dv):
        meta["DL" + name.upper()], align = geometry.dense(_is_last(problem, name), channels, name != "q")
        # One alignment serves dq and dk: the smaller of theirs.
        which = "ADV" if name == "v" else "AD"
        meta[which] = min(align, meta.get(which, align))
    flat: dict[str, Any] = {
        "N_ALIGN": geometry.n_align,
        "K_ALIGN": geometry.k_align,
        "BIAS_ALIGN": geometry.bias_align,
        "LINEAR": geometry.linear,
        "WIDE": geometry.wide,
    }
    inputs = ("q", "k", "v", "g")
    every = (*inputs, "bias", "dq", "dk", "dv", "rows")
    scales = ("scale", "scale2")
    ints = _ints(geometry, "qkvg")
    launches = []
    uses_rows = need_bias
    if most <= 32:
        blocks, options = _split("backward_packed", problem, geometry)
        launches.append(
            Launch(
                packed_kernels.backward_packed,
                "backward_packed",
                -(-geometry.units // blocks["UNITS"]),
                every,
                scales,
                (*ints, geometry.units),
                meta | {"STORE_ROWS": need_bias} | blocks,
                options,
            )
        )
    elif in_one:
        heads = problem.shape[1]
        items = geometry.units // heads
        parts, steps = _parts_of(problem, geometry, items) if problem.bias is not None else (items, 1)
        # A loop of one step is none, and what it would keep for the next takes no registers.
        dbias = {"DBIAS": need_bias, "LOOP": 1 if problem.bias is None else problem.loop(steps)}
        launches.append(
            Launch(
                unit_kernels.backward_unit,
                "backward_unit",
                heads * parts,
                (*every[:-1], "partial" if need_bias else "q"),
                scales,
                (*ints, steps, items),
                meta | flat | dbias | unit_blocks | _tiles(problem, geometry, unit_blocks["BLOCK"]),
                unit_options,
            )
        )
        if need_bias:
            launches.append(
                sum_slices(problem, ("partial",), ("dbias",), heads * geometry.tokens * geometry.keys, parts)
            )
            return launches, False, parts
    else:
        uses_rows = True
        blocks, options = _split("backward_blocks", problem, geometry)
        fused = most <= blocks.pop("FUSED_TOKENS") and geometry.units >= 2 * problem.device.processors
        sizes = (blocks[name] for name in ("Q_BLOCK_M", "Q_BLOCK_N", "K_BLOCK_M", "K_BLOCK_N"))
        meta |= flat | blocks | {"LOOP": problem.loop(most)} | _tiles(problem, geometry, *sizes)
        q_blocks, k_blocks = -(-geometry.tokens // blocks["Q_BLOCK_M"]), -(-geometry.keys // blocks["K_BLOCK_N"])
        for phases, programs in ((3, 1),) if fused else ((1, q_blocks), (2, k_blocks)):
            mine = {"PHASES": phases, "PROGRAMS_PER_UNIT": programs}
            launches.append(
                Launch(
                    backward_kernels.backward_blocks,
                    "backward_blocks",
                    geometry.units * programs,
                    every,
                    scales,
                    ints,
                    meta | mine,
                    options,
                )
            )
    slices = 0
    if need_bias:
        blocks, options = _split("bias_partials", problem, geometry)
        heads = problem.shape[1]
        m_blocks = -(-geometry.tokens // blocks["BLOCK_M"])
        n_blocks = -(-geometry.keys // blocks["BLOCK_N"])
        size = heads * geometry.tokens * geometry.keys
        items = geometry.units // heads
        slices = -(-4 * problem.device.processors // (heads * m_blocks * n_blocks))
        slices = max(1, min(slices, items, PARTS_BYTES // (4 * size)))
        launches.append(
            Launch(
                bias_kernels.bias_partials,
                "bias_partials",
                heads * m_blocks * n_blocks * slices,
                (*inputs, "bias", "rows", "partial"),
                ("scale2",),
                (*ints, slices, items, m_blocks, n_blocks),
                _common(problem, geometry, "qkvg")
                | flat
                | {"LOOP": problem.loop(-(-items // slices))}
                | _tiles(problem, geometry, blocks["BLOCK_M"], blocks["BLOCK_N"])
                | blocks,
                options,
            )
        )
        launches.append(sum_slices(problem, ("partial",), ("dbias",), size, slices))
    return launches, uses_rows, slices
