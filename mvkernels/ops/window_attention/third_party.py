"""FlexAttention between the models' rolls and partitions."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from mvkernels.ops.common.peers import flex_attention
from mvkernels.ops.window_attention.suite import Pair, over_batch, over_windows


def flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window_size: Pair,
    shift: Pair = (0, 0),
    bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Roll, partition, FlexAttention with bias and mask, reverse, roll back."""
    scale = query.shape[2] ** -0.5 if scale is None else scale

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return over_batch(q, k, v, partial(flex_attention, scale=scale, bias=bias, mask=mask))

    return over_windows(query, key, value, window_size, shift, attend)


THIRD_PARTY = {"flex": flex}
