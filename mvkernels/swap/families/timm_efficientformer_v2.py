"""``Attention2dDownsample`` of EfficientFormerV2 in timm (``timm.models.efficientformer_v2``), between its projections:
attention from a smaller map to the whole one.

In eval mode timm caches the gathered biases, and a change of the parameter does not update the cache; here they are
gathered in every call.
"""

from __future__ import annotations

from typing import Any

from timm.models.efficientformer_v2 import Attention2dDownsample
from torch import Tensor

from mvkernels.swap.eligibility import asked, log_once, not_its_own, replaced, unusual_call
from mvkernels.swap.position_biases import attend
from mvkernels.swap.swapped import Swapped

CALLS_PARTS = True


def why_not(module: Any) -> str:
    """Why the fused form cannot replace this ``Attention2dDownsample`` in its current state; empty if it can."""
    methods = ("forward", "get_attention_biases")
    return replaced(Attention2dDownsample, *methods) or not_its_own(module, *methods[1:])


class SwappedAttention2dDownsample(Swapped):
    """An ``Attention2dDownsample`` that calls :func:`mvkernels.patch_attention` between two maps."""

    def forward(self: Any, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> (B, C_out, H / 2, W / 2), sizes rounded up."""
        reason = unusual_call(x) or asked(why_not, self)
        if not reason and tuple(x.shape[2:]) != tuple(self.resolution):
            reason = f"its biases are for maps of {tuple(self.resolution)}, but the map is {tuple(x.shape[2:])}"
        if reason:
            log_once(self, reason)
            return Attention2dDownsample.forward(self, x)
        query, key, value = self.q(x), self.k(x), self.v(x)
        local = self.v_local(value)
        out = attend(self, *(m.unflatten(1, (self.num_heads, -1)) for m in (query, key, value)))
        return self.proj(self.act(out.flatten(1, 2) + local))


SWAPPED = SwappedAttention2dDownsample
