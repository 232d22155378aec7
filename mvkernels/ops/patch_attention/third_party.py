"""transformers' MobileViT, by its own unfolding, self-attention and folding, and FlexAttention between ours."""

from __future__ import annotations

from functools import cache, partial
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from mvkernels.dispatch.registry import NotOffered
from mvkernels.ops.common.peers import Given, flex_attention, package
from mvkernels.ops.patch_attention.suite import over_groups


@cache
def _attention(heads: int, head_dim: int) -> tuple[Any, Any]:
    mobilevit = package("transformers", "models.mobilevit.modeling_mobilevit")
    config = mobilevit.MobileViTConfig(num_attention_heads=heads, attention_probs_dropout_prob=0.0)
    module = mobilevit.MobileViTSelfAttention(config, heads * head_dim).eval()
    module.query, module.key, module.value = Given(), Given(), Given()
    return module, mobilevit.MobileViTLayer


def transformers(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    patch_size: tuple[int, int],
    bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """``MobileViTLayer.unfolding``, ``MobileViTSelfAttention`` with its projections' results given, ``folding``."""
    height, width = query.shape[3:]
    if bias is not None or scale is not None or value.shape != query.shape or patch_size == (1, 1):
        raise NotOffered("transformers' MobileViT has patches, one head_dim for all three, no bias and no scale")
    if height % patch_size[0] or width % patch_size[1]:
        raise NotOffered("transformers' MobileViT resizes a map that its patches do not divide")
    module, layer = _attention(query.shape[1], query.shape[2])
    patches = SimpleNamespace(patch_height=patch_size[0], patch_width=patch_size[1])
    unfolded = [layer.unfolding(patches, m.flatten(1, 2)) for m in (query, key, value)]
    given = (module.query, module.key, module.value)
    for place, (tokens, _) in zip(given, unfolded):
        place.value = tokens
    try:
        out = module(unfolded[0][0])
    finally:
        for place in given:
            place.value = None
    return layer.folding(patches, out, unfolded[0][1]).unflatten(1, query.shape[1:3])


def flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    patch_size: tuple[int, int],
    bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Unfold, FlexAttention, fold."""
    scale = query.shape[2] ** -0.5 if scale is None else scale
    return over_groups(query, key, value, patch_size, partial(flex_attention, scale=scale, bias=bias))


THIRD_PARTY = {"transformers": transformers, "flex": flex}
