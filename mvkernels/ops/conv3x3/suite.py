"""The dense 3 x 3 convolutions of mobile models, their floors, and the same work without this library."""

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
from mvkernels.ops.conv3x3.operators import tile_of

# model, its activation, its convolutions as (channels, channels of a second map, channels after, stride, map side)
_MODELS: tuple[tuple[str, str, tuple[tuple[int, int, int, int, int], ...]], ...] = (
    (
        "mobilevit_xxs@256",
        "silu",
        ((48, 0, 48, 1, 32), (48, 48, 48, 1, 32), (64, 0, 64, 1, 16), (3, 0, 16, 2, 256), (80, 80, 80, 1, 8)),
    ),
    (
        "mobilevit_s@256",
        "silu",
        (
            (96, 0, 96, 1, 32),
            (96, 96, 96, 1, 32),
            (128, 0, 128, 1, 16),
            (128, 128, 128, 1, 16),
            (160, 0, 160, 1, 8),
            (160, 160, 160, 1, 8),
        ),
    ),
    ("efficientformer_l1@224", "relu", ((3, 0, 24, 2, 224), (24, 0, 48, 2, 112), (48, 0, 96, 2, 56))),
    ("coatnet_0@224", "gelu", ((3, 0, 32, 2, 224), (32, 0, 64, 1, 112))),
)
_SMALL = ("mobilevit_xxs@256",)


def cases(suite: str = "full") -> list[Case]:
    """The shape suite: "full", or "small" for a quick look."""
    found = []
    for model, activation, convolutions in _MODELS:
        for inputs, beside, outputs, stride, side in convolutions if suite != "small" or model in _SMALL else ():
            shape = {
                "inputs": inputs,
                "beside": beside,
                "outputs": outputs,
                "stride": stride,
                "height": side,
                "width": side,
                "activation": activation,
            }
            both = f"{inputs}+{beside}" if beside else f"{inputs}"
            layouts = ("channels_first",) if inputs == 3 else ("channels_last",)
            label = f"{both}-{outputs}_{side}x{side}_s{stride}"
            found.append(Case(label, model, partial(_make, shape), layouts, shape))
    return found


def _make(
    shape: Mapping[str, Any],
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    layout: str | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Arguments as a trained layer has them: every channel of every map of about unit variance."""
    inputs, beside, outputs = (shape[name] for name in ("inputs", "beside", "outputs"))
    layout = layout or ("channels_first" if inputs == 3 else None)
    drawn = Drawn(shape, batch, dtype, device, seed)
    arguments: dict[str, Any] = {
        "x": drawn.pixels(inputs, layout),
        "weight": drawn.normal(outputs, inputs + beside, 3, 3, spread=(9 * (inputs + beside)) ** -0.5),
        "bias": drawn.normal(outputs, spread=0.3),
        "activation": shape["activation"],
        "stride": shape["stride"],
    }
    return arguments | ({"beside": drawn.pixels(beside, layout)} if beside else {})


def cost(arguments: Mapping[str, Any], backward: bool = False) -> Cost:
    """Floor of the forward by the algorithm taken, or of the reference's backward alone, two direct convolutions."""
    x, weight, stride = arguments["x"], arguments["weight"], arguments.get("stride", 1)
    b, _, height, width = x.shape
    outputs, inputs = weight.shape[:2]
    tile = 0 if backward else tile_of(inputs, outputs, stride, height, width)
    before, after = b * height * width, b * (-(-height // stride)) * (-(-width // stride))
    points = (tile + 2) ** 2 if tile else 9
    products = b * (-(-height // tile)) * (-(-width // tile)) * points if tile else 9 * after
    moved = (before * inputs + after * outputs + points * inputs * outputs) * x.element_size()
    exponentials = after * outputs * (arguments.get("activation") in EXPONENTIAL)
    flops = 2 * products * inputs * outputs
    return Cost(moved * 2, flops * 2, exponentials) if backward else Cost(moved, flops, exponentials)


def eager(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    beside: Tensor | None = None,
    stride: int = 1,
    packed: Tensor | None = None,
) -> Tensor:
    """Concatenation, convolution, activation and addition, as the models' own code."""
    out = conv2d(x if beside is None else torch.cat([x, beside], 1), weight, bias, stride=stride, padding=1)
    out = ACTIVATIONS[activation](out)
    return out if residual is None else out + residual


PEERS = {"eager": eager}
