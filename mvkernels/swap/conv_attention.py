"""What CPUBone and LowFormer have in common in timm and in their authors' code: attention on a smaller map.

(arXiv 2603.26425, arXiv 2409.03460.) A strided convolution makes the map smaller, its pixels attend to each other, and
what follows brings the map back to its size. The attention between is exchanged; the convolutions are called as they
are.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mvkernels.ops.patch_attention import patch_attention


def fused(module: Any, x: Tensor, scale: float | None = None) -> Tensor:
    """x (B, C, H, W) -> (B, C, H', W'), as large as what follows the attention makes it."""
    packed = module.pwise(module.conv_proj(x)).unflatten(1, (module.num_heads, -1))
    query, key, value = packed.chunk(3, dim=2)
    out = patch_attention(query, key, value, 1, scale=scale, backend=module.mvk_backend)
    made: Tensor = module.upsampling(module.o_proj(out.flatten(1, 2)))
    return made
