"""Modules on packed weights in graphs of torch.compile: one operator stands for the call of a module.

The graph has no packing and no weights in it. The operator finds the module by its number and does what an eager call
does: it looks whether the plan holds, makes another if not, and runs the module's own forward where there is none.
"""

from __future__ import annotations

import itertools
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import Tensor, nn

from mvkernels.dispatch import extension, library
from mvkernels.dispatch.backend import requested
from mvkernels.swap.packing import plans

_modules: WeakValueDictionary[int, nn.Module] = WeakValueDictionary()
_numbers: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
_next = itertools.count(1)


def call(module: Any, x: Any) -> Tensor | None:
    """The module's result in a graph that is being made; None if the module is to be traced."""
    if (
        torch.compiler.is_exporting()
        or torch.is_grad_enabled()
        or extension.module is None
        or requested(None) not in ("auto", "cpp")
        or not isinstance(x, Tensor)
        or x.dim() != 4
        or x.dtype != torch.float32
        or not x.is_cpu
        or torch.is_autocast_enabled("cpu")
    ):
        return None
    number, outputs, stride = _described(module)
    return _call(x, number, outputs, stride) if number else None  # type: ignore[no-any-return]


def _described(module: Any) -> tuple[int, int, int]:
    """The module's number, its output channels and its stride; zeros if it has no plan."""
    sizes = plans.attempted(module.mvk_sizes)
    if sizes is None or plans.run_for_now(module) is None:
        return 0, 0, 0
    if module not in _numbers:
        _numbers[module] = next(_next)
        _modules[_numbers[module]] = module
    return _numbers[module], *sizes


# What torch.compiler.assume_constant_result() does, which imports the compiler: half a second of `import mvkernels`.
_described._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _run(x: Tensor, number: int, outputs: int, stride: int) -> Tensor:
    module: Any = _modules[number]
    run = plans.run_of(module, x)
    out = module.mvk_unpacked.forward(module, x) if run is None else run(x)
    return out.contiguous(memory_format=torch.channels_last)


def _fake(x: Tensor, number: int, outputs: int, stride: int) -> Tensor:
    b, _, height, width = x.shape
    return x.new_empty((b, -(-height // stride), -(-width // stride), outputs)).permute(0, 3, 1, 2)


_call = library.define("swap", "packed", "(Tensor x, int module, int outputs, int stride) -> Tensor", _fake, _run)
