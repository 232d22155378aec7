"""``LiteMLA`` of EfficientViT and DC-AE, in the code that the authors at MIT published. Recognised by structure.

See :mod:`mvkernels.swap.by_structure`. The original uses a quadratic form for maps with no more pixels than a head has
channels, and a linear form for larger maps. The fused op gives the same result up to rounding, so a copy is tested
with a map of each kind.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mvkernels.nn.efficientvit import aggregate_and_attend
from mvkernels.swap import by_structure, lite_mla
from mvkernels.swap.eligibility import asked, class_of, not_its_own
from mvkernels.swap.packing import layers
from mvkernels.swap.packing.layers import Part
from mvkernels.swap.packing.plans import Keep, Run
from mvkernels.swap.swapped import Swapped

CALLS_PARTS = True
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


def _part(layer: Any) -> Part | None:
    """The convolution, norm and activation of such a layer; None if it holds or computes something else.

    A comparison of the whole attention does not show that, because it calls the layers as they are.
    """
    held = {name: part for name, part in layer._modules.items() if part is not None}
    if not {"conv"} <= {*held} <= {"conv", "norm", "act"} or class_of(held["conv"]) is not nn.Conv2d:
        return None
    conv, norm = held["conv"], held.get("norm")
    part = (conv, norm, tuple(m for m in (held.get("act"),) if m is not None))
    if layers.resting(*part) is None:
        return None
    x = torch.linspace(-2.0, 3.0, 6 * conv.in_channels).sin().view(1, -1, 2, 3)
    for size in (1e-2, 1.0, 30.0):
        wanted = conv(x * size)
        for module in (*(() if norm is None else (norm,)), *part[2]):
            wanted = module(wanted)
        try:
            found = layer(x * size)
        except Exception:  # whatever somebody's forward may raise
            return None
        if not (isinstance(found, Tensor) and found.shape == wanted.shape and torch.allclose(found, wanted, 1e-4)):
            return None
    return part


class SwappedAuthorsLiteMLA(Swapped):
    """A ``LiteMLA`` that calls :func:`mvkernels.multiscale_linear_attention` between its projections."""

    mvk_calls = ("qkv", "proj")  # on channels-last maps their convolutions can do without a plan of this module
    mvk_keeps_layout = True
    mvk_methods = ("_conv_forward", *_METHODS)

    def mvk_sizes(self: Any) -> tuple[int, int]:
        """The projection's channels."""
        return self.proj.conv.out_channels, 1

    def mvk_plan(self: Any, keep: Keep) -> Run | None:
        """On packed weights. The map comes out laid out as it went in, because the code around is not known."""
        if asked(lite_mla.why_not, self) or not_its_own(self, *_METHODS):
            return None
        parts = [_part(self.qkv), _part(self.proj)]
        found = [None if part is None else layers.convolution(part, keep) for part in parts]
        if not all(found):
            return None
        into: Any = found[0]
        out: Any = found[1]
        settings = (self.aggreg, self.dim, self.eps, self.mvk_backend)

        def run(x: Tensor) -> Tensor:
            y: Tensor = out(aggregate_and_attend(into(x), *settings))
            return y if x.is_contiguous(memory_format=torch.channels_last) else y.contiguous()

        return run

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """x (B, C, H, W) -> (B, C_out, H, W)."""
        out = lite_mla.forward(self, x, bool(args or kwargs), not_its_own(self, *_METHODS))
        return self.mvk_original.forward(self, x, *args, **kwargs) if out is None else out  # type: ignore[arg-type]
