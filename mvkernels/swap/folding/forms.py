"""What the folding forms share: which norms can be folded, and the call that does so."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from mvkernels.dispatch import checks
from mvkernels.dispatch.exporting import exporting
from mvkernels.swap.eligibility import class_of, name_of, not_dense, not_its_own, not_plain, replaced, unusual_call
from mvkernels.swap.folding import elementwise
from mvkernels.swap.packing.kinds import of_convolution
from mvkernels.swap.packing.plans import not_now
from mvkernels.swap.swapped import Swapped

_DTYPES = (torch.float32, torch.float64)
_LAID_OTHERWISE = {("mvmodels.layers", "ToChannelsLast"), ("mvmodels.layers", "ToChannelsFirst")}
"""Classes of convolutions that differ from ``Conv2d`` in the layout of their result only."""


class Folding(Swapped):
    """What the folding forms share."""

    mvk_pairs: tuple[tuple[str, str], ...] = ()
    """The names of convolutions with those of the norms after them."""

    def mvk_sizes(self) -> tuple[int, int] | None:
        """Those of the one convolution."""
        if len(self.mvk_pairs) != 1:
            return None
        conv: Any = getattr(self, self.mvk_pairs[0][0])
        return conv.out_channels, conv.stride[0]

    @classmethod
    def mvk_why_not(cls, module: nn.Module) -> str:
        """Why such a module has nothing to fold; empty if it has."""
        reasons = [why_not(getattr(module, c, None), getattr(module, n, None)) for c, n in cls.mvk_pairs]
        return reasons[0] if all(reasons) else ""

    def mvk_has_ops(self) -> bool:
        """Whether there is an op for each convolution, as there is none for depthwise ones by themselves."""
        convolutions = [getattr(self, conv, None) for conv, _ in self.mvk_pairs]
        return all(isinstance(c, nn.Conv2d) and of_convolution(c) in ("pointwise", "conv3x3") for c in convolutions)


def why_not(conv: Any, norm: Any) -> str:
    """Why the two are not one convolution, at rest; empty if they are."""
    if not isinstance(norm, nn.BatchNorm2d):
        return "there is no batch norm"
    return not_plain_convolution(conv) or not_plain_norm(norm, conv.out_channels)


def not_plain_norm(norm: Any, channels: int) -> str:
    """A plain batch norm of so many channels, with running statistics, and perhaps timm's activation."""
    if not isinstance(norm, nn.BatchNorm2d):
        return "there is no batch norm"
    own = nn.BatchNorm2d if type(norm) is nn.BatchNorm2d else _batch_norm_with_activation()
    reason = not_plain(norm, own, "the norm")
    if not reason and (norm.running_mean is None or norm.running_var is None or norm.num_features != channels):
        reason = "the norm has no running statistics, or not the convolution's channels"
    return reason


def not_plain_convolution(conv: Any) -> str:
    """A plain ``Conv2d`` of a plain tensor."""
    kind = class_of(conv)
    return (
        not_plain(conv, kind if name_of(kind) in _LAID_OTHERWISE else nn.Conv2d, "the convolution")
        or replaced(nn.Conv2d, "_conv_forward")
        or not_its_own(conv, "_conv_forward")
        or not_dense(conv.weight, "the convolution")
    )


def _batch_norm_with_activation() -> type[nn.Module]:
    timm = sys.modules.get("timm.layers.norm_act")
    return nn.BatchNorm2d if timm is None else timm.BatchNormAct2d


def both(caller: Any, conv: Any, norm: Any, x: Any, *after: Any) -> Tensor | None:
    """``norm(conv(x))`` without the norm's activation, then the modules ``after``; None where the caller's own forward
    runs.

    That is in training, with gradients, under autocast, in half types (whose weights would be rounded once more), and
    in graphs for elsewhere.
    """
    if (
        torch.is_grad_enabled()
        or norm is None
        or norm.training
        or exporting()
        or unusual_call(x)
        or replaced(caller.mvk_original, "forward")
        or why_not(conv, norm)
        or x.dtype not in _DTYPES
        or not (x.dtype == conv.weight.dtype == norm.running_var.dtype)
        or checks.autocast_on(x.device.type)
    ):
        return None
    activation = elementwise.activation_of(after)
    if activation is not None and x.is_cpu and x.dtype == torch.float32 and not not_now():
        out = conv._conv_forward(x, conv.weight, None)
        if not elementwise.not_fit(out):
            return elementwise.normalised(out, *_settings(norm), conv.bias, norm.eps, activation, in_place=True)
    factor = torch.rsqrt(norm.running_var + norm.eps)
    if norm.weight is not None:
        factor = factor * norm.weight
    shift = -norm.running_mean if conv.bias is None else conv.bias - norm.running_mean
    shift = shift * factor if norm.bias is None else torch.addcmul(norm.bias, shift, factor)
    out = conv._conv_forward(x, conv.weight * factor.view(-1, 1, 1, 1), shift)
    for module in after:
        out = module(out)
    return out


def alone(norm: Any, x: Any, *after: Any) -> Tensor | None:
    """``norm(x)`` without its activation, then the modules ``after``, in one pass; None where its own forward runs."""
    if (
        norm.training
        or not_now()
        or unusual_call(x)
        or elementwise.not_fit(x)
        or replaced(norm.mvk_original, "forward")
        or norm.running_mean is None
        or norm.running_var is None
        or norm.num_features != x.shape[1]
        or norm.running_var.dtype != x.dtype
        or (norm.weight is not None and norm.weight.dtype != x.dtype)
        or not_its_own(norm, "forward")
    ):
        return None
    activation = elementwise.activation_of(after)
    if activation is None:
        return None
    return elementwise.normalised(x, *_settings(norm), None, norm.eps, activation)


def _settings(norm: Any) -> tuple[Tensor | None, ...]:
    return norm.running_mean, norm.running_var, norm.weight, norm.bias
