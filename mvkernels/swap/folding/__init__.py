"""Folding of batch norms at inference: ``swap(model, fold_norms=True)``.

At inference a batch norm multiplies each channel by a factor and adds an offset. If an activation follows, a C++ kernel
computes norm and activation in one pass over the output of the convolution. Otherwise factor and offset go into the
weight and bias of the convolution, where they cost nothing. The class is changed of the module that calls convolution,
norm and activation, not the class of these three. Factor and offset are computed in every call, which takes
microseconds, so they are always up to date.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import Any

from torch import nn

from mvkernels.swap.eligibility import not_its_own, replaced
from mvkernels.swap.folding.forms import Folding
from mvkernels.swap.swapped import Swapped, packing, swapped_class

# Classes that call a convolution and directly after it the norm. Another one needs a class in the file and a line here.
_CALLERS = {
    ("transformers.models.mobilevit.modeling_mobilevit", "MobileViTConvLayer"): "transformers",
    ("timm.layers.conv_bn_act", "ConvNormAct"): "timm",
    ("timm.models.efficientvit_mit", "ConvNormAct"): "timm",
    ("timm.models.efficientformer", "ConvMlpWithNorm"): "timm",
    ("timm.models.efficientformer", "Downsample"): "timm",
    ("timm.models.efficientformer", "Pooling"): "timm",
    ("timm.layers.norm_act", "BatchNormAct2d"): "timm",
}
# Blocks that are one op on packed weights: for ``swap(model, inference=True)``.
_PACKED = {
    ("timm.models.byobnet", "BottleneckBlock"): "timm",
    ("timm.models.efficientvit_mit", "MBConv"): "timm",
    ("timm.models.efficientvit_mit", "DSConv"): "timm",
    ("transformers.models.mobilevit.modeling_mobilevit", "MobileViTInvertedResidual"): "transformers",
}


def fold(
    model: nn.Module, blocks: Iterable[tuple[nn.Module, Any]], packs: bool = False
) -> list[tuple[nn.Module, type[nn.Module]]]:
    """Give each of these callers in ``model`` its folding class. Returns the changed modules with their old classes.

    ``blocks``: modules that are swapped or can be, and their adapters. ``packs``: whether weights are packed too.
    """
    changed: list[tuple[nn.Module, type[nn.Module]]] = []
    claimed = _claimed(blocks)
    for module in model.modules():  # a caller comes before what it calls
        kind = type(module)
        name = (kind.__module__, kind.__qualname__)
        adapter = f"folding.{_CALLERS[name]}" if name in _CALLERS else None
        if packs and name in _PACKED:
            adapter = f"packing.{_PACKED[name]}"
        if adapter is not None and not (
            isinstance(module, Swapped)
            or module in claimed
            or replaced(kind, "forward")
            or not_its_own(module, "forward")
        ):
            form = importlib.import_module(f"mvkernels.swap.{adapter}").FORMS[kind]
            if form.mvk_why_not(module):
                continue
            module.__class__ = swapped_class(kind, packing(form) if packs else form)
            changed.append((module, kind))
        if isinstance(module, Folding):
            claimed.update(getattr(module, norm) for _, norm in module.mvk_pairs)
    return changed


def _claimed(blocks: Iterable[tuple[nn.Module, Any]]) -> set[nn.Module]:
    """The modules that a fused block does not call but computes itself. Their classes must not be changed."""
    claimed: set[nn.Module] = set()
    for block, adapter in blocks:
        for name in getattr(adapter, "_WATCHED", block._modules):
            child = block._modules.get(name)
            claimed.update(child.modules() if child is not None else ())
    return claimed
