"""window_attention on Triton: the kernels are those of :mod:`mvkernels.triton.attention`, on windows."""

from __future__ import annotations

import torch

from mvkernels.triton.attention import launcher
from mvkernels.triton.maps import INT32, window_of

_NAME = "window_attention"


def why_not(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    window_size: tuple[int, int],
    shift: tuple[int, int],
    bias: torch.Tensor | None,
    scale: float | None,
) -> str | None:
    """Why these kernels cannot run a call, or None. Takes the op's checked arguments; never raises."""
    reason = launcher.why_not(query, key, value, bias)
    if reason is None:
        sizes = zip(query.shape[3:], window_size, shift)
        (wh, down), (ww, across) = ((w, -(-(size - start) // w)) for size, (w, start) in
                                    ((size, window_of(size, w, s, bias is None)) for size, w, s in sizes))  # fmt: skip
        # Places of a window, outside the map too, are counted in 32 bits; a program takes at least 16 of them.
        if max(wh * ww * 2, query.shape[0] * query.shape[1] * down * across * -(-wh * ww // 16)) >= INT32:
            reason = "the places of a window or of all windows pass 2**31"
    return reason


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    window_h: int,
    window_w: int,
    shift_h: int,
    shift_w: int,
    bias: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """The output: see the shared launcher's ``forward``."""
    return launcher.forward(_NAME, query, key, value, (window_h, window_w), (shift_h, shift_w), bias, scale)


def backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    window_h: int,
    window_w: int,
    shift_h: int,
    shift_w: int,
    bias: torch.Tensor | None,
    scale: float,
    need_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dquery, dkey, dvalue, dbias): see the shared launcher's ``backward``."""
    window, shift = (window_h, window_w), (shift_h, shift_w)
    return launcher.backward(_NAME, grad, query, key, value, window, shift, bias, scale, need_bias)
