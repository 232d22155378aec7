"""Patch attention: unfold, self-attention and fold in one kernel (MobileViT, EfficientFormer, CoAtNet)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mvkernels.cuda import choice
from mvkernels.dispatch import checks, library
from mvkernels.dispatch.backend import REFUSED, choose, direct
from mvkernels.dispatch.registry import Op, register
from mvkernels.ops.common.grouped import check, choice_key, why_not_cpp
from mvkernels.ops.patch_attention import suite
from mvkernels.ops.patch_attention.autograd import KERNELS, PatchAttentionFunction, cuda_launcher, launcher
from mvkernels.ops.patch_attention.reference import patch_attention as reference
from mvkernels.ops.patch_attention.third_party import THIRD_PARTY

__all__ = ["KERNELS", "OP", "PatchAttentionFunction", "backward_into", "patch_attention", "why_not_triton"]

_NAME = "patch_attention"


def patch_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    patch_size: int | tuple[int, int] = (2, 2),
    *,
    bias: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Softmax self-attention between the pixels that have the same position in their patch.

    The map is divided into patches of ph x pw pixels. Pixel (y, x) belongs to group (y % ph, x % pw), and attention
    runs inside each group::

        out_i = sum_j softmax_j(scale * q_i . k_j + bias_ij) v_j

    This is the unfold, attention, fold of MobileViT (arXiv 2110.02178, section 3.1), without the two copies: the
    kernel reads and writes the map in place. With patch_size 1 it is global attention over the map, or from one map to
    another: LeViT's downsampling (arXiv 2104.01136, section 4.2) and MobileNetV4's keys and values of fewer pixels
    (arXiv 2404.10518, section 3.2). With patch_size (H / gh, W / gw) it is MaxViT's grid attention with a grid of
    gh x gw (arXiv 2204.01697, section 3.2).

    Args:
        query, key: feature maps (B, heads, head_dim, H, W), any strides: slices of a packed qkv and maps expanded over
            the heads are read in place.
        value: feature map (B, heads, value_dim, H, W), any strides, of the same dtype and device. With patch_size 1,
            and only then, the key and value maps may have another H and W than the query map.
        patch_size: an int or a pair (ph, pw), each at least 1. H and W need not be multiples of it: the groups then
            differ in size, and nothing is padded.
        bias: (heads, N, N), added to the scaled scores; the same for the whole batch and for all groups. N is the
            number of pixels in a group, so patch_size must divide H and W. For a key map of M pixels the bias is
            (heads, N, M). The bias gets a gradient.
        scale: factor of the scores, ``head_dim ** -0.5`` by default.
        backend: "reference", "cpp", "triton" or "cuda". None takes the fastest one that can run this call (see
            :mod:`mvkernels.dispatch.backend`).

    Returns:
        Feature map (B, heads, value_dim, H, W) in the dtype of the inputs (float32, float16, bfloat16 or float64). The
        result is dense: channels-last if the stride of the query over head_dim is 1, else channels-first. Softmax and
        sums are computed in float32 or higher.

    Raises:
        TypeError: an argument is not a dense floating-point tensor, or a setting has the wrong type.
        ValueError: shapes do not match, dtypes or devices differ, heads, head_dim, value_dim, H or W is 0, patch_size
            is less than 1, there is a bias and patch_size does not divide H and W, or maps are unequal and patch_size
            is not 1.
        BackendUnavailable: the backend that was asked for cannot run this call.
    """
    recording = direct(backend, query, key, value, bias)
    if recording is not None and (scale is None or type(scale) is float):
        try:
            ph, pw = patch_size if type(patch_size) is tuple else (patch_size, patch_size)
            if type(ph) is int is type(pw):
                factor = query.shape[2] ** -0.5 if scale is None else scale
                if recording:
                    return _record(query, key, value, (ph, pw), bias, factor, "cpp", _keep)
                return _infer(query, key, value, ph, pw, bias, factor)
        except REFUSED:  # the checks say why
            pass
    arguments = _check(query, key, value, patch_size, bias, scale)
    chosen = choose(OP, backend, arguments)
    if chosen == "reference":
        return reference(*arguments)
    query, key, value, (ph, pw), bias, scale = arguments
    if torch.is_grad_enabled() and (
        query.requires_grad or key.requires_grad or value.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return PatchAttentionFunction.apply(query, key, value, (ph, pw), bias, scale, chosen, KERNELS[chosen][0])
    return KERNELS[chosen][0](query, key, value, ph, pw, bias, scale)


_infer = _keep = library.at_once(KERNELS["cpp"][0])
_record = library.recorder(PatchAttentionFunction)


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    patch_size: Any = (2, 2),
    bias: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Any, ...]:
    ph, pw = checks.pair(_NAME, "patch_size", patch_size)
    unequal = ph == pw == 1
    why = "" if unequal else f"another H x W needs patch_size 1, but patch_size is ({ph}, {pw})"
    query, key, value, bias = check(_NAME, query, key, value, bias, unequal=unequal, why_equal=why)
    if bias is not None:
        (h, _, height, width), partners = query.shape[1:], key.shape[3:]
        if height % ph or width % pw:
            raise ValueError(
                f"{_NAME}: bias needs equal groups, but patch_size ({ph}, {pw}) does not divide {height} x {width}"
            )
        n, m = (high // ph * (wide // pw) for high, wide in ((height, width), partners))
        if bias.shape[0] != h or bias.shape[1] != n or bias.shape[2] != m:
            axes = "(heads, N, N)" if n == m else "(heads, N, M)"
            raise ValueError(f"{_NAME}: bias is {checks.shape(bias)}, want {axes} = ({h}, {n}, {m})")
    scale = checks.number(_NAME, "scale", scale, query.shape[2] ** -0.5)
    return query, key, value, (ph, pw), bias, scale


def backward_into(backend: str, *arguments: Any, packed: int = 1) -> Tensor:
    """The backward on Triton or in CUDA C++ for other ops: see the launchers' ``backward_into``."""
    dbias: Tensor
    if backend == "cuda":  # these kernels take the strides of each gradient
        dbias = cuda_launcher().backward_into(*arguments)
    else:
        dbias = launcher().backward_into(*arguments, packed=packed)
    return dbias


why_not_triton = library.why_not(launcher)


def _choice(arguments: tuple[Any, ...]) -> dict[str, Any]:
    query, key, value, (ph, pw), bias, _ = arguments
    tokens = max(-(-high // ph) * -(-wide // pw) for high, wide in (query.shape[3:], key.shape[3:]))
    return choice_key(query, value, bias, tokens)


choice.register(_NAME)
OP = register(
    Op(
        name=_NAME,
        function=patch_attention,
        reference=reference,
        check=_check,
        maps=("query", "key", "value"),
        why_not={"cpp": why_not_cpp, "triton": why_not_triton, "cuda": library.why_not(cuda_launcher)},
        suite=suite.cases,
        peers=suite.PEERS,
        cost=suite.cost,
        third_party=THIRD_PARTY,
        choice=_choice,
    )
)
