"""patch_attention in CUDA C++: the kernels are those of :mod:`mvkernels.cuda.attention`, on patches."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mvkernels.cuda.attention import launcher

_NAME = "patch_attention"


def why_not(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    patch_size: tuple[int, int],
    bias: torch.Tensor | None,
    scale: float | None,
) -> str | None:
    """Why these kernels cannot run a call, or None. Takes the op's checked arguments; never raises."""
    return launcher.why_not(query, key, value, patch_size, None, bias)


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    patch_h: int,
    patch_w: int,
    bias: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """The output: see the shared launcher's ``forward``."""
    return launcher.forward(_NAME, query, key, value, (patch_h, patch_w), None, bias, scale)


def backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    patch_h: int,
    patch_w: int,
    bias: torch.Tensor | None,
    scale: float,
    need_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dquery, dkey, dvalue, dbias): see the shared launcher's ``backward``."""
    return launcher.backward(_NAME, grad, query, key, value, (patch_h, patch_w), None, bias, scale, need_bias)


def backward_into(
    grads: Sequence[torch.Tensor],
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    patch_h: int,
    patch_w: int,
    bias: torch.Tensor | None,
    scale: float,
    need_bias: bool,
) -> torch.Tensor:
    """Write dquery, dkey, dvalue to ``grads`` and return dbias: see the shared launcher's ``backward_into``."""
    return launcher.backward_into(
        _NAME, grads, grad, query, key, value, (patch_h, patch_w), None, bias, scale, need_bias
    )
