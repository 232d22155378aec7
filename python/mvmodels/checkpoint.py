"""Checkpoints of a training: written completely or not at all, and read without running code in them."""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import platform
import reprlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mvkernels import files
from mvkernels.report import UsageError
from mvmodels.registry import create_model, load_weights

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

FORMAT = "mvmodels 1"
Kind = tuple[Any, str, Callable[[Any], bool]]
"""Of a value in a checkpoint: its class or classes, in words what else is wanted, and whether it is so."""

LARGEST = 16384
"""Side of the largest picture that is read or trained on."""

# What it takes to use the model of a training: its kind, and more that is asked of it.
_TRAINED: dict[str, Kind] = {
    "model": (str, "", lambda name: True),
    "settings": (dict, "names and values", lambda settings: all(isinstance(name, str) for name in settings)),
    "classes": (list, "names", lambda names: bool(names) and all(isinstance(name, str) for name in names)),
    "size": (int, f"1 to {LARGEST}", lambda size: 1 <= size <= LARGEST),
    "channels": (int, "1 or 3", lambda channels: channels in (1, 3)),
    "state_dict": (Mapping, "", lambda weights: True),
}


def save(state: Mapping[str, Any], path: Path) -> None:
    """Write ``state`` to ``path``, which at every moment is the old file or the new one.

    Raises UsageError, one line, where it cannot be written; nothing of it is left then.
    """
    with files.replacing(path) as file:
        torch.save({"format": FORMAT, **state}, file)


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Makes the folder of a training, and keeps other trainings out of it until this one ends or is killed.

    Raises UsageError, one line, where files cannot be written there, or if another training has it. On a system
    without file locks nobody is kept out; checkpoints are whole all the same.
    """
    files.make_folder(folder)
    path = folder / ".lock"
    try:
        descriptor = _locked(path)
    except BlockingIOError:
        raise UsageError(f"{folder} is the output of another training, {_owner(path)}: want another --output") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror or error}") from None
    try:
        for name in ("last.pt", "best.pt"):  # no other can be at it
            files.remove_parts(folder / name, after=0)
        yield
    finally:
        if descriptor is not None:
            _unlock(path, descriptor)


def _locked(path: Path) -> int | None:
    """A lock that ends with this process, as a file descriptor; None where there are no locks.

    A record lock, not flock: the processes of a DataLoader, which may outlive this one, do not inherit it. Raises
    BlockingIOError if another process has it.
    """
    if fcntl is None:
        return None
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(descriptor).st_nlink:  # else its owner has removed it since it was opened
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {platform.node()}".encode())
                return descriptor
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):  # it is ours, and empty
                _unlock(path, descriptor)
                raise
            os.close(descriptor)
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise BlockingIOError(error.errno, error.strerror) from None
            if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
                return None
            raise
        os.close(descriptor)


def _unlock(path: Path, descriptor: int) -> None:
    """Remove the file before others can have it, unless the folder went meanwhile and the file there is another's."""
    with contextlib.suppress(OSError):
        if os.path.samestat(os.fstat(descriptor), path.stat()):
            path.unlink()
    os.close(descriptor)


def _owner(path: Path) -> str:
    try:
        return path.read_text(errors="replace") or "which is just beginning"
    except OSError:
        return "which is just ending"


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
        raise UsageError(f"{path} is not a checkpoint that torch.load can read with weights_only=True") from None
    if not isinstance(state, Mapping):
        raise UsageError(f"{path} contains a {type(state).__name__}, want a checkpoint or a state_dict")
    return dict(state)


def read_training(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A trained model that :func:`save` wrote; raises UsageError for other files."""
    return trained(read(path), path)


def trained(state: dict[str, Any], path: str | os.PathLike[str]) -> dict[str, Any]:
    """The state, if it is one of a trained model. Raises UsageError, one line, if not."""
    if state.get("format") != FORMAT:
        raise UsageError(f"{path} was not written by mvmodels.train")
    demand(state, _TRAINED, path)
    channels = state["settings"].get("in_chans", 3)
    if state["channels"] != channels:
        raise UsageError(f"{path}: channels is {state['channels']}, but in_chans of its model is {channels}")
    return state


def demand(state: Mapping[str, Any], kinds: Mapping[str, Kind], path: str | os.PathLike[str]) -> None:
    """Raise UsageError, one line, unless all those values are there and as they should be."""
    for name, (kind, words, good) in kinds.items():
        if name not in state:
            told = f"it has no {name}"
        elif not isinstance(value := state[name], kind) or isinstance(value, bool):
            told = f"its {name} is a {type(value).__name__}"
        elif not good(value):
            told = f"its {name} is {reprlib.repr(value)}, want {words}"
        else:
            continue
        raise UsageError(f"{path} is not a valid checkpoint of mvmodels.train: {told}")


def build(state: Mapping[str, Any], path: str | os.PathLike[str], average: bool = True) -> nn.Module:
    """The trained model of a checkpoint, in eval mode: its moving average if it has one and ``average``."""
    try:
        model = create_model(state["model"], num_classes=len(state["classes"]), **state["settings"])
    # PyTorch's own, for settings that a model passes on to it.
    except (TypeError, ValueError, RuntimeError, ArithmeticError, LookupError, AttributeError) as error:
        raise UsageError(f"{path}: its model cannot be built: {error}") from None
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
