"""Multi-scale linear attention as torch operators and as an autograd Function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from mvkernels.dispatch import checks, flops, library
from mvkernels.dispatch.backend import prepare
from mvkernels.ops.multiscale_linear_attention.reference import multiscale_linear_attention as reference

_NAME = "multiscale_linear_attention"
Weights = Sequence[Tensor | None]


def flat(depthwise: Weights, pointwise: Weights, first: Weights | None, second: Weights | None) -> tuple[Any, ...]:
    """The weights one after the other: four for each scale, None for a bias that is not there; two where none is."""
    if first is None and second is None:
        return *depthwise, *pointwise
    none = (None,) * len(depthwise)
    return *depthwise, *pointwise, *(first or none), *(second or none)


def scales(weights: Weights) -> int:
    """Of how many scales :func:`flat` put the weights together: each has two of four axes, and biases have one."""
    return sum(w is not None and w.dim() == 4 for w in weights) // 2


def parts(weights: Weights) -> tuple[tuple[Any, ...], ...]:
    """What :func:`flat` was given, with a tuple for each."""
    n = scales(weights)
    some = (*weights, *(None,) * (4 * n - len(weights)))
    return tuple(some[i * n : (i + 1) * n] for i in range(4))


def call_reference(qkv: Tensor, weights: Weights, head_dim: int, eps: float) -> Tensor:
    depthwise, pointwise, first, second = parts(weights)
    return reference(qkv, depthwise, pointwise, head_dim, first, second, eps)


_INPUTS = "(Tensor qkv, Tensor[] weights, int head_dim, float eps)"
_FORWARD = _INPUTS + " -> (Tensor out, Tensor kv, Tensor keys)"
_BACKWARD = (
    "(Tensor grad, Tensor qkv, Tensor[] weights, Tensor kv, Tensor keys, int head_dim, float eps)"
    " -> (Tensor dqkv, Tensor[] dweights)"
)


def _fake_forward(qkv, weights, head_dim, eps):  # type: ignore[no-untyped-def]
    # Sums over pixels, for every head of every scale: of value times relu(key), and of relu(key).
    channels = qkv.shape[1] // 3 * (1 + scales(weights))
    shape = (qkv.shape[0], channels // head_dim, head_dim)
    dtype = torch.promote_types(qkv.dtype, torch.float32)
    return _empty(qkv, channels), qkv.new_empty((*shape, head_dim), dtype=dtype), qkv.new_empty(shape, dtype=dtype)


def _fake_backward(grad, qkv, weights, kv, keys, head_dim, eps):  # type: ignore[no-untyped-def]
    return _empty(qkv, qkv.shape[1]), [w.new_empty(w.shape) for w in weights]


def _empty(like: Tensor, channels: int) -> Tensor:
    """As :func:`checks.empty_map`, of a map (B, C, H, W)."""
    b, _, height, width = like.shape
    if like.stride(1) == 1:
        return like.new_empty((b, height, width, channels)).permute(0, 3, 1, 2)
    return like.new_empty((b, channels, height, width))


def _count(qkv: flops.Shape, weights: Sequence[flops.Shape], head_dim: int, *_: Any) -> int:
    kernels = _kernels(weights)
    pixels = qkv[0] * qkv[2] * qkv[3]
    convolutions = 2 * pixels * sum(map(prod, kernels))
    heads = qkv[1] // (3 * head_dim) * (1 + len(kernels) // 2)
    return convolutions + flops.linear_attention(heads, head_dim, pixels)


def _count_backward(qkv: flops.Shape, weights: Sequence[flops.Shape], head_dim: int, wanted: bool = True) -> int:
    kernels = _kernels(weights)
    attention = _count(qkv, [], head_dim) * (1 + len(kernels) // 2)
    return 2 * attention + sum(flops.convolution_backward(qkv, each, wanted) for each in kernels)


def _kernels(weights: Sequence[flops.Shape]) -> list[flops.Shape]:
    """Of the weights those that are of convolutions, two for each scale: the others are biases."""
    return [w for w in weights if len(w) == 4]


CPP = (
    library.define("cpp", "multiscale_linear_attention_forward", _FORWARD, _fake_forward, count=_count),
    library.define(
        "cpp",
        "multiscale_linear_attention_backward",
        _BACKWARD,
        _fake_backward,
        count=lambda grad, qkv, weights, kv, keys, head_dim, eps: _count_backward(qkv, weights, head_dim),
    ),
    library.define(
        "cpp", "multiscale_linear_attention", _INPUTS + " -> Tensor", library.output(_fake_forward), count=_count
    ),
)
"""Forward, backward, and the forward that leaves nothing for a backward."""


def _dense(qkv: Tensor, weights: Weights) -> list[Tensor]:
    """The weights as operators take them: where there are biases, one that is not there has no elements."""
    return [qkv.new_empty(0) if w is None else w for w in weights]


def _cpp_forward(qkv: Tensor, weights: Weights, head_dim: int, eps: float) -> tuple[Tensor, ...]:
    return CPP[0](qkv, _dense(qkv, weights), head_dim, eps)


def _cpp_inference(qkv: Tensor, weights: Weights, head_dim: int, eps: float) -> Tensor:
    return CPP[2](qkv, _dense(qkv, weights), head_dim, eps)


def _cpp_backward(
    grad: Tensor, qkv: Tensor, weights: Weights, saved: Any, head_dim: int, eps: float, wanted: bool
) -> Any:
    dqkv, dweights = CPP[1](grad, qkv, _dense(qkv, weights), *saved, head_dim, eps)
    return dqkv, *dweights


_LISTS = "Tensor[] depthwise, Tensor[] pointwise, int head_dim, Tensor?[] depthwise_bias, Tensor?[] pointwise_bias"
_FORWARD_GPU = f"(Tensor qkv, {_LISTS}, float eps) -> (Tensor out, Tensor sums)"
_BACKWARD_GPU = f"(Tensor grad, Tensor qkv, Tensor sums, {_LISTS}, float eps, bool weights) -> Tensor[]"


def _fake_forward_gpu(qkv, depthwise, pointwise, head_dim, depthwise_bias, pointwise_bias, eps):  # type: ignore[no-untyped-def]
    # For each scale, as relu_linear_attention's sums: a row of D for each of D channels of the key, and one more.
    scales, channels = 1 + len(depthwise), qkv.shape[1] // 3
    dtype = torch.promote_types(qkv.dtype, torch.float32)
    sums = qkv.new_empty((scales, qkv.shape[0], channels // head_dim, head_dim + 1, head_dim), dtype=dtype)
    return checks.empty_map(qkv, scales * channels), sums


def _fake_backward_gpu(grad, qkv, sums, depthwise, pointwise, head_dim, first, second, eps, weights):  # type: ignore[no-untyped-def]
    # Of what is not there, and of all weights where none is wanted, an empty tensor.
    given = flat(depthwise, pointwise, first, second)
    dweights = [qkv.new_empty(0) if w is None or not weights else qkv.new_empty(w.shape) for w in given]
    return [checks.empty_map(qkv, qkv.shape[1]), *dweights]


def launcher() -> Any:
    """The module that launches the Triton kernels, imported only here."""
    from mvkernels.ops.multiscale_linear_attention.triton import launcher

    return launcher


def _count_gpu(qkv, depthwise, pointwise, head_dim, *_):  # type: ignore[no-untyped-def]
    return _count(qkv, [*depthwise, *pointwise], head_dim)


def _count_backward_gpu(grad, qkv, sums, depthwise, pointwise, head_dim, first, second, eps, weights):  # type: ignore[no-untyped-def]
    return _count_backward(qkv, [*depthwise, *pointwise], head_dim, weights)


def cuda_launcher() -> Any:
    """The module that launches the convolutions in CUDA C++, imported only here."""
    from mvkernels.ops.multiscale_linear_attention.cuda import launcher

    return launcher


def _on_gpu(backend: str, launcher: Callable[[], Any]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    forward_of, backward_of = library.pair(
        backend, _NAME, (_FORWARD_GPU, _BACKWARD_GPU), (_fake_forward_gpu, _fake_backward_gpu),
        (_count_gpu, _count_backward_gpu), launcher,
    )  # fmt: skip

    def forward(qkv: Tensor, weights: Weights, head_dim: int, eps: float) -> tuple[Tensor, ...]:
        depthwise, pointwise, first, second = parts(weights)
        return forward_of(qkv, depthwise, pointwise, head_dim, first, second, eps)  # type: ignore[no-any-return]

    def backward(
        grad: Tensor, qkv: Tensor, weights: Weights, saved: Any, head_dim: int, eps: float, wanted: bool
    ) -> Any:
        depthwise, pointwise, first, second = parts(weights)
        return backward_of(grad, qkv, *saved, depthwise, pointwise, head_dim, first, second, eps, wanted)

    return forward, backward


KERNELS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "cpp": (_cpp_forward, _cpp_backward),
    "triton": _on_gpu("triton", launcher),
    "cuda": _on_gpu("cuda", cuda_launcher),
}
"""By backend: ``forward(qkv, weights, head_dim, eps) -> (out, *saved)`` and ``backward(grad, qkv, weights, saved,
head_dim, eps, wanted) -> (dqkv, *dweights)``, with the weights as :func:`flat` puts them; ``wanted``: whether any
gradient of theirs is."""
INFERENCE = {"cpp": _cpp_inference, **{each: library.output(KERNELS[each][0]) for each in ("triton", "cuda")}}
"""By backend: the forward of a call that records no gradient, and leaves nothing for a backward."""


class Flat(torch.autograd.Function):
    """What stands behind :class:`MultiscaleLinearAttentionFunction`: checked, and with tensors in no lists.

    ``apply(qkv, head_dim, eps, backend, kernel, *flat(weights))``, ``kernel`` the backend's forward.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, qkv: Tensor, head_dim: int, eps: float, backend: str, kernel: Any, *weights: Tensor | None
    ) -> Tensor:
        ctx.settings = head_dim, eps, backend
        if backend == "reference":
            ctx.save_for_backward(qkv, *weights)
            return call_reference(qkv, weights, head_dim, eps)
        out, *saved = kernel(qkv, weights, head_dim, eps)
        ctx.save_for_backward(qkv, *weights, *saved)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        *settings, backend = ctx.settings
        needs = ctx.needs_input_grad
        wanted = (needs[0], *needs[5:])
        kept = ctx.saved_tensors  # once: under torch.utils.checkpoint a second reading is an error
        inputs, saved = kept[: len(wanted)], kept[len(wanted) :]
        if backend == "reference":
            grads = library.differentiate(
                lambda qkv, *weights: call_reference(qkv, weights, *settings), grad, inputs, wanted
            )
        else:
            arguments = (grad, inputs[0], inputs[1:], saved, *settings, any(wanted[1:]))
            grads = library.gradients(_NAME, KERNELS[backend][1], arguments, inputs, wanted)
        return grads[0], None, None, None, None, *grads[1:]


