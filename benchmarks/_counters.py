"""What Nsight Compute (ncu --csv --page details) says of each kernel, as rows."""

from __future__ import annotations

import collections
import csv
import io
import math
from typing import Any

COUNTED = {
    "patch_attention": ("channels_last", "4x36_32", "4x48_16", "4x60_8", "24x32"),
    "window_attention": ("channels_last", "3x32_56x56_w7s3", "6x32_96x96_w12"),
    "mobile_to_former": ("channels_last", "2x24_28x28_m6"),
    "former_to_mobile": ("channels_last", "2x24_28x28_m6"),
    "relu_linear_attention": ("channels_last", "16x16_32x32"),
    "multiscale_linear_attention": ("channels_last", "8x16_32x32"),
    "patch_transformer_layer": ("channels_last", "4x36_32"),
    "inverted_residual": ("channels_last", "32-128-64_128x128_k3_s2", "64-256-64_32x32_k3_s1"),
}
"""Layout and shapes of each op whose kernels' hardware counters are read, at batch 128."""
COLUMNS = {
    "Duration": "ns",
    "Compute (SM) Throughput": "sm_percent",
    "DRAM Throughput": "dram_percent",
    "L2 Cache Throughput": "l2_percent",
    "L1/TEX Cache Throughput": "l1_percent",
    "L1/TEX Hit Rate": "l1_hit_percent",
    "Achieved Occupancy": "occupancy_percent",
    "Theoretical Occupancy": "most_occupancy_percent",
    "Registers Per Thread": "registers",
    "Executed Instructions": "warp_instructions",
    "Warp Cycles Per Issued Instruction": "cycles_per_instruction",
}
"""Metrics, and the columns that they go to."""


def rows(text: str) -> list[dict[str, Any]]:
    """A row for each kernel of a log, the first launch of each kernel and grid; none of one that was cut off."""
    begin = text.find('"ID"')
    if begin < 0:
        return []
    found: dict[tuple[str, str, str], dict[str, Any]] = collections.defaultdict(dict)
    for line in csv.DictReader(io.StringIO(text[begin:])):
        column = COLUMNS.get(line["Metric Name"] or "")
        if column:
            unit, value = line["Metric Unit"], line["Metric Value"].replace(",", "")
            scale = {"us": 1e3, "ms": 1e6}.get(unit, 1.0) if column == "ns" else 1.0
            found[line["ID"], line["Kernel Name"], line["Grid Size"]][column] = _number(value, scale)
    seen, kept = set(), []
    for (_, kernel, grid), values in found.items():
        if (kernel, grid) not in seen and set(values) == set(COLUMNS.values()) and None not in values.values():
            seen.add((kernel, grid))
            kept.append({"kernel": kernel, "grid": int(grid.strip("()").split(",")[0])} | values)
    return kept


def _number(text: str, scale: float) -> float | None:
    try:
        value = float(text) * scale
    except ValueError:
        return None
    return None if math.isnan(value) else value
