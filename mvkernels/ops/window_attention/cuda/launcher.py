"""window_attention in CUDA C++: the kernels are those of :mod:`mvkernels.cuda.attention`, on windows."""

from __future__ import annotations

import torch

from mvkernels.cuda.attention import launcher

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
    return launcher.why_not(query, key, value, window_size, shift, bias)


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
