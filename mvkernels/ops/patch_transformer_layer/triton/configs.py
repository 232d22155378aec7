"""Default launch configurations of the layer's Triton kernels. Needs no Triton.

A key has ``c`` (channels), ``f`` (hidden channels) or ``n`` (outputs), ``dtype`` (``f16``, ``bf16``, ``f32`` for exact
float32 products, ``tf32``), ``few`` (1 where blocks of 64 rows are fewer than processors) and ``arch``. The choices
here are those that `make audit` shows to need no spills and to fit shared memory on every architecture it compiles for.

``layer`` is no kernel: its FUSED says whether the modules of :mod:`mvkernels.nn` take this op rather than the
attention alone with PyTorch's norms and products around it. Nothing was measured where no file says so: 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mvkernels.triton.configs import ROOMY, Config, candidates, exact, half, heuristic
from mvkernels.triton.maps import pieces

OP = "patch_transformer_layer"
_TILES = ((32, 64, 4), (64, 32, 4), (64, 64, 4), (64, 128, 8), (128, 64, 8), (128, 128, 8))
"""Rows, columns and warps to try."""


def _wide(key: Mapping[str, Any]) -> int:
    return sum(pieces(key["c"]))


def _rows(key: Mapping[str, Any]) -> int:
    # Of a block: few where there are few in all, but an interpreter runs one program after the other.
    return 16 if key["few"] and key["arch"] != "interpreter" else 64


@heuristic(OP, "linear_rows")
def _linear_rows(key: Mapping[str, Any]) -> Config:
    # STEPS: blocks of outputs that a program takes one after the other; all of them if rows fill the machine.
    if exact(key):
        config = {"BLOCK_M": 32, "BLOCK_N": 32, "CHUNK": 16, "num_warps": 4, "num_stages": 1}
    elif key["dtype"] == "tf32":
        config = {"BLOCK_M": 32, "BLOCK_N": 32, "CHUNK": 0, "num_warps": 4, "num_stages": 1}
    else:
        config = {"BLOCK_M": 64, "BLOCK_N": 64, "CHUNK": 0, "num_warps": 4, "num_stages": 2}
        if _wide(key) > 128:
            config["num_warps"] = 8
    return {**config, "STEPS": 1 if key["few"] and key["arch"] != "interpreter" else 64}


@heuristic(OP, "norm_ffn")
def _norm_ffn(key: Mapping[str, Any]) -> Config:
    if exact(key):
        return {"BLOCK_M": 16, "BLOCK_F": 16, "CHUNK": 16, "num_warps": 4, "num_stages": 1}
    if key["dtype"] == "tf32":
        return {"BLOCK_M": 32, "BLOCK_F": 16, "CHUNK": 0, "num_warps": 8, "num_stages": 1}
    wide = _wide(key) > 128
    block = 16 if wide and key["arch"] not in ROOMY else 32
    return {"BLOCK_M": _rows(key), "BLOCK_F": block, "CHUNK": 0, "num_warps": 8 if wide else 4,
            "num_stages": 2}  # fmt: skip


@heuristic(OP, "ffn_backward")
def _ffn_backward(key: Mapping[str, Any]) -> Config:
    if not half(key) and key["arch"] != "interpreter":
        return {"BLOCK_M": 16, "BLOCK_F": 16, "CHUNK": 16, "num_warps": 4, "num_stages": 1}
    return {"BLOCK_M": _rows(key), "BLOCK_F": 32, "CHUNK": 0, "num_warps": 4, "num_stages": 1}


# ROWS: how many at a time go through the norm's gradient.
@heuristic(OP, "norm_backward")
def _norm_backward(key: Mapping[str, Any]) -> Config:
    return {"BLOCK_M": 64, "ROWS": 8 if key["arch"] != "interpreter" else 64, "num_warps": 4, "num_stages": 1}


@heuristic(OP, "layer")
def _layer(key: Mapping[str, Any]) -> Config:
    return {"FUSED": 0}


# Few, since each is compiled, checked and timed for every key; none for exact products, which have little room.
@candidates(OP, "linear_rows")
def _linear_rows_candidates(key: Mapping[str, Any]) -> list[Config]:
    if key["dtype"] == "f32":
        return []
    steps = 1 if key["few"] else 64
    found = [{"BLOCK_M": m, "BLOCK_N": n, "STEPS": steps, "num_warps": w} for m, n, w in _TILES]
    return [*found, {"STEPS": 2}, {"num_stages": 3}]


@candidates(OP, "norm_ffn")
def _norm_ffn_candidates(key: Mapping[str, Any]) -> list[Config]:
    return [*_ffn_tiles(), {"num_stages": 3}] if key["dtype"] != "f32" else []


@candidates(OP, "ffn_backward")
def _ffn_backward_candidates(key: Mapping[str, Any]) -> list[Config]:
    # On sm_90 not the fault of qkv_backward's pipeline: what is copied overwrites what a product still reads.
    stages = [] if key["arch"] == "sm_90" else [{"num_stages": 3}]
    return [*_ffn_tiles(), *stages] if key["dtype"] != "f32" else []


def _ffn_tiles() -> list[Config]:
    tiles = [(16, 32, 4), (32, 32, 4), (64, 16, 4), (64, 32, 4), (64, 64, 4), (128, 32, 8)]
    return [{"BLOCK_M": m, "BLOCK_F": f, "num_warps": w} for m, f, w in tiles]


@candidates(OP, "norm_backward")
def _norm_backward_candidates(key: Mapping[str, Any]) -> list[Config]:
    return [{"BLOCK_M": m, "ROWS": r, "num_warps": w} for m in (64, 128, 256) for r, w in ((4, 2), (8, 4), (16, 4))]
