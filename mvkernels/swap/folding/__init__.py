"""Batch norms at inference, done by the convolution before or the activation after: ``swap(model, fold_norms=True)``.

A batch norm at rest multiplies each channel by a number and adds one. Where an activation follows, the C++ kernels do
both in one pass over what the convolution wrote; elsewhere the convolution does it at no cost. It is the module that
calls them which is given another class, so that none of them ever computes anything but its own. The numbers are
computed in every call, which costs microseconds, and so are never stale.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import Any

from torch import nn

from mvkernels.swap.eligibility import not_its_own, replaced
from mvkernels.swap.folding.forms import Folding
from mvkernels.swap.swapped import Swapped, swapped_class

# Who calls a convolution, then its norm, and nothing between. A further one is a class in the file, and a line.
_CALLERS = {
    ("transformers.models.mobilevit.modeling_mobilevit", "MobileViTConvLayer"): "transformers",
    ("timm.layers.conv_bn_act", "ConvNormAct"): "timm",
    ("timm.models.efficientvit_mit", "ConvNormAct"): "timm",
    ("timm.models.efficientformer", "ConvMlpWithNorm"): "timm",
    ("timm.models.efficientformer", "Downsample"): "timm",
    ("timm.models.efficientformer", "Pooling"): "timm",
    ("timm.layers.norm_act", "BatchNormAct2d"): "timm",
}


def fold(model: nn.Module, blocks: Iterable[tuple[nn.Module, Any]]) -> list[tuple[nn.Module, type[nn.Module]]]:
    """Give every caller in ``model`` its folding class; what was changed, with the classes it had.

    ``blocks``: modules that are swapped or can be, and their adapters.
    """
    changed: list[tuple[nn.Module, type[nn.Module]]] = []
    claimed = _claimed(blocks)
    for module in model.modules():  # a caller comes before what it calls
        kind = type(module)
        adapter = _CALLERS.get((kind.__module__, kind.__qualname__))
        if adapter is not None and not (
            isinstance(module, Swapped)
            or module in claimed
            or replaced(kind, "forward")
            or not_its_own(module, "forward")
        ):
            folding = importlib.import_module(f"mvkernels.swap.folding.{adapter}").FOLDING[kind]
            if folding.mvk_why_not(module):
                continue
            module.__class__ = swapped_class(kind, folding)
            changed.append((module, kind))
        if isinstance(module, Folding):
            claimed.update(getattr(module, norm) for _, norm in module.mvk_pairs)
    return changed


def _claimed(blocks: Iterable[tuple[nn.Module, Any]]) -> set[nn.Module]:
    """The modules whose work a fused block does itself, and which have to be what they were written as."""
    claimed: set[nn.Module] = set()
    for block, adapter in blocks:
        for name in getattr(adapter, "_WATCHED", block._modules):
            child = block._modules.get(name)
            claimed.update(child.modules() if child is not None else ())
    return claimed
