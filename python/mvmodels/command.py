"""How the commands of this package read their options."""

from __future__ import annotations

import argparse
import ast
import math
from collections.abc import Callable
from typing import Any

import torch

from mvkernels.dispatch.backend import requested
from mvkernels.report import UsageError


def number(
    kind: Callable[[str], Any], least: float = -math.inf, below: float = math.inf, most: float = math.inf
) -> Callable[[str], Any]:
    """A type for argparse: a finite int or float from ``least`` on, less than ``below`` and not over ``most``."""

    def convert(text: str) -> Any:
        value = kind(text)
        if kind is float and not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text} is not a finite number")
        if not least <= value < below or value > most:
            limit = (
                f" and less than {below:g}" if below < math.inf else f" and at most {most:g}" if most < math.inf else ""
            )
            raise argparse.ArgumentTypeError(f"{text} is not at least {least:g}{limit}")
        return value

    convert.__name__ = kind.__name__  # argparse names it when the text is no number
    return convert


def setting(text: str) -> tuple[str, Any]:
    """ "drop_path_rate=0.1" -> ("drop_path_rate", 0.1); what is no Python literal stays text."""
    name, found, value = text.partition("=")
    if not found or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def device(name: str) -> str:
    """A device that is there. Raises UsageError for another."""
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from None
    if torch.device(name).type == "meta":
        raise UsageError(f"--device {name} cannot be used: its tensors have no values")
    return name


def backend(name: str) -> str:
    """A backend of this library. Raises UsageError for an unknown name, or one in MVKERNELS_BACKEND."""
    try:
        requested(None)
        return requested(name)
    except ValueError as error:
        raise UsageError(str(error)) from None
