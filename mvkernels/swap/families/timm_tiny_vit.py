"""``TinyVitBlock`` of TinyViT in timm (``timm.models.tiny_vit``): its windows, in place.

The map is padded before the LayerNorm that is part of the attention, so that added pixels become its bias. In eval mode
timm caches the gathered biases, and a change of the parameter does not update the cache; here they are gathered in
every call.
"""

from __future__ import annotations

from typing import Any

from timm.models.tiny_vit import Attention, TinyVitBlock
from torch import Tensor, nn

from mvkernels.swap.eligibility import asked, log_once, not_its_own, not_plain_parts, replaced, unusual_call
from mvkernels.swap.swapped import Swapped
from mvkernels.swap.timm_parts import scale_of
from mvkernels.swap.windows import attend_in_windows, gathered, map_of

CALLS_PARTS = True


def why_not(block: Any) -> str:
    """Why the fused form cannot replace this ``TinyVitBlock`` in its current state; empty if it can."""
    parts = {"attn": Attention, "attn.norm": nn.LayerNorm, "attn.qkv": nn.Linear, "attn.proj": nn.Linear}
    return (
        replaced(TinyVitBlock, "forward")
        or not_plain_parts(block, parts)
        or replaced(Attention, "get_attention_biases")
        or not_its_own(block.attn, "get_attention_biases")
    )


class SwappedTinyVitBlock(Swapped):
    """A ``TinyVitBlock`` that calls :func:`mvkernels.window_attention`: without partition and reverse."""

    def forward(self: Any, x: Tensor) -> Tensor:
        """x (B, H, W, C) -> (B, H, W, C)."""
        reason = unusual_call(x) or asked(why_not, self)
        if reason:
            log_once(self, reason)
            return TinyVitBlock.forward(self, x)
        attention = self.attn
        sizes = (attention.key_dim, attention.key_dim, attention.val_dim)
        attended = attend_in_windows(
            x,
            (self.window_size, self.window_size),
            (0, 0),
            lambda x: map_of(attention.qkv(attention.norm(x)), attention.num_heads).split(sizes, dim=2),
            gathered(attention.attention_biases, attention.attention_bias_idxs),
            attention.proj,
            scale=scale_of(attention),
            backend=self.mvk_backend,
        )
        batch, height, width, channels = x.shape
        x = x + self.drop_path1(attended)
        x = self.local_conv(x.permute(0, 3, 1, 2)).reshape(batch, channels, -1).transpose(1, 2)
        x = x + self.drop_path2(self.mlp(x))
        return x.view(batch, height, width, channels)


SWAPPED = SwappedTinyVitBlock
