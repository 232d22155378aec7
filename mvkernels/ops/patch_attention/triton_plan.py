"""Which kernels run a call of patch_attention, with what: all that follows from shapes, strides and dtype alone."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from mvkernels import launch
from mvkernels.launch import Device
from mvkernels.ops.patch_attention import triton_backward, triton_bias, triton_forward
from mvkernels.ops.patch_attention.triton_configs import OP, pieces
from mvkernels.triton_launch import RepeatedLaunch

_INT32 = 2**31
_PARTIAL_BYTES = 64 << 20

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Problem:
    """A call without its data: all that kernels and their configurations may depend on."""

    query: Shape
    value_dim: int
    strides: tuple[tuple[str, Shape], ...]
    """Of ``q``, ``k``, ``v`` and, in the backward, ``g`` (the incoming gradient)."""
    bias: Shape | None
    """Strides of the bias."""
    bias_itemsize: int
    patch: tuple[int, int]
    dtype: torch.dtype
    precision: str
    device: Device


@dataclass(frozen=True)
class Launch:
    """One kernel launch without its tensors. Arguments go: pointers, floats, ints, then constexprs by name."""

    kernel: Any
    name: str
    grid: int
    pointers: tuple[str, ...]
    floats: tuple[str, ...]
    ints: tuple[int, ...]
    meta: dict[str, Any]
    options: dict[str, int]
    _launch: RepeatedLaunch = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        repeated = RepeatedLaunch(self.kernel, self.grid, self.ints, self.meta, self.options)
        object.__setattr__(self, "_launch", repeated)

    def __call__(self, tensors: dict[str, torch.Tensor], floats: dict[str, float]) -> None:
        """Launch on the current device."""
        self._launch([tensors[name] for name in self.pointers], [floats[name] for name in self.floats])


def divides(height: int, width: int) -> bool:
    """Whether the kernels' ``divider`` is exact for every pixel of a map."""
    return height * width * width < 2**32


def _low_bit(*values: int, limit: int) -> int:
    # The largest power of two up to limit that divides all values.
    common = math.gcd(limit, *values)
    return common & -common


