"""Whether the one kernel is predicted to be faster than three, from data sheets and instruction counts.

Nothing of this was measured on a GPU. In cycles of one processor, for a batch that all share: each of the three
kernels (expansion, depthwise convolution, projection, each with its activation in it, which is less than PyTorch does)
takes what its bytes or its products take, whichever is more, and a launch. The one kernel moves x and the result alone
from and to memory, but makes the expanded map at the border of a tile again for its neighbours, and stores and reads it
through the second-level cache: it takes what its bytes take, or a sum for as many tiles as the busiest processor has,
and a launch. Of the sum are BUSY times what its instructions, its exponentials, its matrix products or the bytes of
that cache take, whichever is most, and WAITING cycles for each of the steps that follow each other. Needs no Triton.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mvkernels.ops.common.activations import EXPONENTIAL


@dataclass(frozen=True)
class Peaks:
    """What a processor does in a cycle, and how many there are (NVIDIA's data sheets and architecture white papers)."""

    processors: int
    bytes: float
    """Of the memory; of the second-level cache CACHED times as many."""
    flops: float
    """Of half types on matrix units, by mma.sync; half of it in tf32."""
    cache: float
    """Bytes of the second-level cache."""


PEAKS = {
    "sm_80": Peaks(108, 13.4, 2048, 40e6),  # A100: 2.04 TB/s, 1.41 GHz
    "sm_86": Peaks(84, 6.2, 1024, 6e6),  # A10, RTX 3090: 600 to 936 GB/s, 1.7 GHz
    "sm_89": Peaks(128, 3.0, 1024, 72e6),  # L40S, RTX 4090: 864 to 1008 GB/s, 2.5 GHz
    "sm_90": Peaks(132, 13.7, 2560, 50e6),  # H100: 3.35 TB/s, 1.85 GHz; five eighths of its wgmma
    "sm_100": Peaks(148, 27.0, 2560, 126e6),  # B200: 8 TB/s, 2 GHz
}
_ISSUED, _EXPONENTIALS, _EXACT = 128, 16, 256
"""Instructions of threads, exponentials or divisions, and exact float32 operations, a cycle and processor."""
CACHED = 3
LAUNCH = 5000
"""Cycles from the end of a kernel to the first results of the next."""
REACHED = 0.7
"""Of the peaks of instructions and matrix units, by either."""
BUSY, WAITING = 0.87, 620
"""Of the time of the busiest unit what counts, and cycles that a step waits: by least squares from what
benchmarks/predict.py finds in the code compiled for an H100, in bfloat16, at the models' 14 shapes of 3 x 3 at batch
128. Of these the formula gives 0.71 to 1.18 times the cycles."""
MARGIN = 0.8
INSTRUCTIONS = {"": 0, "relu": 1, "relu6": 2, "hardswish": 4, "silu": 5, "gelu_tanh": 8, "gelu": 14}
"""Of an activation, as counted in the kernel's code for sm_90."""
OTHERS = 8
"""Of an element of the expanded map, or of the depthwise sums: bias, rounding, stores, addresses and masks."""


def _flops(key: Mapping[str, Any], peaks: Peaks) -> float:
    rates = {"f16": peaks.flops, "bf16": peaks.flops, "tf32": peaks.flops / 2}
    return rates.get(key["dtype"], _EXACT) * REACHED


def _itemsize(key: Mapping[str, Any]) -> int:
    return 2 if key["dtype"] in ("f16", "bf16") else 4


def three_kernels(key: Mapping[str, Any], peaks: Peaks) -> float:
    """Cycles of the three kernels."""
    pixels, hidden, outputs, item = key["n"] / peaks.processors, key["h"], key["o"], _itemsize(key)
    before, after = pixels * key["s"] ** 2 * hidden, pixels * hidden  # elements of the maps between
    x, out = before / hidden * (key["c"] or hidden), pixels * outputs * (1 + key["residual"])

    def moved(between: float, others: float) -> float:
        # Of a map that stays in the cache the next kernel reads what it needs from there.
        near = between * item * peaks.processors < peaks.cache / 2
        return item * (between / (CACHED if near else 1) + others) / peaks.bytes

    flops = _flops(key, peaks)
    taps = (key["k"] ** 2 + INSTRUCTIONS[key["act"]] + 4) / _ISSUED / REACHED
    times = [max(moved(after, out), 2 * outputs * after / flops)]
    if key["c"]:
        times.append(max(moved(before, x), 2 * key["c"] * before / flops))
        times.append(max(moved(before + after, 0), taps * after))
    else:
        times.append(max(moved(after, x), taps * after))
    return sum(times) + LAUNCH * len(times)


def one_kernel(key: Mapping[str, Any], config: Mapping[str, Any], peaks: Peaks) -> float:
    """Cycles of the one kernel in this configuration."""
    side, stride, act, item = key["k"], key["s"], key["act"], _itemsize(key)
    places = config["TY"] * config["TX"]
    sides = [(config[axis] - 1) * stride + side for axis in ("TY", "TX")]
    # Of the expanded map, blocks a tile, and elements for each one of the depthwise sums.
    expanded = math.ceil(math.prod(sides) / config["BLOCK_M"]) if key["c"] else 0
    reach = expanded * config["BLOCK_M"] / places
    tiles = math.ceil(key["n"] / places) * math.ceil(key["o"] / config["BLOCK_O"])
    elements = math.ceil(tiles / peaks.processors) * places * key["h"]
    read = ((config["SX"] - 1) * stride + side) * side / config["SX"]  # for each of the sums
    instructions = reach * (INSTRUCTIONS[act] + OTHERS) + 1.2 * read + side**2 + INSTRUCTIONS[act] + OTHERS
    exponentials = 2 * (reach + 1) * (act in EXPONENTIAL)
    flops = 2 * (reach * key["c"] + config["BLOCK_O"])
    cached = 2 * reach * item / (CACHED * peaks.bytes)
    each = max(
        instructions / _ISSUED / REACHED, exponentials / _EXPONENTIALS / REACHED, flops / _flops(key, peaks), cached
    )
    chunks = (1 + math.ceil(key["c"] / config["CHUNK"])) / 2
    steps = math.ceil(key["h"] / config["BLOCK_H"]) * (2 + expanded * chunks)
    time = BUSY * elements * each + WAITING * steps * math.ceil(tiles / peaks.processors / config["PROGRAMS"])
    pixels = key["n"] / peaks.processors
    x, out = pixels * stride**2 * (key["c"] or key["h"]), pixels * key["o"]
    return max(time, (x + out) * item / peaks.bytes) + LAUNCH


def worthwhile(key: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    """Whether the one kernel in this configuration is predicted to take less than MARGIN of what the three take.

    ``key`` is that of configs.py with ``n`` (pixels of the results), ``act`` (the activation's name or "") and
    ``residual`` (1 or 0). False for devices of which nothing is known here.
    """
    peaks = PEAKS.get(key["arch"])
    return peaks is not None and one_kernel(key, config, peaks) < MARGIN * three_kernels(key, peaks)
