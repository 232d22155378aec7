"""Packed weights, which follow every change of the tensors that they were made of.

They are kept outside of the modules: neither a state_dict nor a copy or a pickle of a model has them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from mvkernels.dispatch import extension


@dataclass
class _Packed:
    tensors: list[ref[Tensor] | None]
    marks: list[Any]
    settings: tuple[Any, ...]
    weights: Tensor


_held: WeakKeyDictionary[nn.Module, dict[str, _Packed]] = WeakKeyDictionary()


def packed(
    module: nn.Module,
    role: str,
    tensors: Sequence[Tensor | None],
    settings: tuple[Any, ...],
    pack: Callable[[], Tensor],
) -> Tensor:
    """``pack()``, or what it returned before if neither the tensors nor the settings have changed since.

    What shows a change of a tensor: another object in its place, other memory (``.data``, ``.to``), its version counter
    (an optimizer's step, ``load_state_dict``, ``copy_``), its dtype. What does not: values written through ``.data``, a
    NumPy view or another tensor made by ``detach()`` under ``torch.inference_mode``; :func:`forget` is for these.
    """
    known = _held.get(module)
    entry = None if known is None else known.get(role)
    marks = [None if t is None else (t.data_ptr(), _version(t), t.dtype) for t in tensors]
    settings = (*settings, extension.instruction_set())
    if (
        entry is not None
        and entry.marks == marks
        and entry.settings == settings
        and all(r is None if t is None else r is not None and r() is t for r, t in zip(entry.tensors, tensors))
    ):
        return entry.weights
    with torch.no_grad():
        weights = pack()
    held = [None if t is None else ref(t) for t in tensors]
    _held.setdefault(module, {})[role] = _Packed(held, marks, settings, weights)
    return weights


def _version(tensor: Tensor) -> Any:
    """The version counter; for a tensor without one a mark that is like no other."""
    return object() if tensor.is_inference() else tensor._version


def forget(model: nn.Module) -> None:
    """Drop the packed weights of all modules of ``model``: they are packed again in the next call."""
    for module in model.modules():
        _held.pop(module, None)


def size(model: nn.Module) -> int:
    """Bytes of the packed weights of ``model``."""
    entries = [entry for module in model.modules() for entry in _held.get(module, {}).values()]
    return sum(entry.weights.numel() * entry.weights.element_size() for entry in entries)
