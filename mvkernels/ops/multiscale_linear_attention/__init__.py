"""Multi-scale linear attention: the part of LiteMLA between its two projections (EfficientViT, DC-AE)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mvkernels.cuda import choice
from mvkernels.dispatch import checks, extension, library
from mvkernels.dispatch.backend import REFUSED, choose, direct
from mvkernels.dispatch.registry import Op, register
from mvkernels.ops.multiscale_linear_attention import suite
from mvkernels.ops.multiscale_linear_attention.autograd import (
    CPP,
    INFERENCE,
    KERNELS,
    Flat,
    MultiscaleLinearAttentionFunction,
    cuda_launcher,
    flat,
    launcher,
)
from mvkernels.ops.multiscale_linear_attention.reference import multiscale_linear_attention as reference
from mvkernels.ops.multiscale_linear_attention.third_party import THIRD_PARTY
from mvkernels.triton.problem import key_dtype, precision_of

__all__ = ["OP", "MultiscaleLinearAttentionFunction", "multiscale_linear_attention"]

_NAME = "multiscale_linear_attention"
_LISTS = (list, tuple)


def multiscale_linear_attention(
    qkv: Tensor,
    depthwise: Sequence[Tensor],
    pointwise: Sequence[Tensor],
    *,
    head_dim: int,
    depthwise_bias: Sequence[Tensor | None] | None = None,
    pointwise_bias: Sequence[Tensor | None] | None = None,
    eps: float = 1e-15,
    backend: str | None = None,
) -> Tensor:
    """ReLU linear attention at several scales: on the heads of qkv and on those of convolved copies of qkv.

    This is the part of LiteMLA (EfficientViT from MIT, arXiv 2205.14756, section 3.1) between its two 1 x 1
    projections. Each further scale is qkv after a depthwise k x k convolution (zero padding, no activation) and a
    pointwise convolution with 3 * heads groups, where heads = C / head_dim. The heads of all scales, those of qkv
    first, go through :func:`mvkernels.relu_linear_attention`. With empty lists only the heads of qkv do.

    Args:
        qkv: feature map (B, 3C, H, W), any strides. Each head has 3 * head_dim channels in the order [q | k | v].
        depthwise: for each scale, a convolution weight (3C, 1, k, k) with odd k. k may differ between scales.
        pointwise: for each scale, a convolution weight (3C, head_dim, 1, 1).
        head_dim: number of channels of q, of k and of v in each head.
        depthwise_bias, pointwise_bias: for each scale, a (3C,) tensor or None. None means no biases at all.
        eps: added to the divisor. Models differ: timm uses 1e-5, the other implementations use 1e-15.
        backend: "reference", "cpp", "triton" or "cuda". None takes the fastest one that can run this call (see
            :mod:`mvkernels.dispatch.backend`).

    Returns:
        Feature map (B, (1 + scales) * C, H, W) in the dtype of the inputs (float32, float16, bfloat16 or float64). The
        result is dense: channels-last if the stride of qkv over its channels is 1, else channels-first. Sums and
        division are computed in float32 or higher.

    Raises:
        TypeError: an argument is not a dense floating-point tensor or a list of such tensors, or a setting has the
            wrong type.
        ValueError: shapes do not match, dtypes or devices differ, lists differ in length, the channels of qkv are not
            a multiple of 3 * head_dim, k is even, or H or W is 0.
        BackendUnavailable: the backend that was asked for cannot run this call.
    """
    if (
        type(eps) is float
        and type(head_dim) is int
        and _without_biases(depthwise, pointwise, depthwise_bias, pointwise_bias)
    ):
        recording = direct(backend, qkv, *depthwise, *pointwise)
        if recording is not None:
            try:
                if recording:
                    return _record(qkv, head_dim, eps, "cpp", _keep, *depthwise, *pointwise)
                return _infer(qkv, (*depthwise, *pointwise), head_dim, eps)
            except REFUSED:  # the checks say why
                pass
    arguments = _check(qkv, depthwise, pointwise, head_dim, depthwise_bias, pointwise_bias, eps)
    chosen = choose(OP, backend, arguments)
    if chosen == "reference":
        return reference(*arguments)
    qkv, depthwise, pointwise, head_dim, depthwise_bias, pointwise_bias, eps = arguments
    weights = flat(depthwise, pointwise, depthwise_bias, pointwise_bias)
    if torch.is_grad_enabled() and (qkv.requires_grad or any(w is not None and w.requires_grad for w in weights)):
        return Flat.apply(qkv, head_dim, eps, chosen, KERNELS[chosen][0], *weights)
    return INFERENCE[chosen](qkv, weights, head_dim, eps)


_infer, _keep = library.at_once(CPP[2]), library.at_once(CPP[0])
_record = library.recorder(Flat)


def _without_biases(depthwise: Any, pointwise: Any, *biases: Any) -> bool:
    """Whether these are lists or tuples of one length, and there is nothing in those of biases, or they are None."""
    if type(depthwise) not in _LISTS or type(pointwise) not in _LISTS or len(depthwise) != len(pointwise):
        return False
    for some in biases:
        if some is not None:
            if type(some) not in _LISTS or len(some) != len(depthwise):
                return False
            for each in some:
                if each is not None:
                    return False
    return True


def _check(
    qkv: Tensor,
    depthwise: Sequence[Tensor],
    pointwise: Sequence[Tensor],
    head_dim: int,
    depthwise_bias: Sequence[Tensor | None] | None = None,
    pointwise_bias: Sequence[Tensor | None] | None = None,
    eps: float = 1e-15,
) -> tuple[Any, ...]:
    lists: dict[str, Sequence[Any]] = {"depthwise": depthwise, "pointwise": pointwise}
    biases = {"depthwise_bias": depthwise_bias, "pointwise_bias": pointwise_bias}
    lists |= {name: value for name, value in biases.items() if value is not None}
    named: dict[str, Any] = {"qkv": qkv}
    for name, value in lists.items():
        checks.sequence(_NAME, name, value)
        if len(value) != len(depthwise):
            raise ValueError(
                f"{_NAME}: {name} has {len(value)} entries, depthwise has {len(depthwise)}, want one for each scale"
            )
        named |= {f"{name}[{i}]": each for i, each in enumerate(value) if each is not None or name not in biases}
    cast: dict[str, Any] = dict(zip(named, checks.autocast(*named.values())))
    if not checks.alike(*cast.values()):
        checks.tensors(_NAME, **cast)
    if not isinstance(head_dim, int) or isinstance(head_dim, bool):
        raise TypeError(f"{_NAME}: head_dim is {head_dim!r}, want an int")
    qkv = cast["qkv"]
    checks.rank(_NAME, "qkv", qkv, "(B, 3C, H, W)")
    channels = qkv.shape[1]
    if head_dim < 1 or channels == 0 or channels % (3 * head_dim):
        raise ValueError(
            f"{_NAME}: head_dim is {head_dim}, qkv is {checks.shape(qkv)}: want channels in multiples of 3 * head_dim"
        )
    checks.not_empty(_NAME, "qkv", qkv, H=2, W=3)
    for i in range(len(depthwise)):
        wide = cast[f"depthwise[{i}]"]
        k = wide.shape[-1] if wide.dim() == 4 else 0
        if wide.shape != (channels, 1, k, k) or k % 2 == 0:
            raise ValueError(
                f"{_NAME}: depthwise[{i}] is {checks.shape(wide)}, want (3C, 1, k, k) = ({channels}, 1, k, k), k odd"
            )
        _check_shape(f"pointwise[{i}]", cast, (channels, head_dim, 1, 1), "(3C, head_dim, 1, 1)")
        _check_shape(f"depthwise_bias[{i}]", cast, (channels,), "(3C,)")
        _check_shape(f"pointwise_bias[{i}]", cast, (channels,), "(3C,)")
    found: dict[str, Any] = {name: tuple(cast.get(f"{name}[{i}]") for i in range(len(depthwise))) for name in lists}
    for name in biases:  # no bias at all is said in one way
        if all(each is None for each in found.get(name, ())):
            found[name] = None
    return (
        qkv, found["depthwise"], found["pointwise"], head_dim, found["depthwise_bias"], found["pointwise_bias"],
        checks.number(_NAME, "eps", eps, 1e-15),
    )  # fmt: skip


def _check_shape(name: str, cast: dict[str, Tensor], wanted: tuple[int, ...], axes: str) -> None:
    if name in cast and cast[name].shape != wanted:
        raise ValueError(f"{_NAME}: {name} is {checks.shape(cast[name])}, want {axes} = {wanted}")


def _why_not_cpp(qkv: Tensor, depthwise: Any, pointwise: Any, head_dim: int, *_: Any) -> str | None:
    return extension.why_not(qkv, head_dim=head_dim)


def _choice(arguments: tuple[Any, ...]) -> dict[str, Any]:
    qkv, depthwise, _, head_dim, *_ = arguments
    return {
        "d": choice.channels(head_dim),
        "k": choice.side(depthwise[0].shape[-1] if depthwise else 0),
        "n": choice.tokens(qkv.shape[2] * qkv.shape[3]),
        "dtype": key_dtype(qkv.dtype, precision_of(qkv.dtype, qkv.device.type)),
        "last": int(qkv.stride(1) == 1),
    }


choice.register(_NAME)
why_not_triton = library.why_not(launcher)

OP = register(
    Op(
        name=_NAME,
        function=multiscale_linear_attention,
        reference=reference,
        check=_check,
        maps=("qkv",),
        why_not={"cpp": _why_not_cpp, "triton": why_not_triton, "cuda": library.why_not(cuda_launcher)},
        suite=suite.cases,
        peers=suite.PEERS,
        cost=suite.cost,
        third_party=THIRD_PARTY,
        choice=_choice,
    )
)
