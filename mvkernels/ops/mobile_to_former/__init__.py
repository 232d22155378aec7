"""Mobile to Former: a few tokens attend to a feature map, which is both key and value (Mobile-Former)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mvkernels.dispatch import checks, extension, library
from mvkernels.dispatch.backend import REFUSED, choose, direct
from mvkernels.dispatch.registry import Op, register
from mvkernels.ops.mobile_to_former import suite
from mvkernels.ops.mobile_to_former.autograd import KERNELS, MobileToFormerFunction, launcher
from mvkernels.ops.mobile_to_former.reference import mobile_to_former as reference

__all__ = ["OP", "MobileToFormerFunction", "mobile_to_former"]

_NAME = "mobile_to_former"


def mobile_to_former(query: Tensor, x: Tensor, *, scale: float | None = None, backend: str | None = None) -> Tensor:
    """Softmax attention of a few tokens over all pixels of a feature map, which is both key and value.

    For token m and all pixels p::

        out_m = sum_p softmax_p(scale * query_m . x_p) x_p

    This is the Mobile-to-Former bridge (Mobile-Former, arXiv 2108.05895, section 3.1, equation 1), between the
    projection of the tokens and the projection of the result. The map is read once, and the scores are not stored.

    Args:
        query: projected tokens (B, heads, M, head_dim), any strides.
        x: feature map (B, heads, head_dim, H, W), any strides, of the same dtype and device.
        scale: factor of the scores, ``head_dim ** -0.5`` by default.
        backend: "reference", "cpp", "triton" or "cuda". None takes the fastest one that can run this call (see
            :mod:`mvkernels.dispatch.backend`).

    Returns:
        Tokens (B, heads, M, head_dim), contiguous, in the dtype of the inputs (float32, float16, bfloat16 or float64).
        Softmax and sums are computed in float32 or higher.

    Raises:
        TypeError: an argument is not a dense floating-point tensor, or scale is not a number.
        ValueError: shapes do not match, dtypes or devices differ, or heads, M, head_dim, H or W is 0.
        BackendUnavailable: the backend that was asked for cannot run this call.
    """
    recording = direct(backend, query, x)
    if recording is not None and (scale is None or type(scale) is float):
        try:
            factor = x.shape[2] ** -0.5 if scale is None else scale
            return _record(query, x, factor, "cpp", _keep) if recording else _infer(query, x, factor)
        except REFUSED:  # the checks say why
            pass
    arguments = _check(query, x, scale)
    chosen = choose(OP, backend, arguments)
    if chosen == "reference":
        return reference(*arguments)
    query, x, scale = arguments
    if torch.is_grad_enabled() and (query.requires_grad or x.requires_grad):
        return MobileToFormerFunction.apply(query, x, scale, chosen, KERNELS[chosen][0])
    return KERNELS[chosen][0](query, x, scale)


_infer = _keep = library.at_once(KERNELS["cpp"][0])
_record = library.recorder(MobileToFormerFunction)


def _check(query: Tensor, x: Tensor, scale: float | None = None) -> tuple[Any, ...]:
    query, x = checks.autocast(query, x)  # type: ignore[assignment]
    if not checks.alike(query, x):
        checks.tensors(_NAME, query=query, x=x)
    # Sizes are unpacked, not sliced: slicing a torch.Size costs as much as all of the other checks.
    tokens, sizes = tuple(query.shape), tuple(x.shape)
    if len(tokens) != 4 or len(sizes) != 5:
        _check_shapes(query, x)
    batch, heads, count, dim = tokens
    if (batch, heads, dim) != sizes[:3] or not (heads and count and dim and sizes[3] and sizes[4]):
        _check_shapes(query, x)
    return query, x, checks.number(_NAME, "scale", scale, dim**-0.5)


def _check_shapes(query: Tensor, x: Tensor) -> None:
    checks.rank(_NAME, "query", query, "(B, heads, M, head_dim)")
    checks.rank(_NAME, "x", x, "(B, heads, head_dim, H, W)")
    checks.same(_NAME, "query", query, "x", x, (0, 1))
    if query.shape[3] != x.shape[2]:
        raise ValueError(f"{_NAME}: query is {checks.shape(query)}, x is {checks.shape(x)}: they differ in head_dim")
    checks.not_empty(_NAME, "query", query, heads=1, M=2, head_dim=3)
    checks.not_empty(_NAME, "x", x, H=3, W=4)


def _why_not_cpp(query: Tensor, *_: Any) -> str | None:
    return extension.why_not(query, head_dim=query.shape[3])


why_not_triton = library.why_not(launcher)

OP = register(
    Op(
        name=_NAME,
        function=mobile_to_former,
        reference=reference,
        check=_check,
        maps=("x",),
        why_not={"cpp": _why_not_cpp, "triton": why_not_triton},
        suite=suite.cases,
        peers=suite.PEERS,
        cost=suite.cost,
        third_party=suite.THIRD_PARTY,
    )
)
