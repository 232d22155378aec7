"""Former to Mobile: every pixel of a feature map attends to a few tokens; the result is added to the map."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mvkernels.dispatch import checks, extension, library
from mvkernels.dispatch.backend import REFUSED, choose, direct
from mvkernels.dispatch.registry import Op, register
from mvkernels.ops.former_to_mobile import suite
from mvkernels.ops.former_to_mobile.autograd import KERNELS, FormerToMobileFunction, launcher
from mvkernels.ops.former_to_mobile.reference import former_to_mobile as reference

__all__ = ["OP", "FormerToMobileFunction", "former_to_mobile"]

_NAME = "former_to_mobile"


def former_to_mobile(
    x: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None = None,
    residual: bool = True,
    backend: str | None = None,
) -> Tensor:
    """Softmax attention of every pixel of a feature map over a few tokens, added to the map.

    For pixel p and all tokens m::

        out_p = x_p + sum_m softmax_m(scale * x_p . key_m) value_m

    This is the Former-to-Mobile bridge (Mobile-Former, arXiv 2108.05895, section 3.1, equation 2) and the residual sum
    that follows it. The map is read once and written once; the scores are not stored.

    Args:
        x: feature map (B, heads, head_dim, H, W), any strides.
        key, value: projected tokens (B, heads, M, head_dim), any strides, of the same dtype and device.
        scale: factor of the scores, ``head_dim ** -0.5`` by default.
        residual: True for ``x + attention``, False for the attention alone.
        backend: "reference", "cpp", "triton" or "cuda". None takes the fastest one that can run this call (see
            :mod:`mvkernels.dispatch.backend`).

    Returns:
        Feature map (B, heads, head_dim, H, W) in the dtype of the inputs (float32, float16, bfloat16 or float64). The
        result is dense: channels-last if the stride of x over head_dim is 1, else channels-first. Softmax and sums are
        computed in float32 or higher.

    Raises:
        TypeError: an argument is not a dense floating-point tensor, scale is not a number, or residual is not a bool.
        ValueError: shapes do not match, dtypes or devices differ, or heads, M, head_dim, H or W is 0.
        BackendUnavailable: the backend that was asked for cannot run this call.
    """
    recording = direct(backend, x, key, value)
    if recording is not None and (scale is None or type(scale) is float) and type(residual) is bool:
        try:
            factor = x.shape[2] ** -0.5 if scale is None else scale
            if recording:
                return _record(x, key, value, factor, residual, "cpp", _keep)
            return _infer(x, key, value, factor, residual)
        except REFUSED:  # the checks say why
            pass
    arguments = _check(x, key, value, scale, residual)
    chosen = choose(OP, backend, arguments)
    if chosen == "reference":
        return reference(*arguments)
    x, key, value, scale, residual = arguments
    if torch.is_grad_enabled() and (x.requires_grad or key.requires_grad or value.requires_grad):
        return FormerToMobileFunction.apply(x, key, value, scale, residual, chosen, KERNELS[chosen][0])
    return KERNELS[chosen][0](x, key, value, scale, residual)


_infer = _keep = library.at_once(KERNELS["cpp"][0])
_record = library.recorder(FormerToMobileFunction)


def _check(x: Tensor, key: Tensor, value: Tensor, scale: float | None = None, residual: bool = True) -> tuple[Any, ...]:
    x, key, value = checks.autocast(x, key, value)  # type: ignore[assignment]
    if not checks.alike(x, key, value):
        checks.tensors(_NAME, x=x, key=key, value=value)
    # Sizes are unpacked, not sliced: slicing a torch.Size costs as much as all of the other checks.
    sizes, tokens = tuple(x.shape), tuple(key.shape)
    if len(sizes) != 5 or len(tokens) != 4 or value.shape != tokens:
        _check_shapes(x, key, value)
    batch, heads, count, dim = tokens
    if (batch, heads, dim) != sizes[:3] or not (heads and count and dim and sizes[3] and sizes[4]):
        _check_shapes(x, key, value)
    if not isinstance(residual, bool):
        raise TypeError(f"{_NAME}: residual is {residual!r}, want True or False")
    return x, key, value, checks.number(_NAME, "scale", scale, dim**-0.5), residual


def _check_shapes(x: Tensor, key: Tensor, value: Tensor) -> None:
    checks.rank(_NAME, "x", x, "(B, heads, head_dim, H, W)")
    for name, tokens in (("key", key), ("value", value)):
        checks.rank(_NAME, name, tokens, "(B, heads, M, head_dim)")
        checks.same(_NAME, name, tokens, "x", x, (0, 1))
        if tokens.shape[3] != x.shape[2]:
            found = f"{name} is {checks.shape(tokens)}, x is {checks.shape(x)}"
            raise ValueError(f"{_NAME}: {found}: they differ in head_dim")
    checks.same(_NAME, "value", value, "key", key, (2,))
    checks.not_empty(_NAME, "key", key, heads=1, M=2, head_dim=3)
    checks.not_empty(_NAME, "x", x, H=3, W=4)


def _why_not_cpp(x: Tensor, *_: Any) -> str | None:
    return extension.why_not(x, head_dim=x.shape[2])


why_not_triton = library.why_not(launcher)

OP = register(
    Op(
        name=_NAME,
        function=former_to_mobile,
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
