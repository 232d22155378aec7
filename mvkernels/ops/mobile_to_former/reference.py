"""Mobile to Former in plain PyTorch: the specification."""

from __future__ import annotations

import torch
from torch import Tensor

from mvkernels.dispatch.checks import without_autocast


def mobile_to_former(
    query: Tensor, x: Tensor, scale: float | None = None, compute_dtype: torch.dtype | None = None
) -> Tensor:
    r"""Tokens attend to the pixels of a map, which is key and value at once.

    .. math:: O_m = \sum_p \mathrm{softmax}_p(s\, q_m \cdot x_p)\, x_p .

    query (B, h, M, D), x (B, h, D, H, W) -> (B, h, M, D). Half types are computed in float32 unless
    ``compute_dtype`` says otherwise. (Mobile-Former, arXiv 2108.05895, equation 1: the map is not projected.)
    """
    scale = query.shape[3] ** -0.5 if scale is None else scale
    half = query.dtype in (torch.float16, torch.bfloat16)
    dtype = compute_dtype or (torch.float32 if half else query.dtype)
    with without_autocast(query.device.type):
        pixels = x.flatten(3).to(dtype)
        weights = (query.to(dtype) @ pixels * scale).softmax(-1)
        return (weights @ pixels.transpose(-2, -1)).to(query.dtype).contiguous()
