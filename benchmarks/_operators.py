"""The torch operators that calls of this library's ops end in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mvkernels import testing
from mvkernels.dispatch.registry import Op


class Recorded(TorchDispatchMode):
    """Keeps the calls of this library's operators, as (operator, arguments)."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    @property
    def kernels(self) -> list[tuple[Any, tuple[Any, ...]]]:
        """The calls, without those that pack weights."""
        return [call for call in self.calls if not call[0].__name__.endswith("_pack.default")]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace.startswith("mvkernels_"):
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def of_call(op: Op, arguments: Mapping[str, Any]) -> Iterator[tuple[str, Any, tuple[Any, ...]]]:
    """(mode, operator, arguments) of a call without gradients, and of the backward of one if there is any."""
    with Recorded() as recorded, torch.no_grad():
        op.function(**arguments, backend="cpp")
    for call in recorded.kernels:  # several, if the op is made of others
        yield ("fwd", *call)
    if not op.has_backward("cpp"):
        return
    leaves = [v.requires_grad_() for v in testing.tensors_in(arguments).values()]
    with Recorded() as recorded:
        out = op.function(**arguments, backend="cpp")
        torch.autograd.grad(out, leaves, torch.randn_like(out))
    yield ("bwd", *recorded.calls[1])
