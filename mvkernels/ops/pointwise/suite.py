"""The 1 x 1 convolutions and linear layers of mobile models, their floors, and the same work without this library."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear

from mvkernels.dispatch.registry import Case, Cost
from mvkernels.ops.common.activations import ACTIVATIONS, EXPONENTIAL
from mvkernels.ops.common.maps import Drawn
from mvkernels.ops.pointwise.reference import Norm

# model, its layers as (channels, channels after, whether normed, activation, whether something is added, map side)
_MODELS: tuple[tuple[str, tuple[tuple[int, int, bool, str | None, bool, int], ...]], ...] = (
    (
        "mobilevit_xxs@256",
        (
            (64, 192, True, None, False, 32),
            (64, 64, False, None, True, 32),
            (64, 128, True, "silu", False, 32),
            (128, 64, False, None, True, 32),
            (80, 320, False, "silu", False, 8),
        ),
    ),
    (
        "mobilevit_s@256",
        (
            (144, 432, True, None, False, 32),
            (144, 144, False, None, True, 32),
            (144, 288, True, "silu", False, 32),
            (288, 144, False, None, True, 32),
            (192, 576, True, None, False, 16),
            (240, 720, True, None, False, 8),
            (160, 640, False, "silu", False, 8),
        ),
    ),
    ("efficientvit_b1@256", ((128, 384, False, None, False, 16), (256, 1536, False, "hardswish", False, 8))),
    (
        "swin_tiny@224",
        (
            (96, 384, True, "gelu", False, 56),
            (384, 96, False, None, True, 56),
            (384, 1536, True, "gelu", False, 14),
            (768, 768, False, None, True, 7),
        ),
    ),
)
_SMALL = ("mobilevit_xxs@256",)


def cases(suite: str = "full") -> list[Case]:
    """The shape suite: "full", or "small" for a quick look."""
    found = []
    for model, layers in _MODELS:
        for inputs, outputs, normed, activation, adds, side in layers if suite != "small" or model in _SMALL else ():
            shape = {
                "inputs": inputs,
                "outputs": outputs,
                "normed": normed,
                "activation": activation,
                "adds": adds,
                "height": side,
                "width": side,
            }
            parts = ["ln"] * normed + ([activation] if activation else []) + ["add"] * adds
            label = "_".join([f"{inputs}-{outputs}", f"{side}x{side}", *parts])
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
    """Arguments as a trained layer has them: every channel of every map of about unit variance."""
    inputs, outputs = shape["inputs"], shape["outputs"]
    drawn = Drawn(shape, batch, dtype, device, seed)
    arguments: dict[str, Any] = {
        "x": drawn.pixels(inputs, layout),
        "weight": drawn.normal(outputs, inputs, spread=inputs**-0.5),
        "bias": drawn.normal(outputs, spread=0.3),
        "activation": shape["activation"],
    }
    if shape["normed"]:
        arguments["norm"] = (drawn.normal(inputs, spread=0.1, mean=1.0), drawn.normal(inputs, spread=0.1))
    return arguments | ({"residual": drawn.pixels(outputs, layout)} if shape["adds"] else {})


def cost(arguments: Mapping[str, Any], backward: bool = False) -> Cost:
    """Floor of the forward, or of the reference's backward alone, which has two products for one."""
    x, (outputs, inputs, *_) = arguments["x"], arguments["weight"].shape
    pixels = x.numel() // inputs
    maps = inputs + outputs * (1 if arguments.get("residual") is None else 2)
    moved, flops = (pixels * maps + inputs * outputs) * x.element_size(), 2 * pixels * inputs * outputs
    exponentials = pixels * outputs * (arguments.get("activation") in EXPONENTIAL)
    return Cost(moved * 2, flops * 2, exponentials) if backward else Cost(moved, flops, exponentials)


def eager(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm: Norm | None = None,
    eps: float = 1e-5,
    activation: str | None = None,
    residual: Tensor | None = None,
    packed: Tensor | None = None,
) -> Tensor:
    """LayerNorm, linear layer, activation and addition, as the models' own code."""
    rows = x.permute(0, 2, 3, 1)
    if norm is not None:
        rows = layer_norm(rows, rows.shape[-1:], *norm, eps)
    rows = ACTIVATIONS[activation](linear(rows, weight.flatten(1), bias))
    out = rows.permute(0, 3, 1, 2)
    return out if residual is None else out + residual


PEERS = {"eager": eager}
