"""Modules of published code that is no package: a fused class for each class met, and asking what a module computes.

People copy such code, so that its classes have no name that could be relied on. A module is recognised by what it
holds, and then asked: a copy with random weights has to compute the known formula.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

# Answers are compared in float64, on numbers of about one.
_TOLERANCE = 1e-9
_made: dict[tuple[type, type], type[nn.Module]] = {}


class SwappedByStructure:
    """Base of the fused forms. Never built: :func:`mvkernels.swap` gives an existing module a class made from one of
    them and the module's own class, and restoring gives it its own again."""

    mvk_original: type[nn.Module]
    mvk_base: type
    mvk_backend: str | None = None

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _blank, (self.mvk_original, self.mvk_base), self.__dict__.copy()


def swapped_class(original: type[nn.Module], base: type) -> type[nn.Module]:
    """The class made of a fused form and the class of a module."""
    if (original, base) not in _made:
        namespace = {
            "mvk_original": original,
            "mvk_base": base,
            "__doc__": base.__doc__,
            "__module__": base.__module__,
        }
        _made[original, base] = type(f"Swapped{original.__name__}", (base, original), namespace)
    return _made[original, base]


def _blank(original: type[nn.Module], base: type) -> nn.Module:
    """What unpickling and copying begin with: a class made here cannot be found by its name."""
    kind = swapped_class(original, base)
    return kind.__new__(kind)


def computes_something_else(
    module: nn.Module,
    base: type,
    inputs: Any,
    fused: Callable[[Any, Any], Any],
    shape: str = "",
    beside: Sequence[str] = (),
) -> str:
    """Ask the module's own forward, on small examples and with weights that hide nothing.

    Args:
        module: asked by a copy of it, in float64, on the CPU, at rest and without its hooks.
        base: its fused form.
        inputs: what its forward takes, in float64; a list of several.
        fused: the fused computation, called with the copy as a swapped module and one of the inputs.
        shape: what its forward returns, in words, if that is a tuple, whose first entry is compared.
        beside: parts that both call as they are and that the copy does without.

    Returns the reason against swapping it, empty if there is none.
    """
    generator = torch.Generator().manual_seed(0)
    try:
        twin: Any = copy.deepcopy(module).to_empty(device="cpu").double().eval()
        for name in beside:
            setattr(twin, name, nn.Identity())
        for part in twin.modules():
            part._forward_hooks.clear()
            part._forward_pre_hooks.clear()
        with torch.no_grad():
            for name, value in (*twin.named_parameters(), *twin.named_buffers()):
                value.copy_(0.5 * torch.randn(value.shape, generator=generator, dtype=torch.float64, device="cpu"))
                if name.endswith("running_var"):
                    value.abs_().add_(0.5)
            for example in inputs:
                # The fused form first: it reads settings that a forward may set.
                twin.__class__, twin.mvk_backend = swapped_class(type(module), base), "reference"
                actual = fused(twin, example)
                twin.__class__ = type(module)
                expected = twin(example)
                if shape:
                    if not isinstance(expected, tuple) or len(expected) != 2:
                        return f"its forward does not return {shape}"
                    actual, expected = actual[0], expected[0]
                if not isinstance(expected, Tensor) or expected.shape != actual.shape:
                    return "its forward does not return what the known formula does"
                if not float((actual - expected).abs().max()) <= _TOLERANCE:
                    return "its forward computes something else than the known formula"
    except Exception as error:  # whatever somebody's forward may raise
        lines = str(error).splitlines() or [type(error).__name__]
        return f"its forward cannot be compared with the known formula: {lines[0]}"
    return ""
