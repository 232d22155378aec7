"""Counting the multiply-adds of a model as papers on mobile networks do."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mvkernels.nn import FormerToMobile, MobileToFormer, PatchTransformer
from mvkernels.nn.mobile_former import HeadwiseLinear


def count_macs(model: nn.Module, *inputs: Any) -> int:
    """Count the multiply-adds of ``model(*inputs)``: convolutions, Linears and the two products of each attention.

    Biases, norms, activations, softmax and sums are not counted. A module whose forward has matrix products of its own
    reports them in a method ``products(*inputs) -> int``. The model runs once, in eval mode and without gradients, and
    is not changed. Model and inputs may be on the meta device.
    """
    total = 0

    def count(module: Any, given: tuple[Any, ...], out: Any) -> None:
        nonlocal total
        if isinstance(module, (nn.Conv2d, nn.Linear, HeadwiseLinear)):
            total += out.numel() * module.weight[0].numel()
        elif isinstance(module, (MobileToFormer, FormerToMobile)):
            x: Tensor = given[0]
            total += 2 * x.numel() * given[1].shape[1]
        elif isinstance(module, PatchTransformer):
            batch, dim, height, width = given[0].shape
            total += len(module.layers) * 2 * batch * dim * _pairs(height, width, *module.patch_size)
        elif hasattr(module, "products"):
            total += module.products(*given)

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


def _pairs(height: int, width: int, patch_height: int, patch_width: int) -> int:
    """Number of pairs of pixels that attend to each other: those with the same position in their patch."""
    rows = sum(len(range(y, height, patch_height)) ** 2 for y in range(patch_height))
    columns = sum(len(range(x, width, patch_width)) ** 2 for x in range(patch_width))
    return rows * columns
