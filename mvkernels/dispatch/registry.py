"""The registry of ops. Tests, ``verify``, ``bench`` and the command line find the ops in ``OPS``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch


class NotOffered(Exception):
    """Raised by a peer that does not support the arguments. The benchmark skips it and shows the message."""


@dataclass(frozen=True)
class Cost:
    """The least work that one call needs: bytes to read and write, FLOPs and exponentials."""

    bytes: int
    flops: int
    exponentials: int

    def seconds(self, copy_bandwidth: float, flops: float) -> float:
        """Lower bound in seconds for a copy bandwidth (B/s) and a peak rate (FLOP/s)."""
        return max(self.bytes / copy_bandwidth, self.flops / flops)


@dataclass(frozen=True)
class Case:
    """One shape of an op: the model that it comes from, and a function that makes the arguments."""

    label: str
    model: str
    make: Callable[..., dict[str, Any]]
    """``make(batch=1, dtype=torch.float32, device="cpu", layout=None, seed=0)`` -> the op's arguments by name."""
    layouts: tuple[str, ...] = ("channels_last",)
    """The memory layouts that the model uses; the first is the default."""
    shape: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Composed:
    """The computation of an op, composed of other ops of this library and of PyTorch.

    ``tune`` measures which of the two is faster, and stores it as FUSED in a configuration, which modules read.
    """

    function: Callable[..., torch.Tensor]
    """Takes the op's arguments, ``backend`` too."""
    kernel: str
    """The name of the configuration."""
    key: Callable[[Mapping[str, Any], bool], Mapping[str, Any]]
    """``key(arguments, grad)``: of these arguments, for the forward alone, or for forward and backward."""


@dataclass(frozen=True)
class Op:
    """A fused op and what belongs to it. It is registered once, by the ``__init__`` of its folder."""

    name: str
    function: Callable[..., torch.Tensor]
    """The public function."""
    reference: Callable[..., torch.Tensor]
    """Plain PyTorch. Takes the op's arguments without ``backend``, and ``compute_dtype``."""
    check: Callable[..., tuple[Any, ...]]
    """Checks the op's arguments, in order, and returns them normalised; raises TypeError, ValueError."""
    maps: tuple[str, ...]
    """The arguments that are maps, (B, heads, head_dim, H, W) or (B, C, H, W). The first is always given."""
    why_not: Mapping[str, Callable[..., str | None]]
    """For each backend with a kernel: why it cannot run these checked arguments, or None."""
    suite: Callable[[str], list[Case]]
    """``suite("small" | "full")``: the shapes that verify and bench run."""
    peers: Mapping[str, Callable[..., torch.Tensor]]
    """The same work done without this library, by name. A peer takes the op's arguments without ``backend``."""
    cost: Callable[[Mapping[str, Any], bool], Cost]
    """``cost(arguments, backward)``: floor of the forward, or of the backward alone."""
    third_party: Mapping[str, Callable[..., torch.Tensor]] = field(default_factory=dict)
    """Like ``peers``, but these need another package or a device. They import the package when they are called. They
    raise ImportError if it is missing, and NotOffered if it does not support the arguments."""
    forward_only: frozenset[str] = frozenset()
    """The backends whose kernels have no backward. They decline a call that records a gradient."""
    pack: Callable[[Mapping[str, Any]], torch.Tensor] | None = None
    """The weights among these arguments as the argument ``packed``, which callers make once; bench gives it to cpp."""
    choice: Callable[[tuple[Any, ...]], Mapping[str, Any]] | None = None
    """Of an op with kernels in Triton and in CUDA C++: ``choice(arguments)``, of which "auto" makes the key by which it
    chooses between the two (:mod:`mvkernels.cuda.choice`). The arguments are checked, and in order."""
    composed: Composed | None = None
    """The same computation from other ops, if modules choose between the two."""

    @property
    def differentiable(self) -> bool:
        """Whether one of its kernels has a backward."""
        return not self.forward_only.issuperset(self.why_not)

    def has_backward(self, backend: str) -> bool:
        """Whether a call on this backend can be differentiated: the reference's always can."""
        return backend not in self.forward_only


OPS: dict[str, Op] = {}


def register(op: Op) -> Op:
    """Make an op known to backend choice, verify, bench and the tests."""
    if op.name in OPS:
        raise ValueError(f"op {op.name} is registered already")
    OPS[op.name] = op
    return op
