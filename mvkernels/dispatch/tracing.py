"""What torch.compile is told of functions that it is not to trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

F = TypeVar("F", bound=Callable[..., object])


def constant(function: F) -> F:
    """Mark a function that torch.compile calls while it traces, and whose result it takes as a constant.

    As :func:`torch.compiler.assume_constant_result`, which would import the compiler.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
