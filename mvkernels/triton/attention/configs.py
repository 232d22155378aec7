"""Default launch configurations of the Triton kernels of patch_attention and window_attention. Needs no Triton.

A key has ``n`` (tokens of the largest group, rounded up to a power of two, 16 to 512; 512 stands for all above),
``d`` and ``dv`` (head dimensions), ``bias`` (1 if there is one), ``dtype`` (``f16``, ``bf16``, ``f32`` for exact
float32 products, ``tf32``), ``wide`` (1 if q, k and v are read at least 8 bytes at a time: narrower loads take a
register for every address) and ``arch``; of window_attention also ``clipped`` (1 if some windows reach beyond the map),
and between maps of unequal sizes ``unequal`` (1). The choices here are those that `make audit` shows to need no spills
and to fit shared memory on every architecture it compiles for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from mvkernels.triton.configs import ROOMY, Config, candidates, exact, half, heuristic
from mvkernels.triton.maps import width

F = TypeVar("F", bound=Callable[..., Any])

PATCH, WINDOW = "patch_attention", "window_attention"


def _of_each(register: Callable[[str, str], Callable[[F], F]], kernel: str) -> Callable[[F], F]:
    """``register`` for both ops."""

    def registered(function: F) -> F:
        for op in (PATCH, WINDOW):
            register(op, kernel)(function)
        return function

    return registered


def _wide(key: Mapping[str, Any]) -> int:
    return max(width(key["d"]), width(key["dv"]))


def _clipped(key: Mapping[str, Any]) -> bool:
    # The mask of a clipped window takes registers beside a tile of the bias; without a bias they suffice.
    return bool(key["bias"] and key.get("clipped"))


def _wide_values(key: Mapping[str, Any]) -> bool:
    # As EfficientFormer's, beside queries and keys that leave registers for large tiles.
    return bool(key["wide"] and width(key["d"]) <= 32 and 64 < width(key["dv"]) <= 128 and not _clipped(key))


@_of_each(heuristic, "forward_packed")
@_of_each(heuristic, "backward_packed")
def _packed(key: Mapping[str, Any]) -> Config:
    tokens, wide = min(key["n"], 32), _wide(key)
    if exact(key):
        units, warps = (4, 4) if tokens * wide <= 16 * 16 else (1, 2) if tokens * wide <= 16 * 64 else (1, 8)
        if tokens == wide == 32:
            warps = 4
    else:
        units = 4 if tokens * wide <= 16 * 64 else 2 if tokens * wide <= 32 * 64 else 1
        warps = 4 if tokens * wide >= 32 * 128 or wide > 128 else units
        if tokens == 32 and not key["wide"]:
            units, warps = 1, 4 if key["arch"] in ROOMY else 8
    return {"UNITS": units, "TOKENS": tokens, "num_warps": warps, "num_stages": 1}


@_of_each(heuristic, "forward_rows")
def _forward_rows(key: Mapping[str, Any]) -> Config:
    n, wide = key["n"], _wide(key)
    config = {"BLOCK_M": 64, "BLOCK_N": 64, "Q_BLOCKS": 1, "num_warps": 4, "num_stages": 1}
    if exact(key):
        return {**config, "BLOCK_M": 32, "BLOCK_N": 16, "num_warps": 4 if wide <= 128 else 8}
    if key["dtype"] == "tf32":
        return {**config, "BLOCK_N": 32 if wide <= 64 else 16, "num_warps": 4 if wide <= 64 else 8}
    if n <= 64 and wide <= 128:
        return config
    if n > 128 and wide <= 64 and key["arch"] == "sm_90" and key["wide"] and not key["bias"]:
        return config  # measured on an H100: twice the warps that a row of 256 scores leaves room for
    # A whole row of 256 scores has to find room beside its operands.
    if n <= (256 if key["arch"] in ROOMY and key["wide"] and not key["bias"] else 128) and wide <= 64:
        return {**config, "BLOCK_N": n, "Q_BLOCKS": n // 64}
    if wide <= 64:
        return {**config, "num_stages": 2}
    roomy = wide <= 128 and key["wide"]
    return {**config, "BLOCK_N": 32, "num_warps": 4 if roomy else 8, "num_stages": 2 if roomy else 1}


@_of_each(heuristic, "backward_unit")
def _backward_unit(key: Mapping[str, Any]) -> Config:
    # MAX_TOKENS: the largest group that this kernel takes; backward_blocks takes the others.
    wide, nvidia = _wide(key), key["arch"].startswith("sm_")
    cramped = not half(key) and key["arch"] != "interpreter"
    # A bias and its gradient are two tiles more; narrow loads take a register for every address.
    cramped |= bool(key["bias"]) and (key["arch"] not in ROOMY or (nvidia and (wide > 64 or not key["wide"])))
    cramped |= wide > 128 or (wide > 64 and nvidia and key["arch"] not in ROOMY)
    # Which tokens of a window lie where, and inside the map, takes registers too.
    cramped |= nvidia and _clipped(key) and wide > 32
    windows = "clipped" in key  # of patches and of two maps it is not a part of the key
    few = key["arch"] in ("sm_100", "sm_103") or (key["arch"] == "sm_90" and key["dtype"] == "f16")
    warps = 8 if key["bias"] and windows and few else 4
    return {"MAX_TOKENS": 0 if cramped else 64, "BLOCK": 64, "num_warps": warps, "num_stages": 1}


@_of_each(heuristic, "backward_blocks")
def _backward_blocks(key: Mapping[str, Any]) -> Config:
    # FUSED_TOKENS: up to this many tokens, one program takes both phases of a unit if units fill the machine.
    wide = _wide(key)
    config = {"Q_BLOCK_M": 64, "Q_BLOCK_N": 64, "K_BLOCK_M": 32, "K_BLOCK_N": 64, "FUSED_TOKENS": 256}
    config |= {"num_warps": 4, "num_stages": 1}
    if exact(key):
        size = 32 if wide <= 64 else 16
        config |= {"Q_BLOCK_M": size, "Q_BLOCK_N": 16, "K_BLOCK_M": 16, "K_BLOCK_N": size}
        few = (wide <= 32 and key["bias"]) or (wide > 128 and key["arch"].startswith("gfx"))
        config["num_warps"] = 4 if few else 8
    elif key["dtype"] == "tf32":
        config |= (
            {"Q_BLOCK_N": 32 if wide <= 32 or key["arch"] in ROOMY else 16}
            if wide <= 64
            else {
                "Q_BLOCK_N": 16,
                "K_BLOCK_M": 16,
                "K_BLOCK_N": 32 if key["arch"] in ROOMY else 16,
                "FUSED_TOKENS": 0,
                "num_warps": 8,
            }
        )
        if _clipped(key) or "unequal" in key:
            config["K_BLOCK_M"] = 16
    elif wide > 128:
        rows, keys = (16, 16) if key["arch"].startswith("gfx") else (32, 32)
        config |= {"Q_BLOCK_M": rows, "Q_BLOCK_N": keys, "K_BLOCK_M": rows, "K_BLOCK_N": 32, "num_warps": 8}
    elif _wide_values(key) and key["arch"] in ROOMY:
        config |= {"Q_BLOCK_N": 32}
    elif wide > 64:
        rows, keys = (64, 16) if key["arch"].startswith("gfx") else (32, 32)
        config |= {"Q_BLOCK_M": rows, "Q_BLOCK_N": keys, "K_BLOCK_M": 16, "num_warps": 8}
        config |= {"K_BLOCK_N": 32} if key["bias"] or not key["wide"] else {}
    elif key["bias"] and key["arch"] not in ROOMY and (not key["wide"] or (_clipped(key) and wide > 32)):
        config |= {"Q_BLOCK_M": 32, "Q_BLOCK_N": 32, "K_BLOCK_M": 16, "K_BLOCK_N": 32}
    elif not key["arch"].startswith("gfx"):
        config |= {"Q_BLOCK_N": 32}
        tight = _clipped(key) and (wide > 32 or not key["wide"] or key["arch"] != "sm_90")
        narrow = not key["wide"] and (wide > 32 or key["bias"])
        if tight or narrow or (key["bias"] and key["arch"] not in ROOMY):
            config |= {"K_BLOCK_M": 16}
    return config


@_of_each(heuristic, "bias_partials")
def _bias_partials(key: Mapping[str, Any]) -> Config:
    wide = _wide(key)
    if key["dtype"] == "tf32" and wide > 64:
        return {"BLOCK_M": 32, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1}
    if key["dtype"] == "f32" and not key["wide"]:
        return {"BLOCK_M": 32, "BLOCK_N": 16, "num_warps": 8, "num_stages": 1}
    rows = 64 if (wide <= 64 or _wide_values(key)) and half(key) else 32
    return {"BLOCK_M": rows, "BLOCK_N": 32, "num_warps": 8, "num_stages": 1}


# Windows of up to 32 pixels are in no model.
@candidates(PATCH, "forward_packed")
@candidates(PATCH, "backward_packed")
def _packed_candidates(key: Mapping[str, Any]) -> list[Config]:
    return [{"UNITS": units, "num_warps": warps} for units in (1, 2, 4, 8) for warps in (1, 2, 4) if warps <= 2 * units]


@_of_each(candidates, "forward_rows")
def _forward_rows_candidates(key: Mapping[str, Any]) -> list[Config]:
    n = min(key["n"], 256)
    found = [
        {"BLOCK_M": m, "BLOCK_N": block, "Q_BLOCKS": q, "num_warps": warps, "num_stages": stages}
        for m, warps in ((64, 4), (128, 4), (128, 8), (32, 2), (64, 2))
        for block in sorted({32, 64, 128, n})
        for q in ((1, max(1, n // m)) if block >= n else (1,))
        for stages in ((1,) if block >= n and key["n"] <= 256 else (1, 2, 3))
        if m <= max(n, 64) and block <= max(n, 64)
    ]
    return [config for index, config in enumerate(found) if config not in found[:index]]


@_of_each(candidates, "backward_unit")
def _backward_unit_candidates(key: Mapping[str, Any]) -> list[Config]:
    if key["n"] not in (64, 128):
        return []
    block = {"MAX_TOKENS": key["n"], "BLOCK": key["n"]}
    return [{**block, "num_warps": warps} for warps in (2, 4, 8)] + [{"MAX_TOKENS": 0}]


@_of_each(candidates, "backward_blocks")
def _backward_blocks_candidates(key: Mapping[str, Any]) -> list[Config]:
    return [
        {"Q_BLOCK_M": qm, "Q_BLOCK_N": qn, "K_BLOCK_M": km, "K_BLOCK_N": kn, "FUSED_TOKENS": fused,
         "num_warps": warps, "num_stages": stages}
        for (qm, kn, warps) in ((64, 64, 4), (128, 128, 8), (32, 32, 2), (64, 64, 8), (64, 64, 2))
        for qn in (32, 64)
        for km in (16, 32, 64)
        for stages in (1, 2)
        for fused in ((0, 256) if key["n"] <= 256 else (0,))
    ]  # fmt: skip


@_of_each(candidates, "bias_partials")
def _bias_partials_candidates(key: Mapping[str, Any]) -> list[Config]:
    return [{"BLOCK_M": m, "BLOCK_N": n, "num_warps": w} for m in (32, 64) for n in (32, 64) for w in (4, 8)]
