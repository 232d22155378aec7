"""Default launch configurations of the Triton kernels of multiscale_linear_attention. Needs no Triton.

A key has ``d`` (head_dim), ``k`` (the side of the depthwise kernel), ``dtype`` (``f16``, ``bf16``, ``f32``
for exact float32 products, ``tf32``, ``f64``), ``last`` (1 for a channels-last qkv) and ``arch``. ``BLOCK`` is the most
pixels of a tile, ``PROGRAMS`` how many programs a processor should get before tiles share one. The attention itself
is launched with relu_linear_attention's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mvkernels.triton.configs import ROOMY, Config, candidates, half, heuristic, tiles_to_try
from mvkernels.triton.maps import lanes

OP = "multiscale_linear_attention"


def _config(key: Mapping[str, Any], elements: int, most: int) -> Config:
    wide = lanes(key["d"])
    share = {"f32": 2, "f64": 4}.get(key["dtype"], 1)
    few = wide <= {"tf32": 32, "f32": 32, "f64": 0}.get(key["dtype"], 64)
    block = max(16, min(most // share, elements // share // wide))
    return {"BLOCK": block, "PROGRAMS": 4, "num_warps": 4 if few else 8, "num_stages": 1}


@heuristic(OP, "aggregate")
@heuristic(OP, "depthwise_backward")
def _tiles(key: Mapping[str, Any]) -> Config:
    # The loads of a row of taps stand side by side; on AMD more than 5 of a large tile do not fit the registers.
    many = key["k"] > 5 and key["arch"].startswith("gfx")
    return _config(key, 1024 if many else 2048, 128)


@heuristic(OP, "pointwise_backward")
def _pointwise(key: Mapping[str, Any]) -> Config:
    return _config(key, 4096, 128)


@heuristic(OP, "weight_sums")
def _weight(key: Mapping[str, Any]) -> Config:
    # A tile is (pixels, taps, channels), whole as an operand of a product; so are the sums. A warp waits for the loads
    # of a step: narrow heads leave room for many programs, others for the loads of two steps.
    config = _config(key, 1024, 32 if key["dtype"] == "tf32" else 64)
    if lanes(key["d"]) == 16:
        config["PROGRAMS"] = 16
    elif half(key) and (key["k"] <= 5 or key["arch"] in ROOMY):
        config["num_stages"] = 2
    if lanes(key["d"]) > 32:
        config["num_warps"] = 8 if half(key) or key["dtype"] == "tf32" else 16
    return config


@candidates(OP, "aggregate")
@candidates(OP, "depthwise_backward")
@candidates(OP, "pointwise_backward")
@candidates(OP, "weight_sums")
def _candidates(key: Mapping[str, Any]) -> list[Config]:
    return tiles_to_try(lanes(key["d"]), (16, 32, 64, 128))
