"""The torch operators that calls of this library's ops end in."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


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
