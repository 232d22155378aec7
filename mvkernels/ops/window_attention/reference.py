"""Window attention in plain PyTorch: the specification."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from mvkernels.dispatch.checks import known, lay_as, without_autocast
from mvkernels.ops.common.groups import attention, partition, reverse


def window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window_size: tuple[int, int],
    shift: tuple[int, int] = (0, 0),
    bias: Tensor | None = None,
    scale: float | None = None,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    r"""Self-attention inside the windows of a map.

    Windows of :math:`w_h \times w_w` pixels have their corners at :math:`(s_y + i w_h,\ s_x + j w_w)` for all integers
    :math:`i, j`; what lies outside the map is left out. Inside a window, over its pixels in row-major order,

    .. math:: O_i = \sum_j \mathrm{softmax}_j(s\, q_i \cdot k_j + b_{p(i) p(j)})\, v_j ,

    where :math:`p(i)` is the place of pixel i in the window before anything was left out.

    query, key (B, h, D, H, W), value (B, h, Dv, H, W), bias (h, N, N) with N = wh * ww -> (B, h, Dv, H, W). Half types
    are computed in float32 unless ``compute_dtype`` says otherwise. (Swin Transformer, arXiv 2103.14030, section 3.2,
    equation 4; where windows divide the map, its cyclic shift and mask are this with the shift of the windows.)
    """
    (wh, ww), (sy, sx), (height, width) = window_size, shift, query.shape[-2:]
    if bias is None:  # larger windows make the same groups
        (wh, sy), (ww, sx) = _fitting(height, wh, sy), _fitting(width, ww, sx)
    scale = query.shape[2] ** -0.5 if scale is None else scale
    half = query.dtype in (torch.float16, torch.bfloat16)
    dtype = compute_dtype or (torch.float32 if half else query.dtype)
    bias = None if bias is None else bias.to(dtype)
    top, left = -sy % wh, -sx % ww
    high, wide = (top + height + wh - 1) // wh * wh, (left + width + ww - 1) // ww * ww
    lacking = (left, wide - left - width, top, high - top - height)  # pixels that the windows have outside the map
    whole = known(sum(lacking) == 0)

    def windows(x: Tensor) -> Tensor:
        return partition(x if whole else pad(x, lacking), wh, ww)

    with without_autocast(query.device.type):
        q, k, v = (windows(m.to(dtype)) for m in (query, key, value))
        inside = None if whole else windows(torch.ones_like(query[:1, :1, :1]))[..., 0] > 0
        out = attention(q, k, v, bias, scale, inside).to(query.dtype)
        out = reverse(out, wh, ww, high, wide)
    return lay_as(out[..., top : top + height, left : left + width], query)


def _fitting(size: int, window: int, shift: int) -> tuple[int, int]:
    if not known(size < window):
        return window, shift
    return size, shift if known(shift < size) else 0
