"""MobileViT's transformer layer on a feature map: norm + qkv, attention + projection, norm + feed-forward."""

from __future__ import annotations

from collections.abc import Mapping
from operator import index
from typing import Any

import torch
from torch import Tensor

from mvkernels.cuda import choice
from mvkernels.dispatch import checks, library
from mvkernels.dispatch.backend import choose, requested
from mvkernels.dispatch.exporting import exporting, exports_operator
from mvkernels.dispatch.registry import Composed, Op, register
from mvkernels.ops.common import packed as weights
from mvkernels.ops.patch_transformer_layer import cpp, suite
from mvkernels.ops.patch_transformer_layer.autograd import (
    KERNELS,
    TENSORS,
    PatchTransformerLayerFunction,
    cuda_launcher,
    launcher,
)
from mvkernels.ops.patch_transformer_layer.composed import composed
from mvkernels.ops.patch_transformer_layer.reference import patch_transformer_layer as reference
from mvkernels.triton.problem import key_dtype, precision_of

__all__ = ["OP", "PatchTransformerLayerFunction", "pack_patch_transformer_layer", "patch_transformer_layer"]

_NAME = "patch_transformer_layer"
_PARAMETERS = (
    "norm1_weight", "norm1_bias", "qkv_weight", "qkv_bias", "proj_weight", "proj_bias", "norm2_weight", "norm2_bias",
    "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias",
)  # fmt: skip


