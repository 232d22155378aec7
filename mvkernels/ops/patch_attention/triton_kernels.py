"""patch_attention on Triton: which kernel runs a call, and with what.

| tokens of the largest group | forward | backward |
| --- | --- | --- |
| up to 32 | ``forward_packed``: several units a program | ``backward_packed`` |
| up to 64 | ``forward_rows``, the score row whole | ``backward_unit``: one program a unit, one tile |
| up to 256 | the same | ``backward_blocks``, both phases in one program |
| more (and float32, and wide heads) | ``forward_rows``, running maximum | ``backward_blocks``, a launch per phase |

A bias's gradient is a sum of parts (``bias_sum``), which ``backward_unit`` makes itself and for the others
``bias_partials``. Everything that
follows from shapes, strides and dtype alone is a :class:`Launch`, made once and cached: a call costs a
look-up, its allocations and the launches. The static audit compiles the very same Launches.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton

from mvkernels import launch
from mvkernels.checks import empty_map
from mvkernels.ops.patch_attention import triton_forward, triton_rows
from mvkernels.ops.patch_attention.triton_plan import Launch, Problem, backward_launches, forward_launches

_LOG2E = 1.4426950408889634
_MAX_HEAD_DIM = 256
_INT32 = 2**31
# Decided when the kernels were decorated, as Triton itself does.
_INTERPRETED = not isinstance(triton_forward.forward_rows, triton.JITFunction)


def _precision(dtype: torch.dtype, device_type: str) -> str:
    return "tf32" if dtype == torch.float32 and launch.tf32_allowed(device_type) else "ieee"


def _problem(maps: Sequence[tuple[str, torch.Tensor]], bias: torch.Tensor | None, patch: tuple[int, int]) -> Problem:
    query = maps[0][1]
    device = query.device
    place = ("cpu", None) if _INTERPRETED else (device.type, device.index)
    return Problem(
        tuple(query.shape),
        maps[2][1].shape[2],
        tuple((name, map_.stride()) for name, map_ in maps),
        None if bias is None else bias.stride(),
        1 if bias is None else bias.element_size(),
        patch,
        query.dtype,
        _precision(query.dtype, device.type),
        launch.device_of(*place),
    )


def _run(launches: list[Launch], tensors: dict[str, torch.Tensor], floats: dict[str, float]) -> None:
    device = tensors["q"].device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            for each in launches:
                each(tensors, floats)
    else:
        for each in launches:
            each(tensors, floats)


def why_not(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    patch_size: tuple[int, int],
    bias: torch.Tensor | None,
    scale: float | None,
) -> str | None:
    """Why these kernels cannot run a call, or None. Takes the op's checked arguments; never raises."""
    type_ = query.device.type
    if type_ == "cpu" and not _INTERPRETED:
        return "CPU tensors run on Triton only under TRITON_INTERPRET=1"
    if type_ not in ("cpu", "cuda", "xpu"):
        return f"no Triton for device type {type_}"
    if query.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"dtype {str(query.dtype).removeprefix('torch.')}: want float32, float16 or bfloat16"
    if _INTERPRETED and query.dtype == torch.bfloat16:
        return "bfloat16 products are wrong in Triton's interpreter"
    if too_old := launch.why_too_old(query.device):
        return too_old
    batch, heads, d, height, width = query.shape
    dv = value.shape[2]
    if max(d, dv) > _MAX_HEAD_DIM:
        return f"head_dim {max(d, dv)}: want at most {_MAX_HEAD_DIM}"
    if width * heads * max(d, dv) >= _INT32 or height * width >= _INT32:
        return "a row or a plane of the map passes 2**31 elements"
    if bias is not None and bias.shape[1] * max(map(abs, bias.stride()[1:])) * 2 >= _INT32:
        return "a head's bias spans 2**31 elements"
    if batch * heads * height * width >= _INT32:
        return "batch * heads * pixels passes 2**31"
    return None


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    patch_h: int,
    patch_w: int,
    bias: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """query, key (B, h, D, H, W), value (B, h, Dv, H, W), bias (h, N, N) or None -> out (B, h, Dv, H, W).

    out is in query's dtype, dense in query's order. Inputs are read in place, whatever their strides.
    """
    problem = _problem((("q", query), ("k", key), ("v", value)), bias, (patch_h, patch_w))
    out = empty_map(query, value.shape[2])
    # Without a bias its pointer is not read; any tensor will do.
    tensors = {"q": query, "k": key, "v": value, "o": out, "bias": out if bias is None else bias}
    _run(forward_launches(problem), tensors, {"scale2": scale * _LOG2E})
    return out


def backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    patch_h: int,
    patch_w: int,
    bias: torch.Tensor | None,
    scale: float,
    need_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dquery, dkey, dvalue, dbias), each dense in the order of its own input.

    grad (B, h, Dv, H, W) with any strides; dbias is (h, N, N), contiguous,
    in bias's dtype, or an empty (0,) without ``need_bias``. No atomics: the same bits in every run.
    """
    dq, dk, dv = (empty_map(map_, map_.shape[2]) for map_ in (query, key, value))
    dbias = backward_into((dq, dk, dv), grad, query, key, value, patch_h, patch_w, bias, scale, need_bias)
    return dq, dk, dv, dbias


def backward_into(
    grads: Sequence[torch.Tensor],
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    patch_h: int,
    patch_w: int,
    bias: torch.Tensor | None,
    scale: float,
    need_bias: bool,
    packed: int = 1,
) -> torch.Tensor:
    """Write dquery, dkey, dvalue to ``grads`` and return dbias, as :func:`backward`.

    ``grads`` lie as their inputs do, dense; or, with ``packed`` 3, they are the thirds of one dense (B, H, W, 3C).
    """
    maps = (("q", query), ("k", key), ("v", value), ("g", grad))
    problem = _problem(maps, bias, (patch_h, patch_w))
    launches, uses_rows, slices = backward_launches(problem, need_bias, packed)
    # Pointers that are not read or written must be some: any tensor will do.
    tensors = dict(maps) | {"bias": query if bias is None else bias, "rows": query}
    tensors |= dict(zip(("dq", "dk", "dv"), grads))
    if uses_rows:
        batch, heads, _, height, width = query.shape
        shape = (batch, heads, triton_rows.ROWS.value, height, width)
        tensors["rows"] = query.new_empty(shape, dtype=torch.float32)
    if need_bias and bias is not None:
        tensors["dbias"] = bias.new_empty(bias.shape)
        tensors["partial"] = query.new_empty((slices, *bias.shape), dtype=torch.float32)
    else:
        tensors["dbias"] = query.new_empty((0,))
    _run(launches, tensors, {"scale": scale, "scale2": scale * _LOG2E})
    return tensors["dbias"]
