"""What all commands share: one-line errors with exit status 2, and a standard output that may fail like any file."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn, TextIO

from mvkernels.dispatch.backend import BackendUnavailable
from mvkernels.files import os_reason
from mvkernels.report import UsageError

PIPE_CLOSED = 141
"""Exit status where the reader of a pipe has gone: what a shell reports of a program that SIGPIPE ended."""


class Parser(argparse.ArgumentParser):
    """Wrong usage is one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def share(text: str) -> tuple[int, int]:
    """An option's K/N: every N-th piece of work, from the K-th on."""
    k, _, n = text.partition("/")
    if not (k.isdecimal() and n.isdecimal() and int(k) < int(n)):
        raise argparse.ArgumentTypeError(f"{text!r}, want K/N with K from 0 to N - 1")
    return int(k), int(n)


class OutputError(Exception):
    """Standard output cannot be written. No OSError, which argparse would pass over in silence."""

    def __init__(self, error: OSError | UnicodeEncodeError) -> None:
        super().__init__(f"standard output cannot be written: {getattr(error, 'strerror', None) or error}")
        self.closed_pipe = isinstance(error, BrokenPipeError)


class _Output:
    """Standard output, whose errors are told from those of files."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except (OSError, UnicodeEncodeError) as error:
            raise OutputError(error) from None

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError as error:
            raise OutputError(error) from None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def run(prog: str, command: Callable[[], int]) -> int:
    """``command()``, where an error that its user can mend is one line on stderr and exit status 2.

    Such are UsageError, BackendUnavailable, and the system's: a full disk, a file that is not there. Ctrl-C is status
    130, and a pipe whose reader has gone 141, without a word.
    """
    stream = sys.stdout
    if stream is None:  # closed by whoever started this: print() then says nothing
        return _run(prog, command)
    try:
        with contextlib.redirect_stdout(_Output(stream)):  # type: ignore[type-var]
            return _run(prog, command)
    finally:
        try:
            stream.flush()
        except OSError:  # told already; Python would complain again at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _run(prog: str, command: Callable[[], int]) -> int:
    try:
        try:
            status = command()
        except SystemExit:  # argparse's: --help has printed
            print(end="", flush=True)
            raise
        print(end="", flush=True)  # now, where its failure can be told
        return status
    except OutputError as error:
        return PIPE_CLOSED if error.closed_pipe else _tell(f"{prog}: {error}", 2)
    except (UsageError, BackendUnavailable) as error:
        return _tell(f"{prog}: {one_line(error)}", 2)
    except OSError as error:
        return _tell(f"{prog}: {os_reason(error)}", 2)
    except MemoryError:
        return _tell(f"{prog}: there is not enough memory", 2)
    except KeyboardInterrupt:
        return _tell(f"\n{prog}: interrupted", 130)


def _tell(line: str, status: int) -> int:
    with contextlib.suppress(OSError):  # stderr may be full as well; the status says it still
        if sys.stderr.isatty():
            sys.stderr.write("\r\x1b[K")  # the progress bar
        print(line, file=sys.stderr, flush=True)
    return status


def one_line(error: BaseException) -> str:
    """An error's message without line breaks; of one from a worker of a DataLoader, the original's."""
    text = str(error)
    if "Original Traceback" in text:
        text = text.strip().splitlines()[-1].partition(": ")[2]
    return " ".join(text.split())


def print_json(document: Any) -> None:
    """The document on standard output, and nothing else."""
    print(json.dumps(document, indent=2, default=str))