def patch_transformer_layer(
    x: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor,
    norm2_weight: Tensor,
    norm2_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    heads: int,
    patch_size: int | tuple[int, int] = (2, 2),
    *,
    eps: float = 1e-5,
    scale: float | None = None,
    activation: str = "silu",
    packed: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """One pre-norm transformer layer of MobileViT on a feature map, given the layer's weights as tensors.

    A MobileViT block (arXiv 2110.02178, section 3.1) has one or more of these layers between its unfold and its
    fold. With the pixels as rows of C channels, a layer is::

        x = x + attention(norm1(x) @ qkv_weight.T + qkv_bias) @ proj_weight.T + proj_bias
        x = x + silu(norm2(x) @ fc1_weight.T + fc1_bias) @ fc2_weight.T + fc2_bias

    where ``attention`` is :func:`mvkernels.patch_attention`. No map is unfolded, and on a GPU the hidden activations
    of the feed-forward network are not stored. :func:`mvkernels.nn.patch_transformer_layer` does the same with modules
    in place of tensors. The C++ kernels have no backward: on a CPU a call that records a gradient is the reference's.

    Args:
        x: feature map (B, C, H, W), any strides. A channels-last map is read in place; others are copied once.
        norm1_weight, norm1_bias, norm2_weight, norm2_bias: (C,), parameters of the two LayerNorms.
        qkv_weight: (3C, C). Its rows are [q | k | v], and in each of the three the rows of a head are contiguous.
        qkv_bias: (3C,), or None.
        proj_weight, proj_bias: (C, C), (C,).
        fc1_weight, fc1_bias: (F, C), (F,).
        fc2_weight, fc2_bias: (C, F), (C,).
        heads: number of attention heads, a divisor of C.
        patch_size: an int or a pair (ph, pw), each at least 1. H and W need not be multiples of it.
        eps: epsilon of both LayerNorms.
        scale: factor of the attention scores, ``(C / heads) ** -0.5`` by default.
        activation: activation of the feed-forward network. Only "silu" is supported.
        packed: what :func:`pack_patch_transformer_layer` made of the same parameters, for the C++ backend, which packs
            them in every call otherwise.
        backend: "reference", "cpp", "triton" or "cuda". None takes the fastest one that can run this call (see
            :mod:`mvkernels.dispatch.backend`).

    Returns:
        Feature map (B, C, H, W) in the dtype of the inputs (float32, float16, bfloat16 or float64). The result is
        dense: channels-last if the stride of x over its channels is 1, else channels-first. Norms, softmax and sums
        are computed in float32 or higher.

    Raises:
        TypeError: an argument is not a dense floating-point tensor, or a setting has the wrong type.
        ValueError: shapes do not match, dtypes or devices differ, heads does not divide C, patch_size is less than 1,
            C, F, H or W is 0, or the activation is not "silu".
        BackendUnavailable: the backend that was asked for cannot run this call.
        RuntimeError: ``packed`` is of parameters of other sizes, or was packed under another instruction set. It is
            pointwise's, which is what the C++ kernels multiply by.
    """
    arguments = _check(
        x, norm1_weight, norm1_bias, qkv_weight, qkv_bias, proj_weight, proj_bias, norm2_weight, norm2_bias,
        fc1_weight, fc1_bias, fc2_weight, fc2_bias, heads, patch_size, eps, scale, activation, packed,
    )  # fmt: skip
    chosen = choose(OP, backend, arguments)
    tensors = arguments[:TENSORS]
    if chosen == "reference":
        compiling = torch.compiler.is_dynamo_compiling() and not exporting()
        if (compiling or exports_operator("patch_attention")) and requested(backend) == "auto":
            # The compiler fuses what is around attention, and takes minutes over the groups of the reference's. And an
            # export that keeps attention has it here.
            *first, eps, scale, activation, _ = arguments
            return checks.lay_as(composed(*first, eps=eps, scale=scale, activation=activation), tensors[0])
        return reference(*arguments)
    if chosen == "cpp":
        return cpp.forward(*arguments)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return PatchTransformerLayerFunction.apply(*arguments, chosen, True)
    _, (ph, pw), eps, scale, _, _ = arguments[TENSORS:]
    return KERNELS[chosen][0](*tensors, heads, ph, pw, eps, scale, False)[0]


def pack_patch_transformer_layer(
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor,
    norm2_weight: Tensor,
    norm2_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
) -> Tensor:
    """The parameters of :func:`mvkernels.patch_transformer_layer` as its C++ kernels read them, for ``packed``.

    It is a copy: pack again when a parameter has changed. What it holds is for this process only, since it depends on
    the processor's instruction set. The norms' weights and biases are folded into the others.

    Args:
        norm1_weight, ..., fc2_bias: as in :func:`mvkernels.patch_transformer_layer`, float32 on a CPU.

    Returns:
        A tensor of one axis, float32, without a gradient.

    Raises:
        TypeError, ValueError: as :func:`mvkernels.patch_transformer_layer`.
        BackendUnavailable: there is no C++ kernel for these parameters.
    """
    given = _tensors(
        _PARAMETERS, norm1_weight, norm1_bias, qkv_weight, qkv_bias, proj_weight, proj_bias, norm2_weight, norm2_bias,
        fc1_weight, fc1_bias, fc2_weight, fc2_bias,
    )  # fmt: skip
    checks.rank(_NAME, "qkv_weight", given["qkv_weight"], "(3C, C)")
    _check_shapes(given, given["qkv_weight"].shape[1])
    return weights.pack(_NAME, weights.why_not(given["qkv_weight"]), cpp.pack, *given.values())


def _tensors(names: tuple[str, ...], *values: Any) -> dict[str, Any]:
    """All of them by name, after autocast."""
    cast = dict(zip(names, checks.autocast(*values)))
    given = {name: value for name, value in cast.items() if value is not None or name != "qkv_bias"}
    if not checks.alike(*given.values()):
        checks.tensors(_NAME, **given)
    return cast


def _check(
    x: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor,
    norm2_weight: Tensor,
    norm2_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    heads: int,
    patch_size: Any = (2, 2),
    eps: float = 1e-5,
    scale: float | None = None,
    activation: str = "silu",
    packed: Tensor | None = None,
) -> tuple[Any, ...]:
    cast = _tensors(
        ("x", *_PARAMETERS), x, norm1_weight, norm1_bias, qkv_weight, qkv_bias, proj_weight, proj_bias, norm2_weight,
        norm2_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias,
    )  # fmt: skip
    patch = checks.pair(_NAME, "patch_size", patch_size)
    if not isinstance(heads, int) or isinstance(heads, bool):
        raise TypeError(f"{_NAME}: heads is {heads!r}, want an int")
    if activation != "silu":
        raise ValueError(f"{_NAME}: activation is {activation!r}, want 'silu'")
    x = cast["x"]
    checks.rank(_NAME, "x", x, "(B, C, H, W)")
    checks.not_empty(_NAME, "x", x, C=1, H=2, W=3)
    c = x.shape[1]
    if heads < 1 or c % heads:
        raise ValueError(f"{_NAME}: heads is {heads}, want a divisor of {c} channels")
    _check_shapes(cast, c)
    eps = checks.number(_NAME, "eps", eps, 1e-5)
    scale = checks.number(_NAME, "scale", scale, (c // heads) ** -0.5)
    if packed is not None:
        weights.check(_NAME, packed, x, cpp.packed_size(*[cast[name] for name in _PARAMETERS]))
    return (*cast.values(), index(heads), patch, eps, scale, activation, packed)


def _check_shapes(cast: Mapping[str, Any], c: int) -> None:
    """Of the parameters, for maps of ``c`` channels."""
    checks.rank(_NAME, "fc1_weight", cast["fc1_weight"], "(F, C)")
    f = cast["fc1_weight"].shape[0]
    for name, axis, size in (("qkv_weight", "C", c), ("fc1_weight", "F", f)):
        if size == 0:
            raise ValueError(f"{_NAME}: {name} is {checks.shape(cast[name])}: {axis} is 0, want at least 1")
    wanted = {
        "norm1_weight": ("(C)", (c,)), "norm1_bias": ("(C)", (c,)), "qkv_weight": ("(3C, C)", (3 * c, c)),
        "qkv_bias": ("(3C)", (3 * c,)), "proj_weight": ("(C, C)", (c, c)), "proj_bias": ("(C)", (c,)),
        "norm2_weight": ("(C)", (c,)), "norm2_bias": ("(C)", (c,)), "fc1_weight": ("(F, C)", (f, c)),
        "fc1_bias": ("(F)", (f,)), "fc2_weight": ("(C, F)", (c, f)), "fc2_bias": ("(C)", (c,)),
    }  # fmt: skip
    for name, (axes, size) in wanted.items():
        value = cast[name]
        if value is not None and value.shape != size:
            checks.rank(_NAME, name, value, axes)
            raise ValueError(f"{_NAME}: {name} is {checks.shape(value)}, want {axes} = {size}")


def _layer_key(arguments: Mapping[str, Any], grad: bool) -> Mapping[str, Any]:
    from mvkernels.ops.patch_transformer_layer.triton import plan

    hidden, patch = arguments["fc1_weight"].shape[0], arguments["patch_size"]
    return plan.layer_key(plan.problem_of(arguments["x"], hidden, arguments["heads"], patch), grad)


def _choice(arguments: tuple[Any, ...]) -> dict[str, Any]:
    x, heads, (ph, pw) = arguments[0], arguments[TENSORS], arguments[TENSORS + 1]
    return {
        "n": choice.tokens(-(-x.shape[2] // ph) * -(-x.shape[3] // pw)),
        "d": choice.channels(x.shape[1] // heads),
        "dtype": key_dtype(x.dtype, precision_of(x.dtype, x.device.type)),
    }


def _packed(arguments: Mapping[str, Any]) -> Tensor:
    return pack_patch_transformer_layer(*[arguments[name] for name in _PARAMETERS])


choice.register(_NAME)

OP = register(
    Op(
        name=_NAME,
        function=patch_transformer_layer,
        reference=reference,
        check=_check,
        maps=("x",),
        why_not={
            "cpp": cpp.why_not,
            "triton": library.why_not(launcher),
            "cuda": library.why_not(cuda_launcher, "the kernels around the attention are Triton's. "),
        },
        suite=suite.cases,
        peers=suite.PEERS,
        cost=suite.cost,
        forward_only=frozenset({"cpp"}),
        pack=_packed,
        composed=Composed(composed, "layer", _layer_key),
        choice=_choice,
    )
)
