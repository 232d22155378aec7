"""Modules of published code that is not a package: testing what a module computes.

Such code is copied between projects, so the names of its classes are not reliable. A module is recognised by its
attributes and children. Then it is tested: a copy with random weights has to compute the known formula.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mvkernels.swap.eligibility import class_name, class_of
from mvkernels.swap.later import LaterTensor
from mvkernels.swap.swapped import swapped_class

# Results are compared in float64: on numbers of about one, and with a larger tolerance on large ones.
_TOLERANCE = 1e-9
_LARGE, _ALIKE = 4.0, 1e-4


def holds_something_else(module: nn.Module, known: Sequence[str], what: str = "it") -> str:
    """The module must have no other children than ``known``: a dropout, say, may be inactive while it is tested."""
    for name, child in module._modules.items():
        if name not in known and child is not None:
            return f"{what} has a child {name}, a {class_name(type(child))}, that the known formula does not contain"
    return ""


def computes_something_else(
    module: nn.Module,
    form: type,
    inputs: Any,
    fused: Callable[[Any, Any], Any],
    shape: Sequence[str] = (),
    beside: Sequence[str] = (),
    quiet: Callable[[Any], Any] | None = None,
) -> str:
    """Compare the module's own forward with the fused form on small random examples, in eval and in training mode.

    Then again with large weights and inputs, to reach a clamp that may be inside. There a softmax amplifies small
    differences, so the tolerance is larger.

    Args:
        module: the module to test. A copy of it is run in float64, on the CPU and without hooks.
        form: the fused form.
        inputs: list of example inputs in float64; each is a tensor or a tuple of tensors.
        fused: the fused computation, called with the copy as a swapped module and one of the inputs.
        shape: if the forward returns a tuple: a name for each of its entries.
        beside: parts that both forms call unchanged; they are left out of the copy.
        quiet: called with the copy in training mode, to switch off the random parts (dropout, drop path) that a swapped
            module calls itself or leaves to the original.

    Returns the reason against a swap; empty if there is none.
    """
    try:
        twin: Any = copy.deepcopy(module).to_empty(device="cpu").double()
        twin.__class__ = class_of(twin)  # it may be swapped
        for name in beside:
            setattr(twin, name, nn.Identity())
        for part in twin.modules():
            part._forward_hooks.clear()
            part._forward_pre_hooks.clear()
        drawn = _drawn(twin)
        with torch.no_grad():
            for training in (False, True):
                twin.train(training)
                if training and quiet is not None:
                    quiet(twin)
                for size, tolerance in ((1.0, _TOLERANCE), (_LARGE, _ALIKE)):
                    _randomise(drawn, size)
                    for example in inputs:
                        reason = _differs(twin, form, _times(example, size**2), fused, shape, tolerance)
                        if reason:
                            return reason + (" in training mode" if training else "")
    except Exception as error:  # whatever somebody's forward may raise
        lines = str(error).splitlines() or [type(error).__name__]
        return f"its forward cannot be compared with the known formula: {lines[0]}"
    return ""


def _drawn(twin: nn.Module) -> list[tuple[str, Tensor, Tensor]]:
    """(name, tensor, random numbers of its shape) of all parameters and buffers. The seed is fixed."""
    generator = torch.Generator().manual_seed(0)
    return [
        (name, value, 0.5 * torch.randn(value.shape, generator=generator, dtype=torch.float64, device="cpu"))
        for name, value in (*twin.named_parameters(), *twin.named_buffers())
    ]


def _randomise(drawn: Sequence[tuple[str, Tensor, Tensor]], size: float) -> None:
    for name, value, numbers in drawn:
        value.copy_(size * numbers)
        if name.endswith("running_var"):
            value.abs_().add_(0.5)


def _times(example: Any, size: float) -> Any:
    return size * example if isinstance(example, Tensor) else tuple(size * t for t in example)


def _differs(twin: Any, form: type, example: Any, fused: Any, shape: Sequence[str], tolerance: float) -> str:
    own = type(twin)
    try:
        # The fused form first: it reads settings that a forward may set.
        twin.__class__ = swapped_class(own, form)
        twin.mvk_backend = "reference"
        actual = fused(twin, example)
    finally:
        twin.__class__ = own
    expected = twin(example)
    if not shape:
        actual, expected = [actual], [expected]
    elif not isinstance(expected, tuple) or len(expected) != len(shape):
        return f"its forward does not return a tuple ({', '.join(shape)})"
    for result, theirs in zip(actual, expected):
        ours = result.tensor if isinstance(result, LaterTensor) else result
        if not isinstance(theirs, Tensor) or theirs.shape != ours.shape:
            return "its forward does not return a tensor of the shape that the known formula gives"
        # NaN and infinite values count as different.
        if not float((ours - theirs).abs().max()) <= tolerance * max(1.0, float(theirs.abs().max())) < math.inf:
            return "its forward computes something other than the known formula"
    return ""
