"""Default launch configurations of the layer's Triton kernels. Needs no Triton.

A key has ``c`` (channels), ``f`` (hidden channels) or ``n`` (outputs), ``dtype`` (``f16``, ``bf16``, ``f32`` for exact
float32 products, ``tf32``), ``few`` (0 where blocks of 128 rows are as many as processors or more, 1 where those of 32
are, else 2), for ``linear_rows`` and ``ffn_backward`` ``many`` (1 where those of 256 are) and ``arch``. The choices
here are those that the model of time takes least for, of those that `make audit` shows to need no spills and to fit
shared memory on every architecture it compiles for.

``layer`` is no kernel: its FUSED says whether the modules of :mod:`mvkernels.nn` take this op rather than the
attention alone with PyTorch's norms and products around it. Nothing was measured where no file says so: 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mvkernels.triton.configs import ROOMY, Config, candidates, exact, half, heuristic
from mvkernels.triton.maps import pieces

OP = "patch_transformer_layer"
_TILES = ((32, 64, 4), (64, 64, 4), (64, 128, 4), (64, 128, 8), (128, 64, 4), (128, 64, 8), (128, 128, 8))
"""Rows, columns and warps to try."""


def _wide(key: Mapping[str, Any]) -> int:
    return sum(pieces(key["c"]))


def _rows(key: Mapping[str, Any]) -> int:
    # Of a block: few where there are few in all, but an interpreter runs one program after the other. Weights are read
    # once a block, and products of warp groups want 64 rows; of more channels than 192 twice as many would spill.
    if key["arch"] == "interpreter":
        return 64
    if key["few"] == 2:
        return 16
    return 128 if key["few"] == 0 and _wide(key) <= 192 and key["arch"] in ROOMY else 64


def _many(key: Mapping[str, Any]) -> bool:
    # Whether blocks have 256 rows: that halves again what is read of the weights. Of more channels they would spill.
    compiled = key["arch"] in ROOMY and key["arch"] != "interpreter"
    return bool(compiled and key["many"] and half(key) and _wide(key) <= 144)


@heuristic(OP, "linear_rows")
def _linear_rows(key: Mapping[str, Any]) -> Config:
    # STEPS: blocks of outputs that a program takes one after the other; all of them if rows fill the machine.
    steps = 1 if key["few"] and key["arch"] != "interpreter" else 64
    if exact(key):
        config = {"BLOCK_M": 32, "BLOCK_N": 32, "CHUNK": 16, "num_warps": 4, "num_stages": 1}
    elif key["dtype"] == "tf32":
        config = {"BLOCK_M": 32, "BLOCK_N": 32, "CHUNK": 0, "num_warps": 4, "num_stages": 1}
    elif _many(key) and _wide(key) > 96 and key["n"] > key["c"]:
        config = {"BLOCK_M": 256, "BLOCK_N": 64, "CHUNK": 0, "num_warps": 8, "num_stages": 3}
    elif key["arch"] in ROOMY:
        config = {"BLOCK_M": max(_rows(key), 64), "BLOCK_N": 128 if key["few"] == 1 else 64, "CHUNK": 0,
                  "num_warps": 8 if key["few"] == 0 and key["n"] <= key["c"] else 4, "num_stages": 1}  # fmt: skip
    else:
        config = {"BLOCK_M": 64, "BLOCK_N": 64, "CHUNK": 0, "num_warps": 8 if _wide(key) > 128 else 4, "num_stages": 2}
    return {**config, "STEPS": steps}


@heuristic(OP, "norm_ffn")
def _norm_ffn(key: Mapping[str, Any]) -> Config:
    if exact(key):
        return {"BLOCK_M": 16, "BLOCK_F": 16, "CHUNK": 16, "num_warps": 4, "num_stages": 1}
    if key["dtype"] == "tf32":
        return {"BLOCK_M": 32, "BLOCK_F": 16, "CHUNK": 0, "num_warps": 8, "num_stages": 1}
    rows, wide = _rows(key), _wide(key)
    config = {"BLOCK_M": rows, "BLOCK_F": 32, "CHUNK": 0, "num_warps": 4, "num_stages": 2}
    if key["arch"] not in ROOMY:
        return config | ({"BLOCK_F": 16, "num_warps": 8} if wide > 96 else {})
    if rows == 128:
        return config | {"BLOCK_F": 64 if wide <= 144 else 32, "num_warps": 8, "num_stages": 3}
    if rows == 64:
        return config | {"BLOCK_F": 64, "num_warps": 8, "num_stages": 2 if wide <= 144 else 1}
    return config


@heuristic(OP, "ffn_backward")
def _ffn_backward(key: Mapping[str, Any]) -> Config:
    if not half(key) and key["arch"] != "interpreter":
        return {"BLOCK_M": 16, "BLOCK_F": 16, "CHUNK": 16, "num_warps": 4, "num_stages": 1}
    if _many(key):
        return {"BLOCK_M": 256, "BLOCK_F": 32, "CHUNK": 0, "num_warps": 8, "num_stages": 3}
    rows, wide = _rows(key), _wide(key)
    config = {"BLOCK_M": rows, "BLOCK_F": 32, "CHUNK": 0, "num_warps": 8 if rows >= 64 else 4, "num_stages": 1}
    if key["arch"] in ROOMY:
        return config | {"BLOCK_F": 64 if rows < 128 or wide > 144 else 32}
    return config | ({"BLOCK_F": 16} if wide > 128 else {"num_warps": 4})


# ROWS: how many at a time go through the norm's gradient.
@heuristic(OP, "norm_backward")
def _norm_backward(key: Mapping[str, Any]) -> Config:
    if key["arch"] == "interpreter":
        return {"BLOCK_M": 64, "ROWS": 64, "num_warps": 4, "num_stages": 1}
    config = {"ROWS": 8 if _wide(key) <= 144 else 4, "num_warps": 2, "num_stages": 1}
    if key["few"]:
        return {**config, "BLOCK_M": 16, "ROWS": 4}
    return {**config, "BLOCK_M": 128 if _wide(key) <= 144 else 64}


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
    return [*_ffn_tiles(), {"num_stages": 2}] if key["dtype"] != "f32" else []


def _ffn_tiles() -> list[Config]:
    tiles = [(16, 32, 4), (32, 32, 4), (64, 32, 4), (64, 64, 4), (64, 64, 8), (128, 32, 8), (128, 64, 8)]
    return [{"BLOCK_M": m, "BLOCK_F": f, "num_warps": w} for m, f, w in tiles]


@candidates(OP, "norm_backward")
def _norm_backward_candidates(key: Mapping[str, Any]) -> list[Config]:
    return [{"BLOCK_M": m, "ROWS": r, "num_warps": w} for m in (16, 64, 128) for r, w in ((4, 2), (8, 2), (8, 4))]
