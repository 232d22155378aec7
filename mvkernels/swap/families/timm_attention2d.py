"""``MultiQueryAttention2d`` and ``Attention2d`` of timm's layers (``timm.layers.attention2d``): MobileNetV4's hybrids.

Keys and values of multi-query attention have one head, which all heads read in place, and may be a smaller map.
"""

from __future__ import annotations

from typing import Any

from timm.layers.attention2d import Attention2d, MultiQueryAttention2d
from torch import Tensor, nn

from mvkernels.ops.patch_attention import patch_attention
from mvkernels.swap.eligibility import asked, drops_attention, log_once, not_its_own, not_plain, replaced, unusual_call
from mvkernels.swap.swapped import Swapped
from mvkernels.swap.timm_parts import qkv_of, scale_of

_STEPS = ("_reshape_input", "_reshape_projected_query", "_reshape_output")

CALLS_PARTS = True


def why_not(module: Any) -> str:
    """Why the fused form cannot replace this attention in its current state; empty if it can."""
    kind = module.mvk_original if isinstance(module, Swapped) else type(module)
    reason = replaced(kind, "forward") or not_plain(module.attn_drop, nn.Dropout, "attn_drop")
    if kind is MultiQueryAttention2d:
        reason = reason or replaced(kind, *_STEPS) or not_its_own(module, *_STEPS)
        if not reason and module.einsum:
            reason = "einsum is set, for masks of another shape"
    return reason


def _declines(self: Any, x: Tensor, attn_mask: Tensor | None) -> str:
    reason = "attn_mask is given" if attn_mask is not None else unusual_call(x)
    reason = reason or asked(why_not, self) or drops_attention(self, self.attn_drop)
    if reason:
        log_once(self, reason)
    return reason


class SwappedMultiQueryAttention2d(Swapped):
    """A ``MultiQueryAttention2d`` that calls :func:`mvkernels.patch_attention` with a patch of 1."""

    def forward(self: Any, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """x (B, C, H, W) -> (B, C_out, H, W)."""
        if _declines(self, x, attn_mask):
            return MultiQueryAttention2d.forward(self, x, attn_mask)
        query = self.query(x).unflatten(1, (self.num_heads, -1))
        key, value = (m(x).unsqueeze(1).expand(-1, self.num_heads, -1, -1, -1) for m in (self.key, self.value))
        out = patch_attention(query, key, value, 1, scale=scale_of(self), backend=self.mvk_backend)
        return self.output(out.flatten(1, 2))


class SwappedAttention2d(Swapped):
    """An ``Attention2d`` that calls :func:`mvkernels.patch_attention` with a patch of 1."""

    def forward(self: Any, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """x (B, C, H, W) -> (B, C_out, H, W)."""
        if _declines(self, x, attn_mask):
            return Attention2d.forward(self, x, attn_mask)
        query, key, value = qkv_of(self.qkv(x), self.num_heads, self.head_first)
        out = patch_attention(query, key, value, 1, backend=self.mvk_backend)
        return self.proj_drop(self.proj(out.flatten(1, 2)))


_FORMS: dict[type, type[Swapped]] = {
    MultiQueryAttention2d: SwappedMultiQueryAttention2d,
    Attention2d: SwappedAttention2d,
}


def form(module: Any) -> type[Swapped]:
    """The fused form of a module of one of these classes."""
    return _FORMS[type(module)]
