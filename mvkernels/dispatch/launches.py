"""Launching planned kernels, in whatever language, on the device of a call's tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

Kernel = Callable[[Mapping[str, torch.Tensor], Mapping[str, float]], Any]
"""A launch: it takes the tensors and the floats by name, and goes to the current stream of the current device."""


def run(launches: Sequence[Kernel], tensors: Mapping[str, torch.Tensor], floats: Mapping[str, float]) -> None:
    """Launch one after the other on the device of the tensors."""
    device = next(iter(tensors.values())).device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            for each in launches:
                each(tensors, floats)
    else:
        for each in launches:
            each(tensors, floats)
