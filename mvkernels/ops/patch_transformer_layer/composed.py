"""The layer of this library's attention and PyTorch's own norms and products: what runs where none is fused."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import layer_norm, linear, silu

from mvkernels.ops.patch_attention import patch_attention


def composed(
    x: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor,
    norm2_weight: Tensor,
    norm2_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    heads: int,
    patch_size: int | tuple[int, int] = (2, 2),
    *,
    eps: float = 1e-5,
    scale: float | None = None,
    activation: str = "silu",
    backend: str | None = None,
) -> Tensor:
    """As :func:`mvkernels.patch_transformer_layer`, the launches of :func:`mvkernels.nn.patch_transformer_layer`."""
    rows = x.permute(0, 2, 3, 1)
    channels = rows.shape[-1:]
    packed = linear(layer_norm(rows, channels, norm1_weight, norm1_bias, eps), qkv_weight, qkv_bias)
    maps = [part.unflatten(-1, (heads, -1)).permute(0, 3, 4, 1, 2) for part in packed.chunk(3, dim=-1)]
    out = patch_attention(maps[0], maps[1], maps[2], patch_size, scale=scale, backend=backend)
    rows = rows + linear(out.permute(0, 3, 4, 1, 2).flatten(-2), proj_weight, proj_bias)
    hidden = silu(linear(layer_norm(rows, channels, norm2_weight, norm2_bias, eps), fc1_weight, fc1_bias))
    return (rows + linear(hidden, fc2_weight, fc2_bias)).permute(0, 3, 1, 2)
