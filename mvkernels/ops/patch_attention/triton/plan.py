"""Which kernels run a call of patch_attention, with what: all that follows from shapes, strides and dtype alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from mvkernels.ops.patch_attention.triton import backward_kernels, bias_kernels, forward_kernels, packed_kernels
from mvkernels.ops.patch_attention.triton.configs import OP
from mvkernels.triton import configs
from mvkernels.triton.launch import PARTS_BYTES, Launch
from mvkernels.triton.maps import Geometry, Shape, lanes, pieces
from mvkernels.triton.problem import Problem


@dataclass(frozen=True)
class PatchProblem(Problem):
    """A call of patch_attention. Strides are of ``q``, ``k``, ``v`` and, in the backward, ``g``."""

    value_dim: int
    bias: Shape | None
    """Strides of the bias."""
    bias_itemsize: int
    patch: tuple[int, int]


def _geometry(problem: PatchProblem) -> Geometry:
    return Geometry(
        problem.shape, problem.strides, problem.dtype.itemsize, problem.value_dim, problem.patch, problem.bias,
        problem.bias_itemsize,
    )  # fmt: skip


def _key(problem: PatchProblem, geometry: Geometry) -> dict[str, Any]:
    inputs = [geometry.maps[name] for name in "qkv"]
    return {
        "n": min(512, lanes(geometry.tokens)),
        "d": problem.shape[2],
        "dv": problem.value_dim,
        "bias": int(problem.bias is not None),
        "dtype": problem.key_dtype,
        "wide": int(all(layout == 1 and align * problem.dtype.itemsize >= 8 for layout, align in inputs)),
        "arch": problem.device.arch,
    }


def _split(kernel: str, problem: PatchProblem, geometry: Geometry) -> tuple[dict[str, Any], dict[str, int]]:
    return problem.split(OP, kernel, _key(problem, geometry))


def _common(problem: PatchProblem, geometry: Geometry, names: str) -> dict[str, Any]:
    exact = problem.dtype == torch.float32 and problem.precision == "ieee"
    d0, d1 = pieces(problem.shape[2], exact)
    v0, v1 = pieces(problem.value_dim, exact)
    meta: dict[str, Any] = {"D": problem.shape[2], "D0": d0, "D1": d1, "DV": problem.value_dim, "V0": v0, "V1": v1}
    for name in names:
        meta["L" + name.upper()], meta["A" + name.upper()] = geometry.maps[name]
    return meta | {"PRECISION": problem.precision}


def _is_last(problem: PatchProblem, name: str) -> bool:
    return dict(problem.strides)[name][2] == 1


@configs.memo
def forward_launches(problem: PatchProblem) -> list[Launch]:
    """The launches of a forward call; tensors ``q k v o bias``, floats ``scale2``."""
    geometry = _geometry(problem)
    meta = _common(problem, geometry, "qkv")
    meta["LO"], meta["AO"] = geometry.dense(_is_last(problem, "q"), problem.value_dim)
    meta["BIAS"] = problem.bias is not None
    pointers = ("q", "k", "v", "o", "bias")
    ints = geometry.ints("qkv") + geometry.sizes + geometry.bias
    if geometry.tokens <= 32:
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
        "BIAS_ALIGN": geometry.bias_align,
        "LINEAR": geometry.linear,
        "WIDE": geometry.wide,
        "ONE_PASS": geometry.tokens <= blocks["BLOCK_N"],
        "PROGRAMS_PER_UNIT": programs,
        "LOOP": problem.loop(geometry.tokens),
    }
    return [Launch(forward_kernels.forward_rows, "forward_rows", geometry.units * programs, pointers, ("scale2",),
                   ints, meta | blocks, options)]  # fmt: skip


def _parts_of(problem: PatchProblem, geometry: Geometry, items: int) -> tuple[int, int]:
    """(parts, steps) of the units of a head, which share a bias: programs for every processor, and few partial sums."""
    size = 4 * problem.shape[1] * geometry.tokens**2
    parts = max(1, min(8 * problem.device.processors // problem.shape[1], items, PARTS_BYTES // size))
    steps = -(-items // parts)
    return -(-items // steps), steps


def _bias_sum(problem: PatchProblem, size: int, slices: int) -> Launch:
    meta, options = {"BLOCK": 256, "LOOP": problem.loop(slices)}, {"num_warps": 4, "num_stages": 1}
    return Launch(bias_kernels.bias_sum, "bias_sum", -(-size // 256), ("partial", "dbias"), (), (size, slices), meta,
                  options)  # fmt: skip


@configs.memo
def backward_launches(problem: PatchProblem, need_bias: bool, packed: int = 1) -> tuple[list[Launch], bool, int]:
    """(launches, whether they use ``rows``, slices of the bias's partial sums).

    With ``packed`` 3, dq, dk and dv are the thirds of one channels-last map.

    Tensors ``q k v g bias dq dk dv rows partial dbias``, floats ``scale scale2``.
    """
    geometry = _geometry(problem)
    d, dv = problem.shape[2], problem.value_dim
    unit_blocks, unit_options = _split("backward_unit", problem, geometry)
    in_one = geometry.tokens <= max(32, unit_blocks.pop("MAX_TOKENS"))
    meta = _common(problem, geometry, "qkvg") | {"BIAS": problem.bias is not None, "PACKED": packed}
    for name, channels in ("q", d), ("k", d), ("v", dv):
        meta["DL" + name.upper()], align = geometry.dense(_is_last(problem, name), channels)
        # One alignment serves dq and dk: the smaller of theirs.
        which = "ADV" if name == "v" else "AD"
        meta[which] = min(align, meta.get(which, align))
    flat: dict[str, Any] = {
        "N_ALIGN": geometry.n_align,
        "BIAS_ALIGN": geometry.bias_align,
        "LINEAR": geometry.linear,
        "WIDE": geometry.wide,
    }
    inputs = ("q", "k", "v", "g")
    every = (*inputs, "bias", "dq", "dk", "dv", "rows")
    scales = ("scale", "scale2")
    ints = geometry.ints("qkvg") + geometry.sizes + geometry.bias
    launches = []
    uses_rows = need_bias
    if geometry.tokens <= 32:
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
                backward_kernels.backward_unit,
                "backward_unit",
                heads * parts,
                (*every[:-1], "partial" if need_bias else "q"),
                scales,
                (*ints, steps, items),
                meta | flat | dbias | unit_blocks,
                unit_options,
            )
        )
        if need_bias:
            launches.append(_bias_sum(problem, heads * geometry.tokens**2, parts))
            return launches, False, parts
    else:
        uses_rows = True
        blocks, options = _split("backward_blocks", problem, geometry)
        fused = geometry.tokens <= blocks.pop("FUSED_TOKENS") and geometry.units >= 2 * problem.device.processors
        meta |= flat | blocks | {"LOOP": problem.loop(geometry.tokens)}
        for phases, size in ((3, geometry.tokens),) if fused else ((1, blocks["Q_BLOCK_M"]), (2, blocks["K_BLOCK_N"])):
            programs = -(-geometry.tokens // size)
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
        n_blocks = -(-geometry.tokens // blocks["BLOCK_N"])
        size = heads * geometry.tokens**2
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
                (*geometry.ints("qkvg"), *geometry.sizes, *geometry.bias, slices, items, m_blocks, n_blocks),
                _common(problem, geometry, "qkvg") | flat | {"LOOP": problem.loop(-(-items // slices))} | blocks,
                options,
            )
        )
        launches.append(_bias_sum(problem, size, slices))
    return launches, uses_rows, slices
