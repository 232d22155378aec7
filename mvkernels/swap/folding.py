"""Batch norms folded into the convolutions before them, at inference: ``swap(model, fold_norms=True)``.

A batch norm at rest multiplies each channel by a number and adds one, which the convolution before it can do at no
cost. Both modules keep their parameters and buffers and change their class alone: the convolution uses folded weights,
and the norm passes on what it is given, where the norm is in eval mode and no gradient is recorded; else both are what
they were. Folded weights are made from the parameters and kept until one of those changes.
"""

from __future__ import annotations

import importlib
import itertools
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mvkernels.swap.eligibility import not_dense, not_plain, replaced

# Who calls a convolution and then its norm, and nothing between: (module, class) -> pairs of children. In an
# nn.Sequential whatever stands side by side is called so.
_CALLERS: dict[tuple[str, str], tuple[tuple[str, str], ...]] = {
    ("transformers.models.mobilevit.modeling_mobilevit", "MobileViTConvLayer"): (("convolution", "normalization"),),
    ("timm.layers.conv_bn_act", "ConvNormAct"): (("conv", "bn"),),
    ("timm.models.efficientvit_mit", "ConvNormAct"): (("conv", "norm"),),
    ("timm.models.efficientformer", "Stem4"): (("conv1", "norm1"), ("conv2", "norm2")),
    ("timm.models.efficientformer", "ConvMlpWithNorm"): (("fc1", "norm1"), ("fc2", "norm2")),
    ("timm.models.efficientformer", "Downsample"): (("conv", "norm"),),
    ("timm.models.maxxvit", "Stem"): (("conv1", "norm1"),),
    ("timm.models.maxxvit", "MbConvBlock"): (("conv1_1x1", "norm1"), ("conv2_kxk", "norm2")),
}


def _folds(conv: nn.Module, norm: nn.Module) -> bool:
    """Asked by both, with the same answer within a call: at rest, nothing recorded, and nobody listens between them."""
    return not (
        norm.training
        or torch.is_grad_enabled()
        or conv._forward_hooks
        or norm._forward_pre_hooks
        or norm._forward_hooks
        or "forward" in conv.__dict__
    )


def _folded(conv: nn.Conv2d, norm: Any) -> tuple[Tensor, Tensor]:
    """Weight and bias of the convolution that does both."""
    shape = (-1, 1, 1, 1)
    factor = torch.rsqrt(norm.running_var + norm.eps)
    if norm.weight is not None:
        factor = factor * norm.weight
    shift = -norm.running_mean if conv.bias is None else conv.bias - norm.running_mean
    shift = shift * factor
    if norm.bias is not None:
        shift = shift + norm.bias
    return (conv.weight * factor.view(shape)).to(conv.weight.dtype), shift.to(conv.weight.dtype)


def _state(conv: nn.Conv2d, norm: Any) -> Any:
    """Changes whenever one of the tensors that are folded does; None where that cannot be known."""
    # Training steps change the running statistics without counting versions; they do count the batches.
    counted = (norm.running_mean, norm.running_var, norm.num_batches_tracked)
    tensors = (conv.weight, conv.bias, norm.weight, norm.bias, *counted)
    if any(t is not None and t.is_inference() for t in tensors):
        return None
    return tuple(None if t is None else (id(t), t.data_ptr(), t._version, t.dtype) for t in tensors)


class FoldedConv2d(nn.Conv2d):
    """A convolution that does the work of the batch norm after it, where that is at rest."""

    mvk_original = nn.Conv2d
    mvk_norm: nn.Module

    def __prepare_scriptable__(self) -> nn.Module:
        raise RuntimeError("swap: folded norms cannot be scripted; restore() the model first")

    def forward(self, x: Tensor) -> Tensor:
        norm = self.mvk_norm
        if not _folds(self, norm):
            return nn.Conv2d.forward(self, x)
        if torch.compiler.is_compiling():  # it traces no version counters; the compiler folds constants itself
            return self._conv_forward(x, *_folded(self, norm))
        state = _state(self, norm)
        known = self.__dict__.get("mvk_known")
        if known is None or state is None or known[0] != state:
            with torch.autocast(x.device.type, enabled=False):
                known = self.__dict__["mvk_known"] = (state, _folded(self, norm))
        return self._conv_forward(x, *known[1])

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "mvk_known"}


class FoldedBatchNorm2d(nn.BatchNorm2d):
    """A batch norm whose work the convolution before it does."""

    mvk_original = nn.BatchNorm2d
    mvk_conv: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        return x if _folds(self.mvk_conv, self) else nn.BatchNorm2d.forward(self, x)


def fold(model: nn.Module, claimed: set[nn.Module]) -> list[tuple[nn.Module, type[nn.Module]]]:
    """Fold every norm of ``model`` that can be; what was changed, with the classes it had.

    ``claimed``: modules whose work a fused block does itself.
    """
    changed: list[tuple[nn.Module, type[nn.Module]]] = []
    shared = _held_more_than_once(model)
    for caller in model.modules():
        for conv, norm in _pairs(caller):
            kind = _folded_norm(norm)
            if kind is None or {conv, norm} & (claimed | shared) or _why_not(conv, norm, kind):
                continue
            changed += [(conv, type(conv)), (norm, type(norm))]
            # In the dictionary: set as attributes they would be children.
            conv.__dict__["mvk_norm"], norm.__dict__["mvk_conv"] = norm, conv
            conv.__class__, norm.__class__ = FoldedConv2d, kind
    return changed


def forget(module: nn.Module) -> None:
    """Drop what folding has left on a module."""
    for name in ("mvk_norm", "mvk_conv", "mvk_known"):
        module.__dict__.pop(name, None)


def _held_more_than_once(model: nn.Module) -> set[nn.Module]:
    count = Counter(m for parent in model.modules() for m in parent._modules.values() if m is not None)
    return {module for module, times in count.items() if times > 1}


def _pairs(caller: nn.Module) -> Iterator[tuple[Any, Any]]:
    kind = type(caller)
    if "forward" in caller.__dict__:
        return
    if isinstance(caller, nn.Sequential) and kind.forward is nn.Sequential.forward:
        children = [*caller._modules.values()]
        yield from itertools.pairwise(children)
    elif (kind.__module__, kind.__name__) in _CALLERS and not replaced(kind, "forward"):
        for conv, norm in _CALLERS[kind.__module__, kind.__name__]:
            if not (norm == "norm1" and getattr(caller, "se_early", None) is not None):
                yield caller._modules.get(conv), caller._modules.get(norm)


def _folded_norm(norm: Any) -> Any:
    """The class that a norm takes; None for what is no batch norm."""
    if type(norm) is nn.BatchNorm2d:
        return FoldedBatchNorm2d
    timm = sys.modules.get("timm.layers")
    if timm is not None and type(norm) is getattr(timm, "BatchNormAct2d", None):
        return importlib.import_module("mvkernels.swap.folding_timm").FoldedBatchNormAct2d
    return None


def _why_not(conv: Any, norm: Any, kind: Any) -> str:
    reason = not_plain(conv, nn.Conv2d, "conv") or not_plain(norm, kind.mvk_original, "norm")
    if reason:
        return reason
    if norm.running_mean is None or not norm.track_running_stats:
        return "the norm has no running statistics"
    if conv.padding_mode != "zeros" or norm.num_features != conv.out_channels:
        return "the norm does not fit the convolution"
    return not_dense(conv.weight, "conv")
