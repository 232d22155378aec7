"""What a launch asks of each unit of a GPU, counted: the model's input, without any time in it but cycles of pipes."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass, field
from typing import Any

import torch
from _machine_code import PROCESSORS, occupancy, taken

from _model import counts, sass, units, warps
from _model.calls import Launch
from _model.devices import Device
from tests.ptx import counting

SAMPLE = 4
"""Blocks of a grid that are executed."""
WHOLE = "attention_order_"
"""How kernels begin of which all blocks are: how often later ones look for a maximum depends on what they leave."""
NEAR, FAR = 0.0, 1000.0
"""Cycles of a global load for which the time of a warp alone is had; between them it is linear enough."""


@dataclass(frozen=True)
class Work:
    """Of one launch."""

    kernel: str
    grid: int
    warps: int
    """Of a block."""
    registers: int
    spilled: int
    """Bytes of a thread."""
    shared_bytes: int
    resident: int
    """Blocks that a processor holds."""
    limited_by: str
    instructions: dict[str, float] = field(default_factory=dict)
    """Of a warp, by class (units.py)."""
    pipes: dict[str, float] = field(default_factory=dict)
    """Cycles of a warp, by pipe of a scheduler."""
    alone: tuple[float, float] = (0.0, 0.0)
    """Cycles of a warp alone on a processor, with loads that take NEAR and FAR cycles."""
    wavefronts: float = 0.0
    """Of a block, over shared memory."""
    exchanges: float = 0.0
    """Shuffles of a block."""
    passes: float = 0.0
    """Of a block, over the first-level cache, for its requests to global memory."""
    hit: float = 0.0
    """Of the sectors loaded, those in the first-level cache."""
    cached_bytes: float = 0.0
    """Of the launch, between processors and second-level cache."""
    moved_bytes: float = 0.0
    """Of the launch, between second-level cache and memory."""
    once_bytes: float = 0.0
    """The launch's tensors, or what it touches of them, once."""
    matrix_flops: float = 0.0
    """Of the launch, padding included."""

    @property
    def warp_instructions(self) -> float:
        """Of the launch."""
        return sum(self.instructions.values()) * self.warps * self.grid


_CODE: dict[tuple[bytes, str], tuple[sass.Code, tuple[int, int, int]]] = {}


def code_of(launch: Launch) -> tuple[sass.Code, tuple[int, int, int]]:
    """The machine code, and its registers, spills and stack."""
    key = launch.cubin, launch.kernel
    if key not in _CODE:
        _CODE[key] = sass.parse(sass.disassembled(launch.cubin), launch.kernel), taken(launch.cubin, launch.kernel)
    return _CODE[key]


def of(launch: Launch, device: Device, written: MutableMapping[int, int]) -> Work:
    """Count a launch.

    Args:
        launch: its tensors lie on the CPU; some blocks are executed on them.
        device: what it runs on.
        written: bytes of each storage, by its address, that launches of this call have stored: they are in the
            second-level cache as long as all of them fit half of it. This launch's are added.
    """
    code, (registers, spilled, _) = code_of(launch)
    count = launch.threads // 32
    resident, limited = occupancy(registers, launch.shared_bytes, count, device.arch)
    here = max(1, min(resident, -(-launch.grid // device.processors)))
    taken_by_blocks = here * (launch.shared_bytes + PROCESSORS[device.arch].reserved)
    cache = max(device.first_cache - taken_by_blocks, 16 << 10) // here
    whole = launch.kernel.startswith(WHOLE)
    blocks = range(launch.grid) if whole else counting.sample_of(launch.grid, SAMPLE)
    counted = counting.count(
        launch.ptx, "" if launch.alone else launch.kernel, launch.arguments, launch.shared_bytes, blocks, cache
    )
    statements = counted.program.module.statements
    executions = counts.executions(
        code, [each.name for each in statements], [each.source for each in statements],
        counted.executed / (len(blocks) * count),
    )  # fmt: skip
    scale = launch.grid / len(blocks)
    tensors = [each for each in launch.arguments if isinstance(each, torch.Tensor)]
    moved, once = _moved(tensors, counted.traffic * scale, written, device)
    loaded, missed, stored, passes = (float(x) for x in counted.traffic.sum(0))
    by = units.instructions(executions)
    return Work(
        launch.kernel, launch.grid, count, registers, spilled, launch.shared_bytes, resident, limited, by,
        units.pipes(executions), (warps.alone(executions, NEAR), warps.alone(executions, FAR)),
        counted.counters.shared_wavefronts / len(blocks), by.get("exchange", 0.0) * count, passes / len(blocks),
        1 - missed / loaded if loaded else 0.0, 32 * scale * (missed + stored), moved, once,
        counted.counters.matrix_flops * scale,
    )  # fmt: skip


def _moved(
    tensors: list[torch.Tensor], traffic: Any, written: MutableMapping[int, int], device: Device
) -> tuple[float, float]:
    """Bytes between second-level cache and memory, and bytes that are touched, each once."""
    moved = once = 0.0
    kept = sum(written.values()) <= device.cache / 2
    for tensor, (_, missed, stored, _) in zip(tensors, traffic, strict=True):
        # Of a sector a strided tensor may have only a part.
        size = tensor.numel() * tensor.element_size()
        loaded, put = min(32.0 * missed, size), min(32.0 * stored, size)
        storage = tensor.untyped_storage().data_ptr()
        moved += put + (0.0 if kept and storage in written else loaded)
        once += loaded + put
        if put:
            written[storage] = max(written.get(storage, 0), int(put))
    return float(moved), float(once)
