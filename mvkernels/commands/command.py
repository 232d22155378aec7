"""What all commands share: errors as one line with exit status 2, and errors in writing to standard output."""

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
"""Exit status if the reader of a pipe has closed it: what a shell reports for a program that SIGPIPE ended."""


class Parser(argparse.ArgumentParser):
    """An argument parser that prints a usage error as one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def share(text: str) -> tuple[int, int]:
    """The value K/N of an option: every N-th piece of work, starting at K."""
    k, _, n = text.partition("/")
    if not (k.isdecimal() and n.isdecimal() and int(k) < int(n)):
        raise argparse.ArgumentTypeError(f"{text!r}, want K/N with K from 0 to N - 1")
    return int(k), int(n)


class OutputError(Exception):
    """Standard output cannot be written. Not an OSError, which argparse would ignore."""

    def __init__(self, error: OSError | UnicodeEncodeError) -> None:
        super().__init__(f"standard output cannot be written: {getattr(error, 'strerror', None) or error}")
        self.closed_pipe = isinstance(error, BrokenPipeError)


class _Output:
    """Standard output. Its errors are raised as OutputError, so they are not taken for those of files."""

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
    """Run ``command()``. An error that the user can fix is printed as one line on stderr, with exit status 2.

    These are UsageError, BackendUnavailable, and errors of the system such as a full disk or a missing file. Ctrl-C
    gives status 130. A pipe that its reader has closed gives status 141, without a message.
    """
    stream = sys.stdout
    if stream is None:  # closed by the caller: print() then prints nothing
        return _run(prog, command)
    try:
        with contextlib.redirect_stdout(_Output(stream)):  # type: ignore[type-var]
            return _run(prog, command)
    finally:
        try:
            stream.flush()
        except OSError:  # reported already; Python would report it again at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _run(prog: str, command: Callable[[], int]) -> int:
    try:
        try:
            status = command()
        except SystemExit:  # argparse's: --help has printed
            print(end="", flush=True)
            raise
        print(end="", flush=True)  # now, because an error can still be reported
        return status
    except OutputError as error:
        return PIPE_CLOSED if error.closed_pipe else _tell(f"{prog}: {error}", 2)
    except (UsageError, BackendUnavailable) as error:
        return _tell(f"{prog}: {one_line(error)}", 2)
    except OSError as error:
        return _tell(f"{prog}: {os_reason(error)}", 2)
    except MemoryError:
        return _tell(f"{prog}: not enough memory", 2)
    except KeyboardInterrupt:
        return _tell(f"\n{prog}: interrupted", 130)


def _tell(line: str, status: int) -> int:
    with contextlib.suppress(OSError):  # stderr may fail too; the exit status remains
        if sys.stderr.isatty():
            sys.stderr.write("\r\x1b[K")  # the progress bar
        print(line, file=sys.stderr, flush=True)
    return status


def one_line(error: BaseException) -> str:
    """An error's message without line breaks. For an error from a DataLoader worker, the original message."""
    text = str(error)
    if "Original Traceback" in text:
        text = text.strip().splitlines()[-1].partition(": ")[2]
    return " ".join(text.split())


def print_json(document: Any) -> None:
    """Print the document as JSON on standard output."""
    print(json.dumps(document, indent=2, default=str))
