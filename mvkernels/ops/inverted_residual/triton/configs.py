"""Default launch configurations of inverted_residual's Triton kernel. Needs no Triton.

A key has ``c`` (channels of x; 0 without an expansion), ``h`` (hidden channels), ``o`` (channels of the result), ``k``
and ``s`` (side and stride of the depthwise kernel), ``dtype`` (``f16``, ``bf16``, ``f32`` for exact float32 products,
``tf32``), ``few`` (1 where 128 pixels of the result a processor are more than there are), ``last`` (1 for a
channels-last x) and ``arch``. A program has BLOCK cells of SY x SX pixels, BLOCK_H hidden channels at a time, and
BLOCK_O channels of the result; CHUNK channels of x are multiplied at a time, 0 for all.

With SY > 1 the pixels that a program reads stay in shared memory for all hidden channels, and all that a cell reaches
is one piece of code: cells are larger, and each value of the expanded map is made 3 or 4 times (stride 1) or 1.6 times
(stride 2), not 4.5 or 1.7. That takes registers, so it is for half types on NVIDIA, kernels of 3 x 3 and few channels.
The choices here are those that `make audit` shows to need no spills and to fit shared memory.

``block`` is no kernel: its FUSED says whether a call that names no backend takes the kernel, or PyTorch's convolutions.
Its key has ``n`` too (pixels of the results, rounded up to a power of two), ``act`` and ``residual``. Where no file
says what was measured, it is what prediction.py predicts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mvkernels.ops.inverted_residual.triton import prediction
from mvkernels.triton.configs import Config, candidates, exact, half, heuristic
from mvkernels.triton.maps import lanes

OP = "inverted_residual"


def _nvidia(key: Mapping[str, Any]) -> bool:
    return key["arch"].startswith("sm_") or key["arch"] == "interpreter"


@heuristic(OP, "forward_cells")
def _forward_cells(key: Mapping[str, Any]) -> Config:
    wide = lanes(key["o"])
    config = {"SY": 1, "SX": 4, "BLOCK": 16, "BLOCK_H": 32, "BLOCK_O": min(64, wide), "CHUNK": 32, "num_warps": 4,
              "num_stages": 1}  # fmt: skip
    interpreted = key["arch"] == "interpreter"
    if not _nvidia(key):
        return config | {"SX": 2, "BLOCK_H": 64}
    if exact(key):
        return config | {"SX": 1, "CHUNK": 16}
    if not half(key) and not interpreted:
        return config | {"SX": 2, "CHUNK": 0 if key["c"] <= 64 else 32}
    many = {"BLOCK_H": 64, "BLOCK_O": min(128, wide), "num_warps": 8}
    if key["few"] and not interpreted:
        return config | many | {"SX": 2, "CHUNK": 0 if key["c"] <= 128 else 64}
    if 0 < key["c"] <= 64 and key["k"] == 3 and key["last"]:
        if key["o"] > 64:
            return config | many | {"SY": 2, "SX": 2, "CHUNK": 0}
        across = 4 if key["s"] == 1 and min(key["c"], key["o"]) <= 32 else 2
        return config | {"SY": 2, "SX": across, "CHUNK": 0}
    return config | many | {"SX": 4 if key["k"] == 3 else 2, "CHUNK": 0 if key["c"] <= 128 else 64}


@candidates(OP, "forward_cells")
def _forward_cells_candidates(key: Mapping[str, Any]) -> list[Config]:
    if not half(key):
        return []
    cells = [(1, 2, 32, 4), (1, 4, 32, 4), (1, 2, 64, 8), (1, 4, 64, 8), (2, 2, 32, 4), (2, 2, 64, 8), (2, 4, 32, 4)]
    # What stays in shared memory has to fit, and what is done at once for it to fit the registers.
    most = 1 if key["k"] > 3 or key["c"] > 64 or not key["last"] else 2
    whole = {"CHUNK": 0} if key["c"] <= 128 else {}
    return [{"SY": sy, "SX": sx, "BLOCK_H": h, "num_warps": warps} | whole for sy, sx, h, warps in cells if sy <= most]


@heuristic(OP, "block")
def _block(key: Mapping[str, Any]) -> Config:
    return {"FUSED": int(prediction.worthwhile(key, _forward_cells(key)))}
