"""Default launch configurations of inverted_residual's Triton kernel. Needs no Triton.

A key has ``c`` (channels of x; 0 without an expansion), ``h`` (hidden channels), ``o`` (channels of the result), ``k``
and ``s`` (side and stride of the depthwise kernel), ``dtype`` (``f16``, ``bf16``, ``f32`` for exact float32 products,
``tf32``), ``few`` (1 where 8 pixels of the result a processor are more than there are), ``last`` (1 for a
channels-last x whose pixels are aligned to 4 bytes) and ``arch``. A program has TY x TX pixels of the result at a time,
in cells of SX next to each other, BLOCK_H hidden channels at a time, and BLOCK_O channels of the result. The expansion
is taken BLOCK_M pixels and CHUNK channels of x at a time. There are at most PROGRAMS programs a processor.

The choices for half types on NVIDIA are those that benchmarks/predict.py found fastest at the models' shapes among
those that `make audit` shows to need no spills. 16 warps, or 8 of at most 128 registers a thread, twice, are what a
processor holds of them. A lane has 4 or 8 channels of a cell. Every channel of the result is in one program, up to 256:
two would make the expanded map twice.

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


@heuristic(OP, "forward_tiles")
def _forward_tiles(key: Mapping[str, Any]) -> Config:
    wide = lanes(key["o"])
    config = {"TY": 4, "TX": 8, "SX": 2, "BLOCK_M": 32, "BLOCK_H": 32, "BLOCK_O": min(64, wide),
              "CHUNK": min(32, lanes(key["c"])), "PROGRAMS": 4, "num_warps": 4, "num_stages": 1}  # fmt: skip
    interpreted = key["arch"] == "interpreter"
    if exact(key) and not interpreted:
        return config | {"BLOCK_M": 16, "CHUNK": 16, "BLOCK_O": min(32, wide)}
    if interpreted or not half(key) or not _nvidia(key):
        return config | {"TY": 8, "num_warps": 8 if key["o"] > 128 else 4}
    if key["few"] and wide <= 128:
        return config | {"BLOCK_H": 64, "BLOCK_O": wide, "num_warps": 8 if wide > 64 else 4}
    many = config | {"TY": 8, "TX": 16, "SX": 4, "BLOCK_M": 64, "BLOCK_H": 64, "BLOCK_O": min(256, wide),
                     "CHUNK": min(64, lanes(key["c"])), "PROGRAMS": 1, "num_warps": 16}  # fmt: skip
    hopper = key["arch"] == "sm_90"  # elsewhere operands of products are in registers too
    if key["o"] > 128:
        return many | {"TX": 8} | ({"BLOCK_H": 128} if hopper else {"TY": 4, "SX": 2})
    if key["o"] > 64 or key["k"] > 3:
        return many | ({} if hopper else {"TX": 8, "num_warps": 8})
    if key["c"] > 32:
        if not key["last"]:
            return many | {"TX": 8, "num_warps": 8}
        return many | ({"TY": 16} if hopper else {"num_warps": 8})
    many["PROGRAMS"] = 2
    if not key["last"]:
        return many | {"TX": 8, "num_warps": 8}
    if not hopper:
        return many | {"TX": 16 if key["o"] <= 32 else 8, "num_warps": 4}
    many |= {"num_warps": 8, "maxnreg": 128}
    return many | {"TX": 8, "BLOCK_H": 128} if key["s"] == 2 and key["o"] > 32 else many


@candidates(OP, "forward_tiles")
def _forward_tiles_candidates(key: Mapping[str, Any]) -> list[Config]:
    if not half(key):
        return []
    # A lane has 4 or 8 channels of a cell: its loads are 8 or 16 bytes.
    found = [(8, 8, 4, 64, 8), (8, 16, 4, 64, 8), (8, 8, 4, 128, 8), (8, 16, 4, 64, 16), (8, 8, 4, 128, 16)]
    names = ("TY", "TX", "SX", "BLOCK_H", "num_warps")
    return [dict(zip(names, each)) for each in found]


@heuristic(OP, "block")
def _block(key: Mapping[str, Any]) -> Config:
    return {"FUSED": int(prediction.worthwhile(key, _forward_tiles(key)))}
