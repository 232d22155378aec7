"""Default launch configurations of the Triton kernels of mobile_to_former and former_to_mobile. Needs no Triton.

A key has ``d`` (head_dim), ``m`` (tokens, rounded up to 16, of mobile_to_former to 8 or 16; 32 stands for all above),
``dtype`` (``f16``, ``bf16``, ``f32`` for exact float32 products, ``tf32``, ``f64``), ``last`` (1 for a channels-last
map) and ``arch``. ``BLOCK`` is the most pixels of a tile, ``PROGRAMS`` how many programs a processor should get before
the pixels of a unit stay in one; of the kernels for wide heads ``SLICE`` is how many channels a program sums, ``DEPTH``
how many it adds to a score at a time. What the backward of mobile_to_former finds of a row of scores it finds with the
configuration of its gradients. The choices here are those that `make audit` shows to need no spills on every
architecture it compiles for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mvkernels.triton.configs import Config, candidates, half, heuristic, tiles_to_try
from mvkernels.triton.maps import width

# Tokens of a block: the fewest that matrix instructions take.
TOKENS = 16

# The widest heads whose tiles fit the registers whole; exact products hold their operands there. Few and many tokens.
_ONE_PIECE = {"tf32": (96, 96), "f32": (64, 32), "f64": (32, 16)}

TO_FORMER, TO_MOBILE = "mobile_to_former", "former_to_mobile"


def _config(key: Mapping[str, Any], elements: int, most: int) -> Config:
    # ``elements``: of a tile (pixels x channels) that four warps can hold beside what they sum.
    wide = width(key["d"])
    # Wide types take more registers, and operands of products on the ordinary cores more still.
    share = {"tf32": 2, "f32": 2, "f64": 4}.get(key["dtype"], 1)
    few = wide <= {"tf32": 64, "f32": 32, "f64": 0}.get(key["dtype"], 128)
    if key["m"] > TOKENS and key["dtype"] in ("f32", "f64"):
        share, few = 2 * share, few and wide <= 16
    elements, most = elements // share, most // share
    block = max(16, min(most, 1 << (elements // wide).bit_length() - 1))
    return {"BLOCK": block, "PROGRAMS": 4, "num_warps": 4 if few else 8, "num_stages": 1}


# A tile of 64 pixels is a row of products for each of four warps, which would else compute the same ones; it is all of
# the smallest maps.
@heuristic(TO_MOBILE, "forward_pixels")
def _forward_pixels(key: Mapping[str, Any]) -> Config:
    if key["last"] and half(key):
        return _config(key, 8192, 64 if _few(key) and width(key["d"]) > 32 else 128)
    return _config(key, 4096, 128)


@heuristic(TO_FORMER, "forward_slices")
def _forward_slices(key: Mapping[str, Any]) -> Config:
    if not _few(key):
        return _slices(key)
    # A single warp waits for no other: what it finds of its pixels is put together at the end. Sums of wide heads do
    # not fit its registers.
    if width(key["d"]) <= 64:
        return {"BLOCK": 64, "PROGRAMS": 8, "num_warps": 1, "num_stages": 3}
    return {"BLOCK": 128 if width(key["d"]) <= 96 else 64, "PROGRAMS": 4, "num_warps": 4, "num_stages": 3}


# ALONE: a map stays in one program where three quarters of the processors have one; it then needs no other launch.
# PARTS: of the pixels of a tile, for the products that sum over them.
@heuristic(TO_FORMER, "backward_slices")
def _backward_slices(key: Mapping[str, Any]) -> Config:
    if not _few(key):
        return _slices(key) | {"ALONE": 0, "PARTS": 1}
    warps = 8 if width(key["d"]) <= 32 else 4
    return {"BLOCK": 16 * warps, "PROGRAMS": 1, "ALONE": 1, "PARTS": warps, "num_warps": warps, "num_stages": 3}


def _slices(key: Mapping[str, Any]) -> Config:
    most = 8192 if _by_warps(key) and key["last"] and key["m"] <= TOKENS else 4096
    return _config(key, most if half(key) else 2048, 64)


def _few(key: Mapping[str, Any]) -> bool:
    """Whether tiles are copied to shared memory while others are computed.

    That takes one block of tokens, a half type and contiguous channels.
    """
    last = key["last"] and key["d"] <= 192 and key["arch"].startswith(("sm_", "interpreter"))
    return bool(last and half(key) and key["m"] <= TOKENS)


@heuristic(TO_MOBILE, "backward_slices")
def _slices_of_two(key: Mapping[str, Any]) -> Config:
    # Two maps are read; narrow loads take a register for every address.
    most = 2048 if key["last"] or not half(key) else 1024
    if half(key) and _by_warps(key) and key["m"] <= TOKENS:
        most = 2048 if not key["last"] else 4096 if width(key["d"]) <= 64 else 8192
    config = _config(key, most, 64)
    if config["BLOCK"] * width(key["d"]) > 4096:
        config["num_warps"] = 8
    # Steps in which little is computed wait for what they load.
    return config | {"num_stages": 2} if half(key) and width(key["d"]) <= 32 else config


def _by_warps(key: Mapping[str, Any]) -> bool:
    """Whether four warps multiply together, 64 rows at a time, with an operand in shared memory: large tiles fit."""
    return str(key["arch"]).startswith(("sm_9", "sm_10"))


def tokens_at_once(key: Mapping[str, Any]) -> int:
    """Tokens of a block. Half a tile of 16 would be padding for Mobile-Former: NVIDIA's products take 8 columns too.

    Not those of float64: Triton 3.6 stops at a failed assertion.
    """
    few = key["m"] == 8 and key["dtype"] != "f64" and key["arch"].startswith(("sm_", "interpreter"))
    return 8 if few else TOKENS


def rounded(op: str, tokens: int) -> int:
    """``m`` of a key. Where former_to_mobile took 8 its products would be of two kinds, with layouts apart."""
    return next((m for m in (8, TOKENS) if tokens <= m and (m > 8 or op == TO_FORMER)), 2 * TOKENS)


def is_wide(key: Mapping[str, Any]) -> bool:
    """Whether a head goes in pieces, to the kernels ``forward_wide`` and ``backward_wide``."""
    # Half types: with many tokens the backward spills where products take their operands from registers (gfx942).
    # And where channels are not contiguous, with any number: narrow loads take a register for every address.
    few = 256 if key["last"] or not key["arch"].startswith("sm_") else 128
    many = min(few, 256 if key["arch"].startswith("sm_") else 128)
    return bool(key["d"] > _ONE_PIECE.get(key["dtype"], (few, many))[key["m"] > TOKENS])


@heuristic(TO_FORMER, "forward_wide")
@heuristic(TO_MOBILE, "forward_wide")
def _wide(key: Mapping[str, Any]) -> Config:
    block, piece, depth, warps = {"tf32": (32, 64, 32, 4), "f64": (16, 32, 16, 8)}.get(key["dtype"], (32, 64, 32, 8))
    if key["arch"] == "interpreter":  # no registers to run out of
        block = piece = depth = 64
    return {"BLOCK": block, "SLICE": piece, "DEPTH": depth, "PROGRAMS": 8, "num_warps": warps, "num_stages": 1}


@heuristic(TO_FORMER, "backward_wide")
@heuristic(TO_MOBILE, "backward_wide")
def _wide_gradients(key: Mapping[str, Any]) -> Config:
    config = _wide(key)
    # They hold more than the forward: sums for keys and for values, or what is known of the rows of scores. Narrow
    # loads take a register for every address.
    if half(key) and not key["last"]:
        return config | {"SLICE": config["SLICE"] // 2, "num_warps": 4}
    if key["dtype"] == "tf32":
        return config | {"BLOCK": config["BLOCK"] // 2}
    return config | {"SLICE": config["SLICE"] // 2} if key["dtype"] == "f64" else config


@candidates(TO_FORMER, "forward_slices")
@candidates(TO_FORMER, "backward_slices")
@candidates(TO_MOBILE, "forward_pixels")
@candidates(TO_MOBILE, "backward_slices")
def _candidates(key: Mapping[str, Any]) -> list[Config]:
    return tiles_to_try(width(key["d"]), (32, 64, 128, 256))
