"""Standard output of the commands: an output that accepts no more is an error of its own, with its own exit status."""

from __future__ import annotations

import functools
import io
import os
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import rich.console

from ingestor.errors import OutputError
from ingestor.redaction import redact

_P = ParamSpec("_P")
_R = TypeVar("_R")


def say(line: str) -> None:
    """Print a line at once, without the secrets in it."""
    print(redact(line), flush=True)


def escape_unknown_characters() -> None:
    """Let no text fail because the encoding of the locale, such as ASCII, lacks a character of it."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def write_document(text: str) -> None:
    """Write JSON, CSV, HTML or SVG to standard output: in UTF-8, whatever the encoding of the locale is."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.flush()
        sys.stdout.buffer.write(text.encode())
    else:
        sys.stdout.write(text)


class Console(rich.console.Console):
    """rich's console. Its own answer to a reader that is gone is to end the process with 1, which is an answer here."""

    def on_broken_pipe(self) -> None:
        """Let the error reach `reports_output_errors`. Called by rich while the error is handled."""
        self.quiet = True
        raise  # noqa: PLE0704 - rich calls this within its except clause


def reports_output_errors(command: Callable[_P, _R]) -> Callable[_P, _R]:
    """Return the command with an output that can't be written as an OutputError.

    Everything else that the commands open is named in the error, or translated where it is used.
    """

    @functools.wraps(command)
    def wrapped(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return command(*args, **kwargs)
        except OSError as error:
            if error.filename is not None or error.errno is None:
                raise
            raise output_error(error) from None

    return wrapped


def flush_output() -> None:
    """Write what is still in the buffer of standard output. Raises OutputError."""
    if sys.stdout is None:  # it was closed from the start
        return
    try:
        sys.stdout.flush()
    except OSError as error:
        raise output_error(error) from None


def output_error(error: OSError) -> OutputError:
    """Return what to raise, and drop the rest of the output: Python would try to write it once more at its end."""
    if sys.stdout is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return OutputError(f"Standard output cannot be written: {error.strerror}.")
