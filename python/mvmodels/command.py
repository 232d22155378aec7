"""What the commands of this package share: one-line errors with exit status 2, and how options are read."""

from __future__ import annotations

import argparse
import ast
import json
import math
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import torch

import mvkernels
from mvkernels.backend import requested
from mvkernels.report import UsageError


class Parser(argparse.ArgumentParser):
    """Wrong usage is one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def number(
    kind: Callable[[str], Any], least: float = -math.inf, below: float = math.inf, most: float = math.inf
) -> Callable[[str], Any]:
    """A type for argparse: a finite int or float from ``least`` on, less than ``below`` and not over ``most``."""

    def convert(text: str) -> Any:
        value = kind(text)
        if kind is float and not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text} is no finite number")
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
        raise UsageError(f"--device {name} cannot be used: it computes nothing")
    return name


def backend(name: str) -> str:
    """A backend of this library. Raises UsageError for an unknown name, or one in MVKERNELS_BACKEND."""
    try:
        requested(None)
        return requested(name)
    except ValueError as error:
        raise UsageError(str(error)) from None


def print_json(document: Any) -> None:
    json.dump(document, sys.stdout, indent=2, default=str)
    print()


def one_line(error: BaseException) -> str:
    """An error's message without line breaks; of one from a worker of a DataLoader, the original's."""
    text = str(error)
    if "Original Traceback" in text:
        text = text.strip().splitlines()[-1].partition(": ")[2]
    return " ".join(text.split())


def run(prog: str, command: Callable[[], int]) -> int:
    """``command()``, where an error that its user can mend is one line on stderr and exit status 2."""
    try:
        return command()
    except (UsageError, mvkernels.BackendUnavailable) as error:
        if sys.stderr.isatty():
            sys.stderr.write("\r\x1b[K")  # the progress bar
        print(f"{prog}: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\n{prog}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader (head, say) has seen enough; Python would complain again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
