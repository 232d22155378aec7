"""Launches: planned from a :class:`~mvkernels.triton.problem.Problem`, kept, and run with each call's tensors."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import triton

from mvkernels.triton import configs, tiles
from mvkernels.triton.maps import INT32, low_bit, power_of_two
from mvkernels.triton.problem import Problem, precision_of, sums_dtype
from mvkernels.triton.repeated import RepeatedLaunch

# Decided when the kernels were decorated, as Triton itself does.
INTERPRETED = not isinstance(tiles.load_tile, triton.JITFunction)


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

    def __call__(self, tensors: Mapping[str, torch.Tensor], floats: Mapping[str, float]) -> None:
        """Launch on the current device."""
        self._launch([tensors[name] for name in self.pointers], [floats[name] for name in self.floats])


def in_two(dtype: torch.dtype, **numbers: float) -> dict[str, float]:
    """Each number as ``name`` and ``name_low``: Triton passes float32, so of float64 the rest is sent after it."""
    if dtype != torch.float64:
        return numbers | {f"{name}_low": 0.0 for name in numbers}
    high = {name: ctypes.c_float(number).value for name, number in numbers.items()}
    return high | {f"{name}_low": number - high[name] for name, number in numbers.items()}


def parts(slices: int, of: torch.Tensor, shape: Sequence[int] | None = None) -> torch.Tensor:
    """A buffer for partial sums, (slices, *shape): one for each slice, in the dtype of sums; ``shape`` of ``of``."""
    return of.new_empty((slices, *(of.shape if shape is None else shape)), dtype=sums_dtype(of.dtype))


def merge_tile(slices: int, elements: int, least: int) -> tuple[int, int, dict[str, int]]:
    """(PARTS, columns, launch options) of a second stage, which adds over the slices PARTS at a time.

    ``elements`` of a tile for few slices, and the ``least`` columns of one for many.
    """
    parts_at_once = min(128, power_of_two(slices), max(1, 4096 // least))
    columns = max(least, elements // parts_at_once)
    return parts_at_once, columns, {"num_warps": 8 if parts_at_once * columns >= 4096 else 4, "num_stages": 1}


def sum_slices(problem: Problem, source: tuple[str, ...], target: tuple[str, ...], size: int, slices: int) -> Launch:
    """The second stage of sums: ``source`` (slices, size) to ``target``, of one buffer or two."""
    pair = len(source) == 2
    at_once, block, options = merge_tile(slices, 1024, 32)
    meta = {"PAIR": pair, "ALIGN": low_bit(size, limit=16 // sums_dtype(problem.dtype).itemsize), "PARTS": at_once}
    return Launch(
        tiles.sum_slices, "sum_slices", -(-size // block) * len(source), (source if pair else source * 2)
        + (target if pair else target * 2), (), (size, slices),
        meta | {"BLOCK": block, "LOOP": problem.loop(-(-slices // at_once))}, options,
    )  # fmt: skip


def why_not_triton(map_: torch.Tensor, head_dim: int, most: Mapping[str, int]) -> str | None:
    """Why no Triton kernel can run on a map, or None.

    ``most``: the largest head_dim by dtype; a dtype that is not in it has no kernel. "tf32" stands for float32 whose
    products may round.
    """
    type_ = map_.device.type
    if type_ == "cpu" and not INTERPRETED:
        return "CPU tensors run on Triton only under TRITON_INTERPRET=1"
    if type_ not in ("cpu", "cuda", "xpu"):
        return f"no Triton for device type {type_}"
    name = str(map_.dtype).removeprefix("torch.")
    if name not in most:
        return f"dtype {name}: want {', '.join(each for each in most if each != 'tf32')}"
    if INTERPRETED and map_.dtype == torch.bfloat16:
        return "bfloat16 products are wrong in Triton's interpreter"
    if too_old := configs.why_too_old(map_.device):
        return too_old
    name = "tf32" if precision_of(map_.dtype, type_) == "tf32" else name
    if head_dim > most[name]:
        return f"head_dim {head_dim}: want at most {most[name]} in {name}"
    return None


def why_too_large(width: int, channels: int, pixels: int) -> str | None:
    """Why a row of (width, channels) or a plane of so many pixels passes 32-bit offsets, or None."""
    return "a row or a plane of the map passes 2**31 elements" if max(width * channels, pixels) >= INT32 else None
