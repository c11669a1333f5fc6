"""Redacts the tracebacks and warnings that Python prints itself."""

from __future__ import annotations

import logging
import sys
import threading
import traceback
import warnings
from types import TracebackType
from typing import TextIO

from ingestor.redaction import redact


class _Redacted(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        """Return the redacted line with its traceback."""
        return redact(super().format(record))


def redact_tracebacks() -> None:
    """Redact everything that Python prints itself in this process from now on.

    That includes errors that end the process or a thread, errors in destructors, and warnings that libraries log before
    `configure` sets up our log, such as asyncio's about a task whose error was never retrieved.
    """
    sys.excepthook = _print
    threading.excepthook = lambda args: _print(args.exc_type, args.exc_value, args.exc_traceback)
    sys.unraisablehook = _print_ignored
    warnings.showwarning = _warn
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(_Redacted())


def _print(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
    if sys.stderr is not None and not issubclass(kind, SystemExit):
        sys.stderr.write(redact("".join(traceback.format_exception(kind, error, trace))))


def _print_ignored(args: sys.UnraisableHookArgs) -> None:
    if sys.stderr is not None:
        sys.stderr.write(redact(f"{args.err_msg or 'Exception ignored in'}: {args.object!r}\n"))
    _print(args.exc_type, args.exc_value, args.exc_traceback)


def _warn(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    target = file or sys.stderr
    if target is not None:
        target.write(redact(warnings.formatwarning(message, category, filename, lineno, line)))
