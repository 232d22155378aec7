"""What an op is made of. Tests, verify, bench and the CLI walk ``OPS`` and need nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch


class NotOffered(Exception):
    """Raised by a peer that does not do this: the benchmark skips it, and shows the message."""


@dataclass(frozen=True)
class Cost:
    """The least that the machine must do for one call: see the table of floors in docs/."""

    bytes: int
    flops: int
    exponentials: int

    def seconds(self, copy_bandwidth: float, flops: float) -> float:
        """Lower bound in seconds for a copy bandwidth (B/s) and a peak rate (FLOP/s)."""
        return max(self.bytes / copy_bandwidth, self.flops / flops)


@dataclass(frozen=True)
class Case:
    """One shape of an op: what it is taken from, and how its arguments are made."""

    label: str
    model: str
    make: Callable[..., dict[str, Any]]
    """``make(batch=1, dtype=torch.float32, device="cpu", layout=None, seed=0)`` -> the op's arguments by name."""
    layouts: tuple[str, ...] = ("channels_last",)
    """The layouts that the model has; the first is the default."""
    shape: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Composed:
    """The same as an op does, of this library's other ops and PyTorch's. ``tune`` measures which of the two is faster,
    and notes it as FUSED of a configuration, by which modules choose."""

    function: Callable[..., torch.Tensor]
    """Takes the op's arguments, ``backend`` too."""
    kernel: str
    """The name under which the configuration is."""
    key: Callable[[Mapping[str, Any], bool], Mapping[str, Any]]
    """``key(arguments, grad)``: of these arguments, for the forward alone, or for forward and backward."""


@dataclass(frozen=True)
class Op:
    """A fused op and all that is said of it. Registered once, by its folder's ``__init__``."""

    name: str
    function: Callable[..., torch.Tensor]
    """The public function."""
    reference: Callable[..., torch.Tensor]
    """Plain PyTorch. Takes the op's arguments without ``backend``, and ``compute_dtype``."""
    check: Callable[..., tuple[Any, ...]]
    """Checks the op's arguments, in order, and returns them normalised; raises TypeError, ValueError."""
    maps: tuple[str, ...]
    """The arguments that are maps, (B, heads, head_dim, H, W) or (B, C, H, W)."""
    why_not: Mapping[str, Callable[..., str | None]]
    """For each backend with a kernel: why it cannot run these checked arguments, or None."""
    suite: Callable[[str], list[Case]]
    """``suite("small" | "full")``: the shapes that verify and bench run."""
    peers: Mapping[str, Callable[..., torch.Tensor]]
    """The same work done without this library, by name: takes the op's arguments without ``backend``."""
    cost: Callable[[Mapping[str, Any], bool], Cost]
    """``cost(arguments, backward)``: floor of the forward, or of the backward alone."""
    third_party: Mapping[str, Callable[..., torch.Tensor]] = field(default_factory=dict)
    """Peers that need another package, or a device, as ``peers``. They import it when they are called, and raise
    ImportError where it is missing, NotOffered for arguments that it has no code for."""
    composed: Composed | None = None
    """Where a module has the choice between this op and others of the library."""


OPS: dict[str, Op] = {}


def register(op: Op) -> Op:
    """Make an op known to backend choice, verify, bench and the tests."""
    if op.name in OPS:
        raise ValueError(f"op {op.name} is registered already")
    OPS[op.name] = op
    return op
