"""Softmax attention inside groups of pixels, in CUDA C++: groups of up to 256 tokens, heads of 16 to 64 channels.

An op's own launcher gives its arguments as these: ``group``, the size of patches, or with ``shift`` of windows.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping, Sequence

import torch

from mvkernels.cuda import modules
from mvkernels.cuda.attention import plan
from mvkernels.cuda.attention.backward_plan import backward_launches
from mvkernels.cuda.attention.forward_plan import forward_launches
from mvkernels.cuda.launch import Launch
from mvkernels.dispatch.checks import empty_map
from mvkernels.dispatch.launches import run
from mvkernels.triton.attention.problem import AttentionProblem
from mvkernels.triton.maps import INT32
from mvkernels.triton.problem import LOG2E

Pair = tuple[int, int]


def why_not(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    group: Pair,
    shift: Pair | None,
    bias: torch.Tensor | None,
) -> str | None:
    """Why these kernels cannot run on maps, or None. Takes the op's checked arguments; never raises."""
    if reason := modules.why_not(query):
        return reason
    device = query.device
    shape = tuple(query.shape)
    if tuple(key.shape[3:]) != shape[3:]:
        return "key and value maps of another size than the query map"
    arch = modules.arch_of(device.index)
    reason = plan.why_not(shape, value.shape[2], query.dtype, group, shift, bias is None, arch)
    for map_ in (query, key, value):
        if reason is None and plan.spans_too_far(map_.shape, map_.stride()):
            reason = "a head of an image spans 2**31 elements"
    if reason is None and bias is not None and max(bias.shape[1:]) * max(bias.stride()[1:]) * 2 >= INT32:
        reason = "a head's bias spans 2**31 elements"
    return reason


def _positive(scale: float) -> bool:
    # And so that float32 has room for it and for its multiples.
    return 1e-30 < scale < 1e38


def _run(
    launches: Sequence[Launch],
    shapes: Mapping[str, Sequence[int]],
    tensors: dict[str, torch.Tensor],
    bias: torch.Tensor | None,
    scale: float,
) -> None:
    # Of what is not there the pointer is not read: any tensor will do.
    query = tensors["q"]
    tensors = {"bias": query if bias is None else bias, "ordered": query, "partial": query} | tensors
    for name, shape in shapes.items():
        tensors[name] = query.new_empty(shape, dtype=torch.float32 if name == "partial" else query.dtype)
    # Kernels that are given no scale2 multiply scores by the scale first, as the reference does; what float32 has no
    # room for is infinite there, too.
    scales = {"scale": ctypes.c_float(scale).value, "scale2": scale * LOG2E if _positive(scale) else 0.0}
    run(launches, tensors, scales)


def _aligned(maps: Sequence[tuple[str, torch.Tensor]]) -> int:
    return math.gcd(16, *(map_.data_ptr() for _, map_ in maps))


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
    """query, key (B, h, D, H, W), value (B, h, Dv, H, W), bias (h, N, N) or None -> out (B, h, Dv, H, W).

    out is in query's dtype, dense in query's order. Inputs are read in place, whatever their strides.
    """
    out = empty_map(query, value.shape[2])
    if out.numel() == 0:
        return out
    maps = (("q", query), ("k", key), ("v", value), ("o", out))
    problem = AttentionProblem.of_call(op, maps, bias, group, shift, False)
    launches, shapes = forward_launches(problem, _positive(scale), _aligned(maps))
    _run(launches, shapes, dict(maps), bias, scale)
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

    grad (B, h, Dv, H, W) with any strides; dbias is (h, N, N), contiguous, in bias's dtype, or an empty (0,)
    without ``need_bias``. No atomics: the same bits in every run.
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
) -> torch.Tensor:
    """Write dquery, dkey, dvalue to ``grads``, whatever their strides, and return dbias, as :func:`backward`."""
    need_bias = need_bias and bias is not None
    dbias = query.new_empty(bias.shape if need_bias and bias is not None else (0,))
    if query.numel() == 0:
        return dbias.zero_()
    if plan.spans_too_far(grad.shape, grad.stride()):
        grad = grad.contiguous()
    maps = (("q", query), ("k", key), ("v", value), ("g", grad), *zip(("dq", "dk", "dv"), grads))
    problem = AttentionProblem.of_call(op, maps, bias, group, shift, False)
    launches, shapes = backward_launches(problem, need_bias, _positive(scale), _aligned(maps))
    _run(launches, shapes, dict(maps) | {"dbias": dbias}, bias, scale)
    return dbias