class MultiscaleLinearAttentionFunction(Flat):
    """Autograd function of :func:`mvkernels.multiscale_linear_attention`, with a backward of its own.

    Call ``apply(qkv, depthwise, pointwise, head_dim, depthwise_bias, pointwise_bias, eps, backend)``. Shapes, dtypes,
    result and errors are those of the op; the arguments after ``head_dim`` may be left out. All tensors in the lists
    get gradients. Inside ``torch.compile`` call the op instead, because ``apply`` cannot take lists there. A second
    derivative raises RuntimeError unless the backend is "reference".
    """

    @classmethod
    def apply(  # type: ignore[override]
        cls,
        qkv: Tensor,
        depthwise: Sequence[Tensor],
        pointwise: Sequence[Tensor],
        head_dim: int,
        depthwise_bias: Weights | None = None,
        pointwise_bias: Weights | None = None,
        eps: float = 1e-15,
        backend: str | None = None,
    ) -> Tensor:
        given = (qkv, depthwise, pointwise, head_dim, depthwise_bias, pointwise_bias, eps)
        backend, arguments = prepare(_NAME, backend, *given)
        qkv, depthwise, pointwise, head_dim, depthwise_bias, pointwise_bias, eps = arguments
        weights = flat(depthwise, pointwise, depthwise_bias, pointwise_bias)
        kernel = None if backend == "reference" else KERNELS[backend][0]
        return Flat.apply(qkv, head_dim, eps, backend, kernel, *weights)
