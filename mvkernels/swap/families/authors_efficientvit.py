"""``LiteMLA`` of EfficientViT and DC-AE, in the code that the authors at MIT published. Recognised by structure.

See :mod:`mvkernels.swap.by_structure`. The original uses a quadratic form for maps with no more pixels than a head has
channels, and a linear form for larger maps. The fused op gives the same result up to rounding, so a copy is tested
with a map of each kind.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mvkernels.swap import by_structure, lite_mla
from mvkernels.swap.eligibility import not_its_own
from mvkernels.swap.swapped import Swapped

_CHILDREN = ("qkv", "aggreg", "kernel_func", "proj")
_METHODS = ("forward", "relu_linear_att", "relu_quadratic_att")


def why_not(module: Any, model: nn.Module) -> str:
    """Why the fused form cannot replace this ``LiteMLA``; empty if it can."""
    reason = by_structure.holds_something_else(module, _CHILDREN) or lite_mla.why_not(module)
    if reason:
        return reason
    generator = torch.Generator().manual_seed(0)
    sizes = ((3, module.dim // 3 + 1), (1, 2))
    maps = [
        torch.randn(2, module.qkv.conv.in_channels, *size, generator=generator, dtype=torch.float64, device="cpu")
        for size in sizes
    ]
    # The norm at the end of DC-AE's module runs on CUDA only.
    return by_structure.computes_something_else(module, SwappedAuthorsLiteMLA, maps, lite_mla.fused, beside=["proj"])


def form(module: nn.Module) -> type:
    """The fused form of such a module."""
    return SwappedAuthorsLiteMLA


class SwappedAuthorsLiteMLA(Swapped):
    """A ``LiteMLA`` that calls :func:`mvkernels.multiscale_linear_attention` between its projections."""

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """x (B, C, H, W) -> (B, C_out, H, W)."""
        out = lite_mla.forward(self, x, bool(args or kwargs), not_its_own(self, *_METHODS))
        return self.mvk_original.forward(self, x, *args, **kwargs) if out is None else out  # type: ignore[arg-type]