class _Geometry:
    """Sizes and strides as the kernels see them: patches clipped to the map, flat maps flattened."""

    def __init__(self, problem: Problem):
        batch, heads, d, height, width = problem.query
        dv = problem.value_dim
        ph, pw = min(problem.patch[0], height), min(problem.patch[1], width)
        self.tokens = -(-height // ph) * -(-width // pw)
        self.units = batch * heads * ph * pw
        self.vector = 16 // problem.dtype.itemsize
        strides = {}
        for name, (sb, sh, sd, sy, sx) in problem.strides:
            channels = dv if name in "vg" else d
            strides[name] = (
                sb if batch > 1 else 0,
                sh if heads > 1 else 0,
                sd if channels > 1 else 1,
                sy if height > 1 else 0,
                sx if width > 1 else 0,
            )
        extents = [height * width * heads * max(d, dv)]
        extents += [max(d, dv) * abs(s[2]) + height * abs(s[3]) + width * abs(s[4]) for s in strides.values()]
        self.wide = max(extents) >= _INT32
        self.linear = ph == pw == 1 and all(s[3] == width * s[4] or min(height, width) == 1 for s in strides.values())
        self.wide |= not self.linear and not divides(height, width)
        if self.linear:
            strides = {name: (sb, sh, sd, 0, sx if width > 1 else sy) for name, (sb, sh, sd, sy, sx) in strides.items()}
            height, width = 1, height * width
        self.strides = strides
        self.sizes = (heads, height, width, ph, pw)
        self.area = height * width
        equal = self.linear or problem.bias is not None
        self.n_align = _low_bit(self.tokens, limit=self.vector) if equal else 1
        self.maps: dict[str, tuple[int, int]] = {name: self._layout(s) for name, s in strides.items()}
        self.bias_align = 0
        self.bias = (0, 0, 0)
        if problem.bias is not None:
            self.bias = problem.bias  # type: ignore[assignment]
            if self.bias[2] == 1 or self.tokens == 1:
                self.bias_align = _low_bit(self.bias[0], self.bias[1], limit=16 // problem.bias_itemsize)

    def _layout(self, stride: Shape) -> tuple[int, int]:
        sb, sh, sd, sy, sx = stride
        if sd == 1:
            return 1, _low_bit(sb, sh, sy, sx, limit=self.vector)
        if sx == 1:
            return 2, _low_bit(sb, sh, sd, self.area, limit=self.vector) if self.linear else 1
        return 0, 1

    def dense(self, channels_last: bool, channels: int) -> tuple[int, int]:
        """(LAYOUT, ALIGN) of a map that we allocate."""
        if channels_last:
            return 1, _low_bit(channels, limit=self.vector)
        return 2, _low_bit(self.area, limit=self.vector) if self.linear else 1

    def ints(self, names: str) -> tuple[int, ...]:
        return tuple(stride for name in names for stride in self.strides[name])


def _key(problem: Problem, geometry: _Geometry) -> dict[str, Any]:
    inputs = [geometry.maps[name] for name in "qkv"]
    dtype = "f16" if problem.dtype.itemsize == 2 else "f32" if problem.precision == "ieee" else "tf32"
    return {
        "n": min(512, max(16, 1 << (geometry.tokens - 1).bit_length())),
        "d": problem.query[2],
        "dv": problem.value_dim,
        "bias": int(problem.bias is not None),
        "dtype": dtype,
        "wide": int(all(layout == 1 and align * problem.dtype.itemsize >= 8 for layout, align in inputs)),
        "arch": problem.device.arch,
    }


def _split(kernel: str, problem: Problem, geometry: _Geometry) -> tuple[dict[str, Any], dict[str, int]]:
    # The kernel's configuration: (constexprs, launch options).
    config = launch.config(OP, kernel, problem.device.name, _key(problem, geometry))
    options = {name: value for name, value in config.items() if name.islower()}
    return {name: value for name, value in config.items() if not name.islower()}, options


def _common(problem: Problem, geometry: _Geometry, names: str) -> dict[str, Any]:
    exact = problem.dtype == torch.float32 and problem.precision == "ieee"
    d0, d1 = pieces(problem.query[2], exact)
    v0, v1 = pieces(problem.value_dim, exact)
    meta: dict[str, Any] = {"D": problem.query[2], "D0": d0, "D1": d1, "DV": problem.value_dim, "V0": v0, "V1": v1}
    for name in names:
        meta["L" + name.upper()], meta["A" + name.upper()] = geometry.maps[name]
    return meta | {"PRECISION": problem.precision}


def _loop(problem: Problem, bound: int) -> int:
    # 0: the kernel takes the bound from its own data.
    return bound if problem.device.arch == "interpreter" else 0


def _is_last(problem: Problem, name: str) -> bool:
    return dict(problem.strides)[name][2] == 1


@launch.memo
def forward_launches(problem: Problem) -> list[Launch]:
    """The launches of a forward call; tensors ``q k v o bias``, floats ``scale2``."""
    geometry = _Geometry(problem)
    meta = _common(problem, geometry, "qkv")
    meta["LO"], meta["AO"] = geometry.dense(_is_last(problem, "q"), problem.value_dim)
    meta["BIAS"] = problem.bias is not None
    pointers = ("q", "k", "v", "o", "bias")
    ints = geometry.ints("qkv") + geometry.sizes + geometry.bias
    if geometry.tokens <= 32:
        blocks, options = _split("forward_packed", problem, geometry)
        grid = -(-geometry.units // blocks["UNITS"])
        return [Launch(triton_forward.forward_packed, "forward_packed", grid, pointers, ("scale2",),
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
        "LOOP": _loop(problem, geometry.tokens),
    }
    return [Launch(triton_forward.forward_rows, "forward_rows", geometry.units * programs, pointers, ("scale2",),
                   ints, meta | blocks, options)]  # fmt: skip


def _parts_of(problem: Problem, geometry: _Geometry, items: int) -> tuple[int, int]:
    """(parts, steps) of the units of a head, which share a bias: programs for every processor, and few partial sums."""
    size = 4 * problem.query[1] * geometry.tokens**2
    parts = max(1, min(8 * problem.device.processors // problem.query[1], items, _PARTIAL_BYTES // size))
    steps = -(-items // parts)
    return -(-items // steps), steps


def _bias_sum(problem: Problem, size: int, slices: int) -> Launch:
    meta, options = {"BLOCK": 256, "LOOP": _loop(problem, slices)}, {"num_warps": 4, "num_stages": 1}
    return Launch(triton_bias.bias_sum, "bias_sum", -(-size // 256), ("partial", "dbias"), (), (size, slices), meta,
                  options)  # fmt: skip


@launch.memo
def backward_launches(problem: Problem, need_bias: bool, packed: int = 1) -> tuple[list[Launch], bool, int]:
    """(launches, whether they use ``rows``, slices of the bias's partial sums).

    With ``packed`` 3, dq, dk and dv are the thirds of one channels-last map.

    Tensors ``q k v g bias dq dk dv rows partial dbias``, floats ``scale scale2``.
    """
    geometry = _Geometry(problem)
    d, dv = problem.query[2], problem.value_dim
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
                triton_backward.backward_packed,
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
        heads = problem.query[1]
        items = geometry.units // heads
        parts, steps = _parts_of(problem, geometry, items) if problem.bias is not None else (items, 1)
        # A loop of one step is none, and what it would keep for the next takes no registers.
        dbias = {"DBIAS": need_bias, "LOOP": 1 if problem.bias is None else _loop(problem, steps)}
        launches.append(
            Launch(
                triton_backward.backward_unit,
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
        meta |= flat | blocks | {"LOOP": _loop(problem, geometry.tokens)}
        for phases, size in ((3, geometry.tokens),) if fused else ((1, blocks["Q_BLOCK_M"]), (2, blocks["K_BLOCK_N"])):
            programs = -(-geometry.tokens // size)
            mine = {"PHASES": phases, "PROGRAMS_PER_UNIT": programs}
            launches.append(
                Launch(
                    triton_backward.backward_blocks,
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
        heads = problem.query[1]
        m_blocks = -(-geometry.tokens // blocks["BLOCK_M"])
        n_blocks = -(-geometry.tokens // blocks["BLOCK_N"])
        size = heads * geometry.tokens**2
        items = geometry.units // heads
        slices = -(-4 * problem.device.processors // (heads * m_blocks * n_blocks))
        slices = max(1, min(slices, items, _PARTIAL_BYTES // (4 * size)))
        launches.append(
            Launch(
                triton_bias.bias_partials,
                "bias_partials",
                heads * m_blocks * n_blocks * slices,
                (*inputs, "bias", "rows", "partial"),
                ("scale2",),
                (*geometry.ints("qkvg"), *geometry.sizes, *geometry.bias, slices, items, m_blocks, n_blocks),
                _common(problem, geometry, "qkvg") | flat | {"LOOP": _loop(problem, -(-items // slices))} | blocks,
                options,
            )
        )
        launches.append(_bias_sum(problem, size, slices))
    return launches, uses_rows, slices
