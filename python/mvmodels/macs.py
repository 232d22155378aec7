"""Multiply-adds of a model, as papers on mobile networks count them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mvkernels.nn import FormerToMobile, MobileToFormer
from mvkernels.nn.mobile_former import HeadwiseLinear


def count_macs(model: nn.Module, *inputs: Any) -> int:
    """Multiply-adds of ``model(*inputs)``: convolutions, Linears and the two products of each bridge.

    Biases, norms, activations, softmax and sums are not counted. The model runs once, in eval mode and without
    gradients, and is left as it was.
    """
    total = 0

    def count(module: Any, given: tuple[Any, ...], out: Any) -> None:
        nonlocal total
        if isinstance(module, (nn.Conv2d, nn.Linear, HeadwiseLinear)):
            total += out.numel() * module.weight[0].numel()
        elif isinstance(module, (MobileToFormer, FormerToMobile)):
            x: Tensor = given[0]
            total += 2 * x.numel() * given[1].shape[1]

    training = {module: module.training for module in model.modules()}
    handles = [module.register_forward_hook(count) for module in model.modules()]
    try:
        with torch.no_grad():
            model.eval()(*inputs)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in training.items():
            module.training = mode
    return total
