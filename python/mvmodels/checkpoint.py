"""Files of a training: written whole or not at all, read without running anything in them."""

from __future__ import annotations

import os
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mvkernels.report import UsageError
from mvmodels.registry import create_model, load_weights

FORMAT = "mvmodels 1"
# What it takes to use the model of a training.
_TRAINED = {"model": str, "settings": dict, "classes": list, "size": int, "channels": int, "state_dict": Mapping}


def save(state: Mapping[str, Any], path: Path) -> None:
    """Write ``state`` to ``path``, which at every moment is the old file or the new one.

    It is written beside it, flushed to the disk, and renamed. A process killed on the way leaves a ``.part`` that the
    next one overwrites. Raises UsageError, one line, where it cannot be written.
    """
    make_folder(path.parent)
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("wb") as file:
            torch.save({"format": FORMAT, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror or error}") from None


def make_folder(path: Path) -> None:
    """The folder and those above it. Raises UsageError, one line, where files cannot be written there."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{path} cannot be made: {error.strerror or error}") from None
    if not os.access(path, os.W_OK):
        raise UsageError(f"{path} cannot be written to")


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The contents of a checkpoint or of a bare state_dict, on the CPU. Raises UsageError, one line, for anything else.

    Only tensors and plain values are read: a file cannot run code.
    """
    try:
        with warnings.catch_warnings():  # torch warns of what it then refuses
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}") from None
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError, AttributeError):
        raise UsageError(f"{path} is no checkpoint that torch.load reads with weights_only=True") from None
    if not isinstance(state, Mapping):
        raise UsageError(f"{path} holds a {type(state).__name__}, want a checkpoint or a state_dict")
    return dict(state)


def read_training(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A trained model that :func:`save` wrote; raises UsageError for other files."""
    return trained(read(path), path)


def trained(state: dict[str, Any], path: str | os.PathLike[str]) -> dict[str, Any]:
    """The state, if it is one of a trained model. Raises UsageError, one line, if not."""
    if state.get("format") != FORMAT:
        raise UsageError(f"{path} was not written by mvmodels.train")
    for name, kind in _TRAINED.items():
        if not isinstance(state.get(name), kind):
            found = f"its {name} is a {type(state[name]).__name__}" if name in state else f"it has no {name}"
            raise UsageError(f"{path} is no checkpoint of mvmodels.train: {found}")
    return state


def build(state: Mapping[str, Any], path: str | os.PathLike[str], average: bool = True) -> nn.Module:
    """The trained model of a checkpoint, in eval mode: its moving average if it has one and ``average``."""
    model = create_model(state["model"], num_classes=len(state["classes"]), **state["settings"])
    weights = state["ema"] if average and state.get("ema") is not None else state["state_dict"]
    fit(model, weights, path)
    return model.eval()


def fit(model: nn.Module, weights: Mapping[str, Any], path: str | os.PathLike[str], source: str = "mvmodels") -> None:
    """:func:`mvmodels.load_weights`, with what does not fit told in one line (the first of it, and how much more)."""
    try:
        load_weights(model, weights, source=source)
    except (TypeError, ValueError) as error:
        first, *problems = str(error).removeprefix("load_weights: ").splitlines()
        told = f" {problems[0].strip()}" if problems else ""
        more = f"; and {_count(problems)} more" if len(problems) > 1 else ""
        raise UsageError(f"{path}: {first}{told}{more}") from None


def _count(problems: list[str]) -> int:
    """How many follow the first; the last line of a long list says how many it leaves out."""
    words = problems[-1].split()
    hidden = int(words[1]) - 1 if words[:1] == ["and"] and words[-1:] == ["more"] else 0
    return len(problems) - 1 + hidden


def detached(model: nn.Module) -> dict[str, Tensor]:
    """The state_dict on the CPU."""
    return {name: value.detach().cpu() for name, value in model.state_dict().items()}
