"""Window attention in plain PyTorch: the specification."""

from __future__ import annotations

import torch
from torch import Tensor

from mvkernels.dispatch.checks import lay_as, without_autocast
from mvkernels.ops.common.groups import attention, partition, reverse, spans


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
    (wh, ww), (height, width) = window_size, query.shape[-2:]
    scale = query.shape[2] ** -0.5 if scale is None else scale
    half = query.dtype in (torch.float16, torch.bfloat16)
    dtype = compute_dtype or (torch.float32 if half else query.dtype)
    maps = [m.to(dtype) for m in (query, key, value)]
    places = None if bias is None else bias.to(dtype).unflatten(2, (wh, ww)).unflatten(1, (wh, ww))

    rows = []
    with without_autocast(query.device.type):
        for ys, high, top in spans(height, wh, shift[0]):
            row = []
            for xs, wide, left in spans(width, ww, shift[1]):
                q, k, v = (partition(m[..., ys, xs], high, wide) for m in maps)
                of_pixels = None
                if places is not None:
                    here = slice(top, top + high), slice(left, left + wide)
                    of_pixels = places[(slice(None), *here, *here)].flatten(3).flatten(1, 2)
                out = attention(q, k, v, of_pixels, scale)
                row.append(reverse(out, high, wide, ys.stop - ys.start, xs.stop - xs.start))
            rows.append(torch.cat(row, -1))
        return lay_as(torch.cat(rows, -2).to(query.dtype), query)
