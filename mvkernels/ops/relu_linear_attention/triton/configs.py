"""Default launch configurations of the Triton kernels of relu_linear_attention. Needs no Triton.

A key has ``d`` (head_dim), ``dtype`` (``f16``, ``bf16``, ``f32`` for exact float32 products, ``tf32``,
``f64``), ``wide`` (1 if all maps are read at least 8 bytes at a time: narrower loads take a register for every
address) and ``arch``. ``BLOCK`` is the most pixels of a tile, ``PROGRAMS`` how
many programs a processor should get before the pixels of a unit stay in one. The choices here are those that
`make audit` shows to need no spills on every architecture it compiles for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mvkernels.triton.configs import Config, candidates, half, heuristic, tiles_to_try
from mvkernels.triton.maps import lanes

OP = "relu_linear_attention"


def by_warp(arch: str) -> bool:
    """Whether matrix instructions are one warp's, with all operands in registers: NVIDIA but Hopper and its like."""
    return arch.startswith(("sm_8", "sm_12"))


def _config(key: Mapping[str, Any], elements: int, most: int, few: int) -> Config:
    # ``few``: the widest head whose sums four warps hold beside a tile of ``elements``.
    wide = lanes(key["d"])
    share = {"f32": 2, "f64": 4}.get(key["dtype"], 1 if key["wide"] else 2)
    block = max(16, min(most // share, elements // share // wide))
    # On AMD the registers of a processor are the programs': twice the warps have half of them each.
    few = 128 if key["arch"].startswith("gfx") else few
    warps = 4 if wide <= (few if half(key) else {"f64": 0}.get(key["dtype"], 32)) else 8
    return {"BLOCK": block, "PROGRAMS": 4, "num_warps": warps, "num_stages": 1}


def _streams(key: Mapping[str, Any]) -> bool:
    """Whether tiles of bfloat16 can be on their way while others are computed with, and there is shared memory."""
    return bool(key["dtype"] == "bf16" and key["wide"] and str(key["arch"]).startswith(("sm_9", "sm_10")))


@heuristic(OP, "forward_slices")
def _forward(key: Mapping[str, Any]) -> Config:
    config = _config(key, 4096, 128, 64)
    # Operands of bfloat16 go from memory to shared memory, two tiles ahead of where they are used.
    if _streams(key) and lanes(key["d"]) <= 32:
        return config | {"BLOCK": 2048 // lanes(key["d"]), "num_warps": 2, "num_stages": 3}
    return config


@heuristic(OP, "backward_slices")
def _backward(key: Mapping[str, Any]) -> Config:
    config = _config(key, 2048, 64, 32)
    wide, arch = lanes(key["d"]), key["arch"]
    if key["dtype"] == "f32" and wide == 32:
        return config | {"BLOCK": 16}  # what is summed over pixels at the end is a tile more
    if not half(key) or not arch.startswith("sm_"):
        return config
    # Beside operands in parts, which are twice the registers, a tile is as small as one can be. Where all are
    # in registers, more warps than rows of the sums to share out would repeat them.
    if wide > 32 and by_warp(arch):
        return config | {"BLOCK": 16, "num_warps": 4}
    # A step waits for its loads longer than it computes: the next one's are under way.
    if _streams(key) and wide <= 32:
        return config | {"BLOCK": 1024 // wide, "num_warps": 2, "num_stages": 3}
    if key["wide"] and wide <= 32 and arch.startswith(("sm_9", "sm_10")):
        return config | ({"BLOCK": 32, "num_warps": 2} if wide == 32 else {}) | {"num_stages": 2}
    return config | {"BLOCK": 16} if wide > 16 and not key["wide"] else config


@candidates(OP, "forward_slices")
@candidates(OP, "backward_slices")
def _candidates(key: Mapping[str, Any]) -> list[Config]:
    return tiles_to_try(lanes(key["d"]), (32, 64, 128, 256))
