"""The dense 3 x 3 convolution at inference, by Winograd's algorithm, with its activation and what is added to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mvkernels.dispatch import checks
from mvkernels.dispatch.backend import choose
from mvkernels.dispatch.registry import Op, register
from mvkernels.ops.common import activations
from mvkernels.ops.common import packed as weights
from mvkernels.ops.conv3x3 import operators, suite
from mvkernels.ops.conv3x3.reference import conv3x3 as reference

__all__ = ["OP", "conv3x3", "pack_conv3x3"]

_NAME = "conv3x3"


def conv3x3(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    beside: Tensor | None = None,
    stride: int = 1,
    packed: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """A dense 3 x 3 convolution padded by 1, its activation, and a map that is added, at inference.

    ``out = f(conv(x | beside) + bias) + residual``. With a stride of 1 and at least 16 channels on both sides it is
    Winograd's algorithm (arXiv 1509.09308): F(4 x 4, 3 x 3) where C is at least 96 and both sides of the map are at
    least 16, else F(2 x 2, 3 x 3). F(2 x 2) errs up to twice as much as the direct algorithm, F(4 x 4) about three
    times as much as F(2 x 2). By either, a NaN or an infinity reaches all pixels of the tiles, 2 x 2 or 4 x 4, whose
    inputs it is among. There is no backward: a call that records a gradient is the reference's.

    Args:
        x: feature map (B, C, H, W), any strides. A channels-last map, also a slice of the channels of a larger one, is
            read in place; others are copied once, but for those of the direct algorithm.
        weight: (C_out, C, 3, 3); with ``beside``, C is the sum of both maps' channels, those of x first.
        bias: (C_out,), or None.
        activation: "silu", "hardswish", "relu", "relu6", "gelu", "gelu_tanh" or None.
        residual: map of the result's size that is added after the activation, or None.
        beside: a second map (B, C2, H, W) whose channels follow those of x, in place of a concatenation, or None.
        stride: 1 or 2.
        packed: what :func:`pack_conv3x3` made of the same weight and bias for maps of this size, for the C++ backend,
            which packs them in every call otherwise.
        backend: "reference", "cpp", "triton" or "cuda". None takes the fastest one that can run this call (see
            :mod:`mvkernels.dispatch.backend`).

    Returns:
        Feature map (B, C_out, ceil(H / stride), ceil(W / stride)) in the dtype of the inputs (float32, float16,
        bfloat16 or float64), dense: channels-last if the stride of x over its channels is 1, else channels-first. Sums
        are computed in float32 or higher.

    Raises:
        TypeError: an argument is not a dense floating-point tensor, or a setting has the wrong type.
        ValueError: shapes do not match, dtypes or devices differ, C, C_out, H or W is 0, the stride is not 1 or 2, or
            the activation is unknown.
        BackendUnavailable: the backend that was asked for cannot run this call.
        RuntimeError: ``packed`` is of weights of other sizes, or was packed under another instruction set.
    """
    arguments = _check(x, weight, bias, activation, residual, beside, stride, packed)
    if choose(OP, backend, arguments) == "reference":
        return reference(*arguments)
    x, weight, bias, activation, residual, beside, stride, packed = arguments
    outputs, inputs = weight.shape[:2]
    tile = operators.tile_of(inputs, outputs, stride, *x.shape[-2:])
    if packed is None:
        packed = operators.pack(weight, bias, tile)
    settings = (outputs, tile, stride, activations.CODES[activation], residual)
    out: Tensor = operators.forward(x, beside, packed, *settings)
    return checks.lay_as(out, x)


def pack_conv3x3(
    weight: Tensor, bias: Tensor | None = None, *, size: tuple[int, int] = (16, 16), stride: int = 1
) -> Tensor:
    """The weights of :func:`mvkernels.conv3x3` as its C++ kernel reads them, for its argument ``packed``.

    It is a copy: pack again when a weight has changed. What it holds is for this process only, since it depends on the
    processor's instruction set.

    Args:
        weight, bias, stride: as in :func:`mvkernels.conv3x3`, float32 on a CPU.
        size: H and W of the maps, which decide on the algorithm where C is at least 96; all sizes from 16 on are packed
            alike, and all that have a smaller side.

    Returns:
        A tensor of one axis, float32, without a gradient.

    Raises:
        TypeError, ValueError: as :func:`mvkernels.conv3x3`.
        BackendUnavailable: there is no C++ kernel for these weights.
    """
    named: dict[str, Any] = {"weight": weight, **({} if bias is None else {"bias": bias})}
    named = dict(zip(named, checks.autocast(*named.values())))
    checks.tensors(_NAME, **named)
    weight, bias = named["weight"], named.get("bias")
    outputs, inputs = _shapes(weight, bias)
    stride, (height, width) = checks.stride(_NAME, stride), checks.pair(_NAME, "size", size)
    tile = operators.tile_of(inputs, outputs, stride, height, width)
    return weights.pack(_NAME, weights.why_not(weight), operators.pack, weight, bias, tile)


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: Any = None,
    residual: Tensor | None = None,
    beside: Tensor | None = None,
    stride: Any = 1,
    packed: Tensor | None = None,
) -> tuple[Any, ...]:
    optional = {"bias": bias, "residual": residual, "beside": beside}
    named: dict[str, Any] = {"x": x, "weight": weight, **{n: t for n, t in optional.items() if t is not None}}
    named = dict(zip(named, checks.autocast(*named.values())))
    if not checks.alike(*named.values()):
        checks.tensors(_NAME, **named)
    x, weight = named["x"], named["weight"]
    bias, residual, beside = (named.get(n) for n in optional)
    stride = checks.stride(_NAME, stride)
    activations.check(_NAME, activation)
    checks.rank(_NAME, "x", x, "(B, C, H, W)")
    checks.not_empty(_NAME, "x", x, C=1, H=2, W=3)
    outputs, inputs = _shapes(weight, bias)
    channels = x.shape[1]
    if beside is not None:
        checks.rank(_NAME, "beside", beside, "(B, C2, H, W)")
        checks.same(_NAME, "beside", beside, "x", x, (0, 2, 3))
        checks.not_empty(_NAME, "beside", beside, C2=1)
        channels += beside.shape[1]
    if channels != inputs:
        raise ValueError(f"{_NAME}: the maps have {channels} channels, the weight is for {inputs}")
    if packed is not None:
        tile = operators.tile_of(inputs, outputs, stride, *x.shape[-2:])
        weights.check(_NAME, packed, x, operators.packed_size(weight, tile))
    if residual is not None:
        b, _, height, width = x.shape
        wanted = (b, outputs, (height - 1) // stride + 1, (width - 1) // stride + 1)
        checks.exactly(_NAME, "residual", residual, "(B, C_out, H_out, W_out)", wanted)
    return x, weight, bias, activation, residual, beside, stride, packed


def _shapes(weight: Tensor, bias: Tensor | None) -> tuple[int, int]:
    """C_out and C of the weight."""
    checks.rank(_NAME, "weight", weight, "(C_out, C, 3, 3)")
    outputs, inputs, *taps = weight.shape
    if taps != [3, 3] or 0 in (outputs, inputs):
        raise ValueError(
            f"{_NAME}: weight is {checks.shape(weight)}, want (C_out, C, 3, 3) with channels of at least 1"
        )
    if bias is not None and bias.shape != (outputs,):
        checks.rank(_NAME, "bias", bias, "(C_out)")
        raise ValueError(f"{_NAME}: bias is {checks.shape(bias)}, want (C_out) = ({outputs},)")
    return outputs, inputs


def _why_not_cpp(x: Tensor, weight: Tensor, *rest: Any) -> str | None:
    return weights.why_not_recorded(x, weight, *rest) or weights.why_not(weight)


def _packed(arguments: Mapping[str, Any]) -> Tensor:
    size, stride = tuple(arguments["x"].shape[-2:]), arguments.get("stride", 1)
    return pack_conv3x3(arguments["weight"], arguments.get("bias"), size=size, stride=stride)


OP = register(
    Op(
        name=_NAME,
        function=conv3x3,
        reference=reference,
        check=_check,
        maps=("x", "residual", "beside"),
        why_not={"cpp": _why_not_cpp},
        suite=suite.cases,
        peers=suite.PEERS,
        cost=suite.cost,
        forward_only=frozenset({"cpp"}),
        pack=_packed,
    )
)
