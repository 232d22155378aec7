"""The inverted residuals of mobile models, their floors, and the same work without this library."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from mvkernels.dispatch.registry import Case, Cost
from mvkernels.ops.common.activations import ACTIVATIONS, EXPONENTIAL
from mvkernels.ops.common.maps import Drawn
from mvkernels.ops.inverted_residual.reference import Weights

# model, its activation, its blocks as (channels, hidden, channels after, kernel, stride, map side)
_MODELS: tuple[tuple[str, str, tuple[tuple[int, int, int, int, int, int], ...]], ...] = (
    (
        "mobilevit_xxs@256",
        "silu",
        ((16, 32, 16, 3, 1, 128), (16, 32, 24, 3, 2, 128), (24, 48, 24, 3, 1, 64), (64, 128, 80, 3, 2, 16)),
    ),
    (
        "mobilevit_s@256",
        "silu",
        (
            (16, 64, 32, 3, 1, 128),
            (32, 128, 64, 3, 2, 128),
            (64, 256, 64, 3, 1, 64),
            (64, 256, 96, 3, 2, 64),
            (96, 384, 128, 3, 2, 32),
            (128, 512, 160, 3, 2, 16),
        ),
    ),
    (
        "efficientvit_b1@256",
        "hardswish",
        (
            (16, 64, 32, 3, 2, 128),
            (32, 128, 32, 3, 1, 64),
            (32, 128, 64, 3, 2, 64),
            (64, 256, 64, 3, 1, 32),
            (64, 256, 128, 3, 2, 32),
            (128, 512, 128, 3, 1, 16),
            (128, 512, 256, 3, 2, 16),
            (256, 1024, 256, 3, 1, 8),
        ),
    ),
    ("mobilenetv4_conv_small@224", "relu", ((64, 192, 64, 5, 1, 14), (96, 576, 96, 5, 1, 7))),
)
_SMALL = ("mobilevit_xxs@256",)


def cases(suite: str = "full") -> list[Case]:
    """The shape suite: "full", or "small" for a quick look."""
    found = []
    for model, activation, blocks in _MODELS:
        for inputs, hidden, outputs, kernel, stride, side in blocks if suite != "small" or model in _SMALL else ():
            shape = {
                "inputs": inputs,
                "hidden": hidden,
                "outputs": outputs,
                "kernel": kernel,
                "stride": stride,
                "height": side,
                "width": side,
                "activation": activation,
            }
            label = f"{inputs}-{hidden}-{outputs}_{side}x{side}_k{kernel}_s{stride}"
            found.append(Case(label, model, partial(_make, shape), ("channels_last",), shape))
    return found


def _make(
    shape: Mapping[str, Any],
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    layout: str | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Arguments as a trained block has them: every channel of every map of about unit variance."""
    drawn = Drawn(shape, batch, dtype, device, seed)

    def weights(outputs: int, inputs: int, kernel: int) -> tuple[Tensor, Tensor]:
        spread = (inputs * kernel**2) ** -0.5
        return drawn.normal(outputs, inputs, kernel, kernel, spread=spread), drawn.normal(outputs, spread=0.3)

    inputs, hidden, outputs = shape["inputs"], shape["hidden"], shape["outputs"]
    return {
        "x": drawn.pixels(inputs, layout),
        "expand": weights(hidden, inputs, 1),
        "depthwise": weights(hidden, 1, shape["kernel"]),
        "project": weights(outputs, hidden, 1),
        "stride": shape["stride"],
        "activation": shape["activation"],
        "residual": shape["stride"] == 1 and inputs == outputs,
    }


def cost(arguments: Mapping[str, Any], backward: bool = False) -> Cost:
    """Floor of the forward, or of the reference's backward alone: two products for each one of the forward."""
    x, stride = arguments["x"], arguments["stride"]
    b, inputs, height, width = x.shape
    hidden, _, kernel, _ = arguments["depthwise"][0].shape
    outputs = arguments["project"][0].shape[0]
    before, after = b * height * width, b * (-(-height // stride)) * (-(-width // stride))
    expands = arguments["expand"] is not None
    flops = 2 * before * inputs * hidden * expands + 2 * after * hidden * (kernel**2 + outputs)
    weights = hidden * (inputs * expands + kernel**2 + outputs)
    exponentials = (before * expands + after) * hidden * (arguments["activation"] in EXPONENTIAL)
    moved = (before * inputs + after * outputs + weights) * x.element_size()
    return Cost(moved * 2, flops * 2, exponentials) if backward else Cost(moved, flops, exponentials)


def eager(
    x: Tensor,
    expand: Weights | None,
    depthwise: Weights,
    project: Weights,
    stride: int = 1,
    activation: str | None = "silu",
    residual: bool = False,
    packed: Tensor | None = None,
) -> Tensor:
    """Three convolutions and two activations, as the models' own code with its norms folded."""
    f = ACTIVATIONS[activation]
    hidden = x if expand is None else f(conv2d(x, *expand))
    kernel, channels = depthwise[0].shape[-1], depthwise[0].shape[0]
    hidden = f(conv2d(hidden, *depthwise, stride=stride, padding=kernel // 2, groups=channels))
    out = conv2d(hidden, *project)
    return out + x if residual else out


PEERS = {"eager": eager}
