"""Files that commands write: completely or not at all. An error is one line."""

from __future__ import annotations

import contextlib
import csv
import errno
import glob
import io
import os
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from mvkernels.report import UsageError

_LEFT_BEHIND = 600.0
"""Seconds after which an unfinished file that nobody has written to is one of a process that was killed."""


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file to write in place of ``path``, which at every moment is the old file or the new one.

    It is written beside it under a name of its own, flushed to the disk, and renamed, with the rights of the file that
    it replaces. If anything goes wrong it is removed. Links are followed; what is no regular file (``/dev/stdout``, a
    pipe) is written directly. Makes the folder.

    Raises UsageError, one line, where it cannot be written: no space, no right, no folder.
    """
    path = Path(path)
    with _told(path):
        if _direct(path):
            with path.open("wb") as file:
                yield file
            return
        target = _target(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_parts(target)
        part = _part(target)
        try:
            with part.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            with contextlib.suppress(FileNotFoundError):
                part.chmod(stat.S_IMODE(target.stat().st_mode))
            os.replace(part, target)
        except BaseException:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def replacing_all(path: Path) -> Iterator[Path]:
    """Where to write ``path`` and what belongs beside it: a folder of its own, whose contents then take their places.

    For writers that want a name and no open file, and may make several files, or a folder. Raises UsageError as
    :func:`replacing` does.
    """
    with _told(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_parts(path)
        folder = Path(tempfile.mkdtemp(".part", f".{path.name[:60]}.", path.parent))
        try:
            yield folder / path.name
            for made in sorted(folder.iterdir(), key=lambda file: file.name == path.name):  # the one with the name last
                place = path.with_name(made.name)
                if place.is_dir():
                    shutil.rmtree(place)
                os.replace(made, place)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def write(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Write a whole file, text in UTF-8, as :func:`replacing` does."""
    with replacing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def write_csv(path: str | os.PathLike[str], columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows under a line of columns; what a row lacks is empty."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, restval="")
    writer.writeheader()
    writer.writerows(rows)
    write(path, text.getvalue())


def check(path: str | os.PathLike[str]) -> None:
    """Raise UsageError unless a file can be written there. Makes its folder; an existing file is not changed."""
    path = Path(path)
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not _direct(path):
            part = _part(_target(path))
            part.parent.mkdir(parents=True, exist_ok=True)
            part.touch(exist_ok=False)
            part.unlink()
    except OSError as error:
        raise _refused(path, error) from None


def make_folder(path: Path) -> None:
    """Make the folder and its parents. Raises UsageError if this fails or files cannot be written there."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{path} cannot be made: {error.strerror or error}") from None
    if not os.access(path, os.W_OK):
        raise UsageError(f"{path} cannot be written to")


def remove_parts(path: Path, after: float = _LEFT_BEHIND) -> None:
    """Remove what processes that were killed have left of ``path``: unfinished, and unchanged for ``after`` seconds."""
    oldest = time.time() - after
    for part in path.parent.glob(f".{glob.escape(path.name[:60])}.*.part"):
        with contextlib.suppress(OSError):
            if part.stat().st_mtime <= oldest:
                shutil.rmtree(part) if part.is_dir() else part.unlink()


def _part(target: Path) -> Path:
    """A name for a file on its way, no other's: 60 characters and the rest are less than 255 bytes, in UTF-8 too."""
    return target.with_name(f".{target.name[:60]}.{secrets.token_hex(4)}.part")


def _target(path: Path) -> Path:
    """The file behind links, beside which there is the same disk."""
    return Path(os.path.realpath(path))


def _direct(path: Path) -> bool:
    """Whether a file is none to replace: a device, a pipe, what the shell made of standard output."""
    return str(path).startswith("/dev/") or (path.exists() and not path.is_file() and not path.is_dir())


def _refused(path: Path, error: OSError) -> UsageError:
    return UsageError(f"{path} cannot be written: {error.strerror or error}")


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    """An error of the system while a file is written becomes a UsageError; others stay what they are."""
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        cause = _of_the_system(error)
        if cause is None:
            raise
        raise _refused(path, cause) from None


def os_reason(error: OSError) -> str:
    """An error of the system in one line, with the file where it names one."""
    reason = " ".join((error.strerror or str(error) or type(error).__name__).split())
    return reason if error.filename is None else f"{error.filename}: {reason}"


def _of_the_system(error: BaseException | None) -> OSError | None:
    """The error of the system behind another: torch.save raises RuntimeError where its file cannot be written."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error
