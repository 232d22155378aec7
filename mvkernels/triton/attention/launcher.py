"""Softmax attention inside groups of pixels on Triton: which kernel runs a call, and with what.

| tokens of the largest group | forward | backward |
| --- | --- | --- |
| up to 32 | ``forward_packed``: several units a program | ``backward_packed`` |
| up to 64 | ``forward_rows``, the score row whole | ``backward_unit``: one program a unit, one tile |
| up to 256 | the same | ``backward_blocks``, both phases in one program |
| more (and float32, and wide heads) | ``forward_rows``, running maximum | ``backward_blocks``, a launch per phase |

Between maps of unequal sizes the larger number counts. A bias's gradient is a sum of parts (``sum_slices``), which
``backward_unit`` makes itself and for the others ``bias_partials``. Everything that follows from shapes, strides and
dtype alone is a :class:`~mvkernels.triton.launch.Launch`, made once and cached: a call costs a look-up, its allocations
and the launches. The static audit compiles the very same Launches.

An op's own launcher gives its arguments as these: ``group``, the size of patches, or with ``shift`` of windows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mvkernels.dispatch.checks import empty_map
from mvkernels.dispatch.launches import run
from mvkernels.triton.attention import row_kernels
from mvkernels.triton.attention.plan import AttentionProblem, backward_launches, forward_launches
from mvkernels.triton.launch import INTERPRETED, parts, why_not_triton, why_too_large
from mvkernels.triton.maps import INT32
from mvkernels.triton.problem import LOG2E

Pair = tuple[int, int]

_MOST = dict.fromkeys(("float32", "float16", "bfloat16", "tf32"), 256)


def why_not(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None) -> str | None:
    """Why these kernels cannot run on maps, or None. Takes the op's checked arguments; never raises."""
    batch, heads, d, height, width = query.shape
    widest = max(d, value.shape[2])
    reason = why_not_triton(query, widest, _MOST)
    for high, wide in ((height, width), tuple(key.shape[3:])):
        reason = reason or why_too_large(wide, heads * widest, high * wide)
        if reason is None and batch * heads * high * wide >= INT32:
            reason = "batch * heads * pixels passes 2**31"
    if reason is None and bias is not None and max(bias.shape[1:]) * max(map(abs, bias.stride()[1:])) * 2 >= INT32:
        reason = "a head's bias spans 2**31 elements"
    return reason


def forward(
    op: str,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    group: Pair,
    shift: Pair | None,
    bias: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """query, key (B, h, D, H, W), value (B, h, Dv, H, W), bias (h, N, M) or None -> out (B, h, Dv, H, W).

    out is in query's dtype, dense in query's order. Inputs are read in place, whatever their strides.
    """
    maps = (("q", query), ("k", key), ("v", value))
    problem = AttentionProblem.of_call(op, maps, bias, group, shift, INTERPRETED)
    out = empty_map(query, value.shape[2])
    # Without a bias its pointer is not read; any tensor will do.
    tensors = {"q": query, "k": key, "v": value, "o": out, "bias": out if bias is None else bias}
    run(forward_launches(problem), tensors, {"scale2": scale * LOG2E})
    return out


def backward(
    op: str,
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    group: Pair,
    shift: Pair | None,
    bias: torch.Tensor | None,
    scale: float,
    need_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dquery, dkey, dvalue, dbias), each dense in the order of its own input.

    grad (B, h, Dv, H, W) with any strides; dbias is (h, N, M), contiguous,
    in bias's dtype, or an empty (0,) without ``need_bias``. No atomics: the same bits in every run.
    """
    dq, dk, dv = (empty_map(map_, map_.shape[2]) for map_ in (query, key, value))
    dbias = backward_into(op, (dq, dk, dv), grad, query, key, value, group, shift, bias, scale, need_bias)
    return dq, dk, dv, dbias


def backward_into(
    op: str,
    grads: Sequence[torch.Tensor],
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    group: Pair,
    shift: Pair | None,
    bias: torch.Tensor | None,
    scale: float,
    need_bias: bool,
    packed: int = 1,
) -> torch.Tensor:
    """Write dquery, dkey, dvalue to ``grads`` and return dbias, as :func:`backward`.

    ``grads`` lie as their inputs do, dense; or, with ``packed`` 3, they are the thirds of one dense (B, H, W, 3C).
    """
    maps = (("q", query), ("k", key), ("v", value), ("g", grad))
    problem = AttentionProblem.of_call(op, maps, bias, group, shift, INTERPRETED)
    launches, uses_rows, slices = backward_launches(problem, need_bias, packed)
    # Pointers that are not read or written must be some: any tensor will do.
    tensors = dict(maps) | {"bias": query if bias is None else bias, "rows": query}
    tensors |= dict(zip(("dq", "dk", "dv"), grads))
    if uses_rows:
        batch, heads, _, height, width = query.shape
        shape = (batch, heads, row_kernels.ROWS.value, height, width)
        tensors["rows"] = query.new_empty(shape, dtype=torch.float32)
    if need_bias and bias is not None:
        tensors["dbias"] = bias.new_empty(bias.shape)
        tensors["partial"] = parts(slices, query, bias.shape)
    else:
        tensors["dbias"] = query.new_empty((0,))
    run(launches, tensors, {"scale": scale, "scale2": scale * LOG2E})
    return tensors["dbias"]
