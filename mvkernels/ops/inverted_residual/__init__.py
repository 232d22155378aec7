"""The inverted residual of MobileNetV2 at inference: expansion, depthwise convolution and projection in one kernel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mvkernels.dispatch import checks, library
from mvkernels.dispatch.backend import choose, requested
from mvkernels.dispatch.registry import Composed, Op, register
from mvkernels.ops.common import activations
from mvkernels.ops.common import packed as weights
from mvkernels.ops.inverted_residual import operators, suite
from mvkernels.ops.inverted_residual.composed import composed
from mvkernels.ops.inverted_residual.reference import Weights
from mvkernels.ops.inverted_residual.reference import inverted_residual as reference

__all__ = ["OP", "inverted_residual", "pack_inverted_residual"]

_NAME = "inverted_residual"
_KERNELS = (3, 5)


def inverted_residual(
    x: Tensor,
    expand: Weights | None,
    depthwise: Weights,
    project: Weights,
    *,
    stride: int = 1,
    activation: str | None = "silu",
    residual: bool = False,
    packed: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """A 1 x 1 convolution to more channels, a depthwise one of them and a 1 x 1 convolution to few, at inference.

    The block of MobileNetV2 (arXiv 1801.04381, section 3.3), with its norms folded into the convolutions::

        hidden = f(depthwise(f(expand(x))))
        out = project(hidden)  (+ x)

    The hidden map, several times as large as x, does not go through memory: on a CPU it stays in the processor's cache,
    on a GPU in the second-level cache. There is no backward: a call that records a gradient is the reference's.

    Args:
        x: feature map (B, C, H, W), any strides. A channels-last map, also a slice of the channels of a larger one, is
            read in place; others are copied once on a CPU, and read in place on a GPU.
        expand: (weight, bias) of the expansion, (C_hidden, C, 1, 1) and (C_hidden,) or None; or None where the
            depthwise convolution is the first one.
        depthwise: weight (C_hidden, 1, k, k) with an odd k, and bias (C_hidden,) or None. Its padding is k // 2.
        project: weight (C_out, C_hidden, 1, 1) and bias (C_out,) or None.
        stride: of the depthwise convolution, 1 or 2.
        activation: "silu", "hardswish", "relu", "relu6", "gelu", "gelu_tanh" or None, after the first two convolutions.
        residual: whether x is added to the result: for a stride of 1, and C_out = C.
        packed: what :func:`pack_inverted_residual` made of the same weights, for the C++ backend, which packs them in
            every call otherwise.
        backend: "reference", "cpp", "triton" or "cuda". None takes the fastest one that can run this call (see
            :mod:`mvkernels.dispatch.backend`); on a GPU where the kernel is not expected to be faster, PyTorch's
            convolutions in the dtype of x.

    Returns:
        Feature map (B, C_out, ceil(H / stride), ceil(W / stride)) in the dtype of the inputs (float32, float16,
        bfloat16 or float64), dense: channels-last if the stride of x over its channels is 1, else channels-first. Sums
        are computed in float32 or higher.

    Raises:
        TypeError: an argument is not a dense floating-point tensor, or a setting has the wrong type.
        ValueError: shapes do not match, dtypes or devices differ, C, H or W is 0, the kernel is even, the stride is
            not 1 or 2, the activation is unknown, or the residual does not fit.
        BackendUnavailable: the backend that was asked for cannot run this call.
        RuntimeError: ``packed`` is of weights of other sizes, or was packed under another instruction set.
    """
    arguments = _check(x, expand, depthwise, project, stride, activation, residual, packed)
    chosen = choose(OP, backend, arguments)
    if chosen == "reference":
        return reference(*arguments)
    x, expand, depthwise, project, stride, activation, residual, packed = arguments
    if chosen == "triton":
        if requested(backend) == "auto" and (torch.compiler.is_compiling() or not _faster(*arguments[:-1])):
            return composed(*arguments)
        tensors = (*(expand or (None, None)), *depthwise, *project)
        found: Tensor = operators.forward_triton(x, *tensors, stride, activations.CODES[activation], residual)
        return found
    if packed is None:
        packed = operators.pack(*(expand or (None, None)), *depthwise, *project)
    hidden, kernel = depthwise[0].shape[0], depthwise[0].shape[-1]
    settings = (expand is not None, stride, activations.CODES[activation], residual)
    out: Tensor = operators.forward(x, packed, hidden, project[0].shape[0], kernel, *settings)
    return checks.lay_as(out, x)


def pack_inverted_residual(expand: Weights | None, depthwise: Weights, project: Weights) -> Tensor:
    """The weights of :func:`mvkernels.inverted_residual` as its C++ kernel reads them, for its argument ``packed``.

    It is a copy: pack again when a weight has changed. What it holds is for this process only, since it depends on the
    processor's instruction set.

    Args:
        expand, depthwise, project: as in :func:`mvkernels.inverted_residual`, float32 on a CPU.

    Returns:
        A tensor of one axis, float32, without a gradient.

    Raises:
        TypeError, ValueError: as :func:`mvkernels.inverted_residual`.
        BackendUnavailable: there is no C++ kernel for these weights.
    """
    expand, depthwise, project = _tensors({}, expand, depthwise, project)
    _shapes(expand, depthwise, project)
    reason = _why_not_packed(expand, depthwise, project)
    return weights.pack(_NAME, reason, operators.pack, *(expand or (None, None)), *depthwise, *project)


def _check(
    x: Tensor,
    expand: Any,
    depthwise: Any,
    project: Any,
    stride: Any = 1,
    activation: Any = "silu",
    residual: Any = False,
    packed: Tensor | None = None,
) -> tuple[Any, ...]:
    x, expand, depthwise, project = _tensors({"x": x}, expand, depthwise, project)
    stride = checks.stride(_NAME, stride)
    if not isinstance(residual, bool):
        raise TypeError(f"{_NAME}: residual is {residual!r}, want a bool")
    activations.check(_NAME, activation)
    checks.rank(_NAME, "x", x, "(B, C, H, W)")
    checks.not_empty(_NAME, "x", x, C=1, H=2, W=3)
    inputs, outputs = _shapes(expand, depthwise, project)
    if x.shape[1] != inputs:
        raise ValueError(f"{_NAME}: x has {x.shape[1]} channels, its first weight is for {inputs}")
    if residual and (stride != 1 or inputs != outputs):
        found = f"stride is {stride} and channels go from {inputs} to {outputs}"
        raise ValueError(f"{_NAME}: a residual needs a stride of 1 and as many channels as before, but {found}")
    if packed is not None:
        size = operators.packed_size(expand and expand[0], depthwise[0], project[0])
        weights.check(_NAME, packed, x, size)
    return x, expand, depthwise, project, stride, activation, residual, packed


def _tensors(maps: dict[str, Any], expand: Any, depthwise: Any, project: Any) -> tuple[Any, ...]:
    """All of them after autocast."""
    named = dict(maps)
    pairs = {"expand": expand, "depthwise": depthwise, "project": project}
    for name, pair in pairs.items():
        if pair is None and name == "expand":
            continue
        if not isinstance(pair, (tuple, list)):
            raise TypeError(f"{_NAME}: {name} is a {type(pair).__name__}, want a pair (weight, bias)")
        if len(pair) != 2:
            raise ValueError(f"{_NAME}: {name} has {len(pair)} parts, want (weight, bias)")
        named |= {f"{name}[{i}]": part for i, part in enumerate(pair) if i == 0 or part is not None}
    cast = dict(zip(named, checks.autocast(*named.values())))
    if not checks.alike(*cast.values()):
        checks.tensors(_NAME, **cast)
    found = [None if pair is None else (cast[f"{n}[0]"], cast.get(f"{n}[1]")) for n, pair in pairs.items()]
    return (*(cast[name] for name in maps), *found)


def _shapes(expand: Weights | None, depthwise: Weights, project: Weights) -> tuple[int, int]:
    """Channels before and after the block whose weights these are."""
    for name, pair in (("expand", expand), ("depthwise", depthwise), ("project", project)):
        if pair is not None:
            checks.rank(_NAME, f"{name}[0]", pair[0], "(C_out, C_in, k, k)")
    hidden, _, kernel, _ = depthwise[0].shape
    outputs = project[0].shape[0]
    inputs = hidden if expand is None else expand[0].shape[1]
    if kernel % 2 == 0 or 0 in (hidden, inputs, outputs):
        raise ValueError(
            f"{_NAME}: depthwise[0] is {checks.shape(depthwise[0])}, project[0] {checks.shape(project[0])}, "
            "want an odd kernel and no channels of 0"
        )
    wanted = {
        "expand": (expand, (hidden, inputs, 1, 1)),
        "depthwise": (depthwise, (hidden, 1, kernel, kernel)),
        "project": (project, (outputs, hidden, 1, 1)),
    }
    for name, (pair, shape) in wanted.items():
        for i, (part, size) in enumerate(zip(pair or (), (shape, shape[:1]))):
            if part is not None and part.shape != size:
                raise ValueError(f"{_NAME}: {name}[{i}] is {checks.shape(part)}, want {size}")
    return inputs, outputs


def _why_not_packed(expand: Weights | None, depthwise: Weights, project: Weights) -> str | None:
    weight = depthwise[0]
    reason = weights.why_not(weight)
    if not reason and weight.shape[-1] not in _KERNELS:
        reason = f"the depthwise kernel is {weight.shape[-1]}, want 3 or 5"
    return reason


def _why_not_cpp(x: Tensor, expand: Weights | None, depthwise: Weights, project: Weights, *rest: Any) -> str | None:
    reason = weights.why_not_recorded(x, *(expand or ()), *depthwise, *project, *rest)
    return reason or _why_not_packed(expand, depthwise, project)


def _faster(*arguments: Any) -> bool:
    """Whether the Triton kernel is: measured, or else predicted."""
    launcher = operators.launcher()
    found: bool = launcher.faster(launcher.problem_of(*arguments))
    return found


def _block_key(arguments: Mapping[str, Any], grad: bool) -> Mapping[str, Any]:
    launcher = operators.launcher()
    names = ("x", "expand", "depthwise", "project", "stride", "activation", "residual")
    key: Mapping[str, Any] = launcher.block_key(launcher.problem_of(*(arguments[name] for name in names)))
    return key


def _packed(arguments: Mapping[str, Any]) -> Tensor:
    return pack_inverted_residual(*(arguments[name] for name in ("expand", "depthwise", "project")))


OP = register(
    Op(
        name=_NAME,
        function=inverted_residual,
        reference=reference,
        check=_check,
        maps=("x",),
        why_not={"cpp": _why_not_cpp, "triton": library.why_not(operators.launcher)},
        suite=suite.cases,
        peers=suite.PEERS,
        cost=suite.cost,
        forward_only=frozenset({"cpp", "triton"}),
        pack=_packed,
        composed=Composed(composed, "block", _block_key),
    )
)
