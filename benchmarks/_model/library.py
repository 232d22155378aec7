"""PyTorch's own kernels that an op calls beside ours: products by cuBLAS, sums, copies.

Their machine code is not here, so their time is the least that it may be: their bytes at the rate of a copy, their
products at PRODUCTS of the peak, and a launch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from _model.devices import FITTED, Device, Fitted
from _model.limits import NAMES, Times, together

PRODUCTS = 0.8
"""Of the peak of the matrix units, what a large product reaches: 790 of 989 TFLOP/s on an H100."""


@dataclass(frozen=True)
class Called:
    """One kernel of PyTorch's."""

    kernel: str
    """``aten::mm``."""
    bytes: float
    """That it reads and writes, each once."""
    flops: float
    """Of a product; 0 for what is none."""


class Watch(TorchDispatchMode):
    """Within: ``watch`` is given each kernel that PyTorch runs, also inside of the library's operators."""

    def __init__(self, watch: Callable[[Called], None]) -> None:
        super().__init__()
        self.watch = watch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace.startswith("mvkernels"):
            with self:  # at once the kernel of the operator, whose own calls come here
                return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **kwargs)
        with self:
            found = func.decompose(*args, **kwargs)
        if found is not NotImplemented:  # it was made of others
            return found
        found = func(*args, **kwargs)
        read, made = _tensors((args, kwargs)), _tensors(found)
        if func.overloadpacket.__name__.startswith(("empty", "new_empty")):
            for each in made:  # few blocks are executed: in what the others leave, kernels may not find infinities
                each.zero_()
        if not func.is_view and not _allocates(func) and made:
            if func.overloadpacket.__name__ in ("copy_", "fill_", "zero_"):
                read = read[1:]  # the first is only written
            flops = flop_registry.get(func.overloadpacket)
            count = float(flops(*args, **kwargs, out_val=found)) if flops else 0.0
            self.watch(Called(f"aten::{func.overloadpacket.__name__}", sum(map(_bytes, read + made)), count))
        return found


def _tensors(of: Any) -> list[torch.Tensor]:
    return [each for each in tree_leaves(of) if isinstance(each, torch.Tensor)]


def _bytes(tensor: torch.Tensor) -> int:
    # Of an expanded tensor what there is.
    there = 1
    for size, stride in zip(tensor.shape, tensor.stride()):
        there *= size if stride else 1
    return there * tensor.itemsize


def _allocates(func: Any) -> bool:
    # Memory, without a kernel; or looks at a tensor without one.
    name = func.overloadpacket.__name__
    return name.startswith(("empty", "new_empty", "detach", "lift")) or name in ("_reshape_alias", "_unsafe_view")


def times(called: Called, device: Device, dtype: str, fit: Fitted = FITTED) -> Times:
    """The limits that are known of it, and the prediction: the least that it may take."""
    each = dict.fromkeys(NAMES, 0.0)
    each["memory"] = called.bytes / (device.bytes * fit.memory) * 1e6
    each["matrix"] = called.flops / (PRODUCTS * device.flops[dtype]) * 1e6
    each["launch"] = fit.launch
    return Times(each, together((each["memory"], each["matrix"]), fit.power) + fit.launch)
