"""Settings of a training, and how its learning rate and weight decay follow from them."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn


@dataclass
class Options:
    """What a run is. The defaults of the optimizer, the average and the smoothing are MobileViT's recipe."""

    model: str
    epochs: int = 12
    batch_size: int = 64
    """Of one process; with several scales, at the base size."""
    lr: float = 2e-3
    """At its highest."""
    lr_min: float | None = None
    """Where the warm-up starts and the cosine ends; a tenth of ``lr``."""
    warmup: int | None = None
    """Steps to the highest rate; a twentieth of all."""
    weight_decay: float = 0.01
    """Of matrices and kernels; biases, norms and other vectors have none."""
    smoothing: float = 0.1
    ema: float = 5e-4
    """Share of the new weights in the moving average at each step; 0 is no average."""
    clip: float = 0.0
    """Largest norm of the gradient; 0 leaves it."""
    size: int = 32
    multi_scale: str | None = None
    """"variable" or "fixed" batch over several sizes."""
    scales: tuple[int, int] = (160, 320)
    """Smallest and largest side of those sizes."""
    flip: bool = True
    held_out: float = 0.1
    """Of a folder: mirror its pictures, and the share of them that is kept for the test."""
    seed: int = 0
    settings: dict[str, Any] = field(default_factory=dict)
    """Of the model, beside its classes."""
    amp: bool = False
    """Autocast to bfloat16."""

    # From here on: how, not what. A run may be resumed with others.
    device: str = "cpu"
    backend: str = "auto"
    workers: int = 0
    output: Path | None = None
    """Folder of the checkpoints; none are written without it."""
    save_every: int = 0
    """Steps between checkpoints; they are written after each epoch in any case."""

    HOW = ("device", "backend", "workers", "output", "save_every")

    def identity(self) -> dict[str, Any]:
        """What has to be the same for a run to be resumed."""
        what = {name: value for name, value in vars(self).items() if name not in self.HOW}
        return {**what, "scales": list(self.scales)}


class Average:
    """Exponential moving average of a model's weights and statistics.

    ``average += share * (model - average)``, with a share of at least 9 / (10 + step), so that the random start is
    forgotten in short runs too.
    """

    def __init__(self, model: nn.Module, share: float) -> None:
        self.share = share
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        share = max(self.share, 9.0 / (10.0 + step))
        pairs = list(zip(self.model.state_dict().values(), model.state_dict().values()))
        floating = [(mine, new) for mine, new in pairs if mine.is_floating_point()]
        torch._foreach_lerp_([mine for mine, _ in floating], [new for _, new in floating], share)
        for mine, new in pairs:
            if not mine.is_floating_point():
                mine.copy_(new)


def learning_rate(step: int, steps: int, warmup: int, highest: float, lowest: float) -> float:
    """A line from ``lowest`` to ``highest`` over ``warmup`` steps, then half a cosine back at the last of ``steps``."""
    if step < warmup:
        return lowest + (highest - lowest) * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - 1 - warmup)
    return lowest + (highest - lowest) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices and kernels with weight decay, vectors without."""
    split: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
    for parameter in model.parameters():
        split[parameter.dim() <= 1].append(parameter)
    return [{"params": split[0], "weight_decay": weight_decay}, {"params": split[1], "weight_decay": 0.0}]
