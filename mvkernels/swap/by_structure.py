"""Modules of published code that is no package: asking what a module computes.

People copy such code, so that its classes have no name that could be relied on. A module is recognised by what it
holds, and then asked: a copy with random weights has to compute the known formula.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mvkernels.swap.eligibility import class_name
from mvkernels.swap.later import LaterTensor
from mvkernels.swap.swapped import swapped_class

# Answers are compared in float64: on numbers of about one, and on large ones, where all but nothing hangs on rounding.
_TOLERANCE = 1e-9
_LARGE, _ALIKE = 4.0, 1e-4


def holds_something_else(module: nn.Module, known: Sequence[str], what: str = "it") -> str:
    """Children that the known formula has no place for: a dropout may be inactive when the module is asked."""
    for name, child in module._modules.items():
        if name not in known and child is not None:
            return f"{what} holds {name}, a {class_name(type(child))}, which the known formula has no place for"
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
    """Ask the module's own forward, at rest and in training mode, on small examples, with weights that hide nothing.

    Then again with large weights and inputs, so that a clamp somewhere inside is reached. They make sharp decisions
    of small differences: the answers need only be alike.

    Args:
        module: asked by a copy of it, in float64, on the CPU and without its hooks.
        form: its fused form.
        inputs: what its forward takes, in float64, a tensor or a tuple of tensors; a list of several.
        fused: the fused computation, called with the copy as a swapped module and one of the inputs.
        shape: what its forward returns, if that is a tuple: a name for each entry.
        beside: parts that both call as they are and that the copy does without.
        quiet: called with the copy in training mode, to still the random parts that a swapped module leaves to the
            original or calls itself.

    Returns the reason against swapping it, empty if there is none.
    """
    try:
        twin: Any = copy.deepcopy(module).to_empty(device="cpu").double()
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
    """Name, tensor and random numbers for it, of all parameters and buffers; the same every time."""
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
        return f"its forward does not return ({', '.join(shape)})"
    for result, theirs in zip(actual, expected):
        ours = result.tensor if isinstance(result, LaterTensor) else result
        if not isinstance(theirs, Tensor) or theirs.shape != ours.shape:
            return "its forward does not return what the known formula does"
        # NaN and infinite ones are not alike.
        if not float((ours - theirs).abs().max()) <= tolerance * max(1.0, float(theirs.abs().max())) < math.inf:
            return "its forward computes something else than the known formula"
    return ""
