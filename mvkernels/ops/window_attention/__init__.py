"""Window attention: partition, attention and reverse, with roll and mask, in one kernel (Swin, MaxViT, TinyViT)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mvkernels.cuda import choice
from mvkernels.dispatch import checks, library
from mvkernels.dispatch.backend import REFUSED, choose, direct
from mvkernels.dispatch.registry import Op, register
from mvkernels.ops.common.grouped import check, choice_key, why_not_cpp
from mvkernels.ops.window_attention import suite
from mvkernels.ops.window_attention.autograd import KERNELS, WindowAttentionFunction, cuda_launcher, launcher
from mvkernels.ops.window_attention.reference import window_attention as reference
from mvkernels.ops.window_attention.third_party import THIRD_PARTY

__all__ = ["KERNELS", "OP", "WindowAttentionFunction", "window_attention"]

_NAME = "window_attention"


def window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window_size: int | tuple[int, int],
    *,
    shift: int | tuple[int, int] = (0, 0),
    bias: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Softmax self-attention inside the windows of a map.

    Windows are rectangles of wh x ww pixels whose corners lie at (shift_y + i * wh, shift_x + j * ww) for all integers
    i and j, clipped to the map. Attention runs inside each::

        out_i = sum_j softmax_j(scale * q_i . k_j + bias_ij) v_j

    Where the window divides the map, Swin's shifted windows are this with ``shift=shift_size`` (arXiv 2103.14030,
    section 3.2): neither roll nor mask, no padding, no partition and no reverse, since the kernel reads and writes the
    map in place. Swin's mask adds -100 to scores that should not count; here they do not count at all.

    Args:
        query, key: feature maps (B, heads, head_dim, H, W), any strides.
        value: feature map (B, heads, value_dim, H, W), any strides, of the same dtype and device.
        window_size: an int or a pair (wh, ww), each at least 1. It need not divide the map, nor fit into it: windows
            are then clipped, and nothing is padded.
        shift: an int or a pair (shift_y, shift_x), 0 <= shift < window_size.
        bias: (heads, N, N) with N = wh * ww, added to the scaled scores; the same for the whole batch and for all
            windows. Pixel (y, x) of the window with the corner (y0, x0), before clipping, has the index
            (y - y0) * ww + x - x0. The bias gets a gradient.
        scale: factor of the scores, ``head_dim ** -0.5`` by default.
        backend: "reference", "cpp", "triton" or "cuda". None takes the fastest one that can run this call (see
            :mod:`mvkernels.dispatch.backend`).

    Returns:
        Feature map (B, heads, value_dim, H, W) in the dtype of the inputs (float32, float16, bfloat16 or float64). The
        result is dense: channels-last if the stride of the query over head_dim is 1, else channels-first. Softmax and
        sums are computed in float32 or higher.

    Raises:
        TypeError: an argument is not a dense floating-point tensor, or a setting has the wrong type.
        ValueError: shapes do not match, dtypes or devices differ, heads, head_dim, value_dim, H or W is 0, window_size
            is less than 1, or shift is not in [0, window_size).
        BackendUnavailable: the backend that was asked for cannot run this call.
    """
    recording = direct(backend, query, key, value, bias)
    if recording is not None and (scale is None or type(scale) is float):
        try:
            wh, ww = window_size if type(window_size) is tuple else (window_size, window_size)
            sy, sx = shift if type(shift) is tuple else (shift, shift)
            if type(wh) is int is type(ww) and type(sy) is int is type(sx):
                factor = query.shape[2] ** -0.5 if scale is None else scale
                if recording:
                    return _record(query, key, value, (wh, ww), (sy, sx), bias, factor, "cpp", _keep)
                return _infer(query, key, value, wh, ww, sy, sx, bias, factor)
        except REFUSED:  # the checks say why
            pass
    arguments = _check(query, key, value, window_size, shift, bias, scale)
    chosen = choose(OP, backend, arguments)
    if chosen == "reference":
        return reference(*arguments)
    query, key, value, (wh, ww), (sy, sx), bias, scale = arguments
    if torch.is_grad_enabled() and (
        query.requires_grad or key.requires_grad or value.requires_grad or (bias is not None and bias.requires_grad)
    ):
        kernel = KERNELS[chosen][0]
        return WindowAttentionFunction.apply(query, key, value, (wh, ww), (sy, sx), bias, scale, chosen, kernel)
    return KERNELS[chosen][0](query, key, value, wh, ww, sy, sx, bias, scale)


_infer = _keep = library.at_once(KERNELS["cpp"][0])
_record = library.recorder(WindowAttentionFunction)


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window_size: Any,
    shift: Any = (0, 0),
    bias: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Any, ...]:
    wh, ww = checks.pair(_NAME, "window_size", window_size, most=None)
    sy, sx = checks.pair(_NAME, "shift", shift, least=0, most=None)
    if sy >= wh or sx >= ww:
        raise ValueError(f"{_NAME}: shift is {shift!r}, want less than window_size ({wh}, {ww})")
    query, key, value, bias = check(_NAME, query, key, value, bias)
    if bias is not None and bias.shape != (query.shape[1], wh * ww, wh * ww):
        wanted = f"want (heads, N, N) = ({query.shape[1]}, {wh * ww}, {wh * ww})"
        raise ValueError(f"{_NAME}: bias is {checks.shape(bias)}, {wanted}")
    # No map is so large: what is less stays less.
    wh, ww, sy, sx = (*(min(n, checks.LARGEST) for n in (wh, ww)), *(min(n, checks.LARGEST - 1) for n in (sy, sx)))
    scale = checks.number(_NAME, "scale", scale, query.shape[2] ** -0.5)
    return query, key, value, (wh, ww), (sy, sx), bias, scale


def _choice(arguments: tuple[Any, ...]) -> dict[str, Any]:
    query, _, value, (wh, ww), _, bias, _ = arguments
    tokens = min(wh, query.shape[3]) * min(ww, query.shape[4])
    return choice_key(query, value, bias, tokens)


choice.register(_NAME)
OP = register(
    Op(
        name=_NAME,
        function=window_attention,
        reference=reference,
        check=_check,
        maps=("query", "key", "value"),
        why_not={"cpp": why_not_cpp, "triton": library.why_not(launcher), "cuda": library.why_not(cuda_launcher)},
        suite=suite.cases,
        peers=suite.PEERS,
        cost=suite.cost,
        third_party=THIRD_PARTY,
        choice=_choice,
    )
)
