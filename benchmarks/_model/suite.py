"""The calls that are predicted: ops at the models' shapes, forward and backward, as the library launches them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

try:  # the commit whose times were measured has them here
    from mvkernels import launch as module
    from mvkernels.backend import can_run
    from mvkernels.registry import OPS
except ImportError:
    from mvkernels.dispatch.backend import can_run
    from mvkernels.dispatch.registry import OPS
    from mvkernels.triton import configs as module
from _model import library, work
from _model.calls import Launch, watched
from _model.devices import Device
from mvkernels import testing

LARGEST = 1 << 28
"""Elements of a call's first tensor, as in gpu_kernels.py."""


@dataclass(frozen=True)
class Call:
    """A shape in a layout, at a batch."""

    op: str
    case: Any
    layout: str
    batch: int
    dtype: str
    backend: str = "triton"

    def __str__(self) -> str:
        return f"{self.op} {self.backend} {self.case.model} {self.case.label} {self.layout} {self.dtype} {self.batch}"


@dataclass(frozen=True)
class Pass:
    """The forward, or the backward alone, of a call: what it launches, and the floor of the op."""

    mode: str
    """"fwd", "bwd"."""
    launches: Sequence[work.Work]
    others: Sequence[library.Called]
    """Kernels of PyTorch's."""
    bytes: int
    flops: int
    exponentials: int


def calls(
    ops: Sequence[str],
    batches: Sequence[int],
    dtypes: Sequence[str],
    shapes: Sequence[str],
    layouts: Sequence[str] = (),
    backends: Sequence[str] = ("triton",),
) -> list[Call]:
    """Those of the suite whose names have one of ``shapes`` in them, and that are not too large; for each backend that
    the op has kernels on."""
    found = []
    for name in ops:
        for case in OPS[name].suite("full"):
            if shapes and not any(part in f"{case.model} {case.label}" for part in shapes):
                continue
            for layout in (each for each in case.layouts if each in (layouts or case.layouts)):
                alone = case.make(batch=1, dtype=torch.float32, device="meta", layout=layout)
                elements = next(iter(testing.tensors_in(alone).values())).numel()
                found += [
                    Call(name, case, layout, batch, dtype, backend)
                    for dtype in dtypes for batch in batches if batch * elements <= LARGEST
                    for backend in backends if backend in OPS[name].why_not
                ]  # fmt: skip
    return found


def passes(call: Call, device: Device) -> list[Pass]:
    """Count what a call launches, forward and backward; nothing if the backend does not take it."""
    op = OPS[call.op]
    arguments = call.case.make(batch=call.batch, dtype=getattr(torch, call.dtype), device="cpu", layout=call.layout)
    wanted = {name: value.detach().requires_grad_() for name, value in testing.tensors_in(arguments).items()}
    leaves = testing.with_tensors(arguments, wanted)
    pretended = module.Device(device.name, device.arch, device.processors)
    written: dict[int, int] = {}
    log: list[work.Work] = []
    others: list[library.Called] = []

    def watch(launch: Launch) -> None:
        with _disable_current_modes():  # what counts a launch is none of its kernels
            log.append(work.of(launch, device, written))

    def passed(backward: bool) -> Pass:
        # What was launched since the one before.
        cost, launches = op.cost(arguments, backward), (tuple(log), tuple(others))
        log.clear()
        others.clear()
        return Pass("bwd" if backward else "fwd", *launches, cost.bytes, cost.flops, cost.exponentials)

    found = []
    with watched(device.arch, pretended, list(OPS.values()), watch, module):
        if call.backend == "cuda" and not can_run(call.op, "cuda", **arguments)[0]:
            return []
        with library.Watch(others.append):
            out = op.function(**leaves, backend=call.backend)
        found.append(passed(False))
        if has_backward(op) and out.requires_grad:
            grad = torch.zeros_like(out)
            with library.Watch(others.append):
                torch.autograd.grad(out, list(wanted.values()), grad, allow_unused=True)
            found.append(passed(True))
    return found


def has_backward(op: Any) -> bool:
    """Whether the op's Triton kernels have one."""
    return bool(op.has_backward("triton")) if hasattr(op, "has_backward") else True
