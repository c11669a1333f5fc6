"""Standard output of the commands. A failed write raises OutputError, which has its own exit status."""

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
    """Print a line with its secrets redacted, and flush."""
    print(redact(line), flush=True)


def escape_unknown_characters() -> None:
    """Escape characters that the encoding of the locale (such as ASCII) lacks, instead of failing."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def write_document(text: str) -> None:
    """Write JSON, CSV, HTML or SVG to standard output, always in UTF-8."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.flush()
        sys.stdout.buffer.write(text.encode())
    else:
        sys.stdout.write(text)


class Console(rich.console.Console):
    """rich's console, without its exit with status 1 on a broken pipe: status 1 is an answer here."""

    def on_broken_pipe(self) -> None:
        """Re-raise the error for `reports_output_errors`. Called by rich while it handles the error."""
        self.quiet = True
        raise  # noqa: PLE0704 - rich calls this within its except clause


def reports_output_errors(command: Callable[_P, _R]) -> Callable[_P, _R]:
    """Return the command; a failed write to standard output raises OutputError.

    Errors of files name the file, and are translated at the call.
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
    """Flush standard output. Raises OutputError."""
    if sys.stdout is None:  # closed before the process started
        return
    try:
        sys.stdout.flush()
    except OSError as error:
        raise output_error(error) from None


def output_error(error: OSError) -> OutputError:
    """Return an OutputError, and discard the buffered output: Python would write it again at exit."""
    if sys.stdout is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return OutputError(f"Standard output cannot be written: {error.strerror}.")
