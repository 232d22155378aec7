"""Former to Mobile in plain PyTorch: the specification."""

from __future__ import annotations

import torch
from torch import Tensor

from mvkernels.dispatch.checks import lay_as, without_autocast


def former_to_mobile(
    x: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float | None = None,
    residual: bool = True,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    r"""Every pixel of a map attends to a few tokens; with ``residual`` the map is added.

    .. math:: O_p = x_p + \sum_m \mathrm{softmax}_m(s\, x_p \cdot k_m)\, v_m .

    x (B, h, D, H, W), key, value (B, h, M, D) -> (B, h, D, H, W). Half types are computed in float32
    unless ``compute_dtype`` says otherwise. (Mobile-Former, arXiv 2108.05895, equation 2: the map is not
    projected.)
    """
    scale = x.shape[2] ** -0.5 if scale is None else scale
    half = x.dtype in (torch.float16, torch.bfloat16)
    dtype = compute_dtype or (torch.float32 if half else x.dtype)
    with without_autocast(x.device.type):
        pixels = x.flatten(3).to(dtype)
        weights = (key.to(dtype) @ pixels * scale).softmax(-2)
        out = value.to(dtype).transpose(-2, -1) @ weights
        out = pixels + out if residual else out
        return lay_as(out.to(x.dtype).unflatten(3, x.shape[3:]), x)
