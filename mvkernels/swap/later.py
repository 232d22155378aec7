"""A second result of a swapped module that is computed only when it is used."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from mvkernels.dispatch import checks


class LaterTensor:
    """The tensor ``form(*of)``, computed at its first use: an attribute, an index, an operator or a torch function.

    The result is the same as if it had been computed at once, with the grad mode and autocast of that time, and
    gradients reach ``of``. If a tensor in ``of`` has been changed in place in the meantime, the first use raises
    RuntimeError. An instance is not a ``torch.Tensor`` for ``isinstance``, so code that collects the tensors of an
    output skips it; the tensor is ``.tensor``.
    """

    __slots__ = ("__weakref__", "_formed", "_then")

    def __init__(self, form: Callable[..., Tensor], *of: Tensor) -> None:
        autocast = None
        device = of[0].device.type
        if checks.any_autocast() and checks.has_autocast(device):
            autocast = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        # Tensors of inference mode keep no count of their changes.
        versions = [None if t.is_inference() else t._version for t in of]
        object.__setattr__(self, "_then", (form, of, versions, torch.is_grad_enabled(), autocast))
        object.__setattr__(self, "_formed", None)

    @property
    def tensor(self) -> Tensor:
        """The tensor; computed now if it was not before."""
        formed: Tensor | None = self._formed
        if formed is not None:
            return formed
        form, of, versions, grad, autocast = self._then
        if any(version is not None and version != t._version for t, version in zip(of, versions)):
            raise RuntimeError(
                "a swapped module computes this result at its first use, but the module's inputs have been changed in "
                "place since the call: use the result before they change, or restore the module"
            )
        device = of[0].device.type
        dtype, enabled = autocast or (None, False)
        cast = torch.autocast(device, dtype, enabled) if checks.has_autocast(device) else nullcontext()
        with torch.set_grad_enabled(grad), cast:
            formed = form(*of)
        object.__setattr__(self, "_formed", formed)
        object.__setattr__(self, "_then", None)
        return formed

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = _pytree.tree_map_only(cls, lambda later: later.tensor, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tensor, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.tensor, name, value)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.tensor.__reduce_ex__(protocol)

    def __copy__(self) -> Tensor:
        return copy.copy(self.tensor)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return copy.deepcopy(self.tensor, memo)

    __hash__ = object.__hash__


def _forward_operators() -> None:
    """Add the operators of a tensor to the class: Python does not look for them with ``__getattr__``."""
    of_every_object = {"__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "__repr__", "__str__", "__format__"}
    for name in dir(Tensor):
        special = name.startswith("__") and name.endswith("__") and callable(getattr(Tensor, name))
        if name in of_every_object or (special and not hasattr(object, name) and name not in LaterTensor.__dict__):
            setattr(LaterTensor, name, _operator(name))


def _operator(name: str) -> Any:
    def operator(self: LaterTensor, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = _pytree.tree_map_only(LaterTensor, lambda later: later.tensor, (args, kwargs))
        return getattr(self.tensor, name)(*args, **kwargs)

    operator.__name__ = name
    return operator


_forward_operators()
