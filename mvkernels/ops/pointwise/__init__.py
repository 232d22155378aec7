"""The 1 x 1 convolution, or linear layer, at inference: LayerNorm, product, activation and residual in one kernel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mvkernels.dispatch import checks
from mvkernels.dispatch.backend import choose
from mvkernels.dispatch.registry import Op, register
from mvkernels.ops.common import activations
from mvkernels.ops.common import packed as weights
from mvkernels.ops.pointwise import suite
from mvkernels.ops.pointwise.operators import forward, pack, packed_size
from mvkernels.ops.pointwise.reference import Norm
from mvkernels.ops.pointwise.reference import pointwise as reference

__all__ = ["OP", "forward", "pack", "pack_pointwise", "packed_size", "pointwise"]

_NAME = "pointwise"


def pointwise(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: Norm | None = None,
    eps: float = 1e-5,
    activation: str | None = None,
    residual: Tensor | None = None,
    packed: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """A 1 x 1 convolution, or a linear layer of every pixel, with what stands around it in transformers, at inference.

    ``out = f(W norm(x) + bias) + residual``, with a LayerNorm over the channels. There is no backward: a call that
    records a gradient is the reference's. Tokens (B, N, C) are the map ``tokens.transpose(1, 2).unsqueeze(2)``.

    Args:
        x: feature map (B, C, H, W), any strides. A channels-last map, also a slice of the channels of a larger one, is
            read in place; others are copied once.
        weight: (C_out, C) or (C_out, C, 1, 1).
        bias: (C_out,), or None.
        norm: (weight, bias) of the LayerNorm, each (C,) or None; or None if there is no norm.
        eps: epsilon of the norm.
        activation: "silu", "hardswish", "relu", "relu6", "gelu", "gelu_tanh" or None.
        residual: map (B, C_out, H, W) that is added after the activation, or None.
        packed: what :func:`pack_pointwise` made of the same weight, bias and norm, for the C++ backend, which packs
            them in every call otherwise.
        backend: "reference", "cpp", "triton" or "cuda". None takes the fastest one that can run this call (see
            :mod:`mvkernels.dispatch.backend`).

    Returns:
        Feature map (B, C_out, H, W) in the dtype of the inputs (float32, float16, bfloat16 or float64), dense:
        channels-last if the stride of x over its channels is 1, else channels-first. Sums are computed in float32 or
        higher.

    Raises:
        TypeError: an argument is not a dense floating-point tensor, or a setting has the wrong type.
        ValueError: shapes do not match, dtypes or devices differ, C, C_out, H or W is 0, or the activation is unknown.
        BackendUnavailable: the backend that was asked for cannot run this call.
        RuntimeError: ``packed`` is of weights of other sizes, or was packed under another instruction set.
    """
    arguments = _check(x, weight, bias, norm, eps, activation, residual, packed)
    if choose(OP, backend, arguments) == "reference":
        return reference(*arguments)
    x, weight, bias, norm, eps, activation, residual, packed = arguments
    if packed is None:
        packed = pack(*_of_pack(weight, bias, norm))
    settings = (weight.shape[0], norm is not None, eps, activations.CODES[activation])
    out: Tensor = forward(x, packed, *settings, residual)
    return checks.lay_as(out, x)


def pack_pointwise(weight: Tensor, bias: Tensor | None = None, *, norm: Norm | None = None) -> Tensor:
    """The weights of :func:`mvkernels.pointwise` as its C++ kernel reads them, for its argument ``packed``.

    It is a copy: pack again when a weight has changed. What it holds is for this process only, since it depends on the
    processor's instruction set. The norm's weight and bias are folded into the others.

    Args:
        weight, bias, norm: as in :func:`mvkernels.pointwise`, float32 on a CPU.

    Returns:
        A tensor of one axis, float32, without a gradient.

    Raises:
        TypeError, ValueError: as :func:`mvkernels.pointwise`.
        BackendUnavailable: there is no C++ kernel for these weights.
    """
    _, weight, bias, norm, _ = _tensors(None, weight, bias, norm, None)
    _shapes(weight, bias, norm)
    return weights.pack(_NAME, weights.why_not(weight), pack, *_of_pack(weight, bias, norm))


def _of_pack(weight: Tensor, bias: Tensor | None, norm: Norm | None) -> tuple[Any, ...]:
    """The arguments of the operator that packs."""
    return weight, bias, norm is not None, *(norm or (None, None))


def _tensors(x: Any, weight: Any, bias: Any, norm: Any, residual: Any) -> tuple[Any, ...]:
    """All of them after autocast; x may be missing."""
    if norm is not None and not isinstance(norm, (tuple, list)):
        raise TypeError(f"{_NAME}: norm is a {type(norm).__name__}, want a pair (weight, bias)")
    if norm is not None and len(norm) != 2:
        raise ValueError(f"{_NAME}: norm has {len(norm)} parts, want (weight, bias)")
    factor, shift = norm or (None, None)
    given = {"x": x, "weight": weight, "bias": bias, "norm[0]": factor, "norm[1]": shift, "residual": residual}
    wanted = {"weight"} if x is None else {"x", "weight"}
    given = {name: value for name, value in given.items() if value is not None or name in wanted}
    cast = dict(zip(given, checks.autocast(*given.values())))
    if not checks.alike(*cast.values()):
        checks.tensors(_NAME, **cast)
    pair = None if norm is None else (cast.get("norm[0]"), cast.get("norm[1]"))
    return cast.get("x"), cast["weight"], cast.get("bias"), pair, cast.get("residual")


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm: Any = None,
    eps: float = 1e-5,
    activation: Any = None,
    residual: Tensor | None = None,
    packed: Tensor | None = None,
) -> tuple[Any, ...]:
    if x is None:
        raise TypeError(f"{_NAME}: x is a NoneType, want a torch.Tensor")
    x, weight, bias, norm, residual = _tensors(x, weight, bias, norm, residual)
    eps = checks.number(_NAME, "eps", eps, 1e-5)
    activations.check(_NAME, activation)
    checks.rank(_NAME, "x", x, "(B, C, H, W)")
    checks.not_empty(_NAME, "x", x, C=1, H=2, W=3)
    outputs, inputs = _shapes(weight, bias, norm)
    if x.shape[1] != inputs:
        raise ValueError(f"{_NAME}: x has {x.shape[1]} channels, the weight is for {inputs}")
    if packed is not None:
        weights.check(_NAME, packed, x, packed_size(weight))
    if residual is not None:
        checks.exactly(_NAME, "residual", residual, "(B, C_out, H, W)", (x.shape[0], outputs, *x.shape[2:]))
    return x, weight, bias, norm, eps, activation, residual, packed


def _shapes(weight: Tensor, bias: Tensor | None, norm: Norm | None) -> tuple[int, int]:
    """C_out and C of the weight."""
    if weight.dim() != 4:
        checks.rank(_NAME, "weight", weight, "(C_out, C)")
    outputs, inputs, *taps = weight.shape
    if any(tap != 1 for tap in taps) or 0 in (outputs, inputs):  # Dynamo of torch 2.10 compares no lists here
        raise ValueError(f"{_NAME}: weight is {checks.shape(weight)}, want (C_out, C) with channels of at least 1")
    named = {"bias": (bias, outputs), "norm[0]": (norm and norm[0], inputs), "norm[1]": (norm and norm[1], inputs)}
    for name, (value, size) in named.items():
        if value is not None:
            checks.exactly(_NAME, name, value, "(C)", (size,))
    return outputs, inputs


def _why_not_cpp(x: Tensor, weight: Tensor, *rest: Any) -> str | None:
    norm = rest[1] or ()
    return weights.why_not_recorded(x, weight, *rest, *norm) or weights.why_not(weight)


def _packed(arguments: Mapping[str, Any]) -> Tensor:
    return pack_pointwise(arguments["weight"], arguments.get("bias"), norm=arguments.get("norm"))


OP = register(
    Op(
        name=_NAME,
        function=pointwise,
        reference=reference,
        check=_check,
        maps=("x", "residual"),
        why_not={"cpp": _why_not_cpp},
        suite=suite.cases,
        peers=suite.PEERS,
        cost=suite.cost,
        forward_only=frozenset({"cpp"}),
        pack=_packed,
    )
)
