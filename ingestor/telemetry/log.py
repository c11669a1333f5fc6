"""The log: JSON, or readable lines on a terminal; secrets are redacted and floods limited.

Lines of libraries, which use Python's own `logging`, are formatted, redacted and limited alike.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
import time
from collections.abc import Callable
from typing import Any, Literal, TextIO, cast

import structlog

from ingestor.redaction import outside_text, redact_values

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}

BURST = 20
WINDOW = 60.0
"""At most `BURST` lines of one event are written in `WINDOW` seconds; the others are counted."""


class _Lenient:
    """A stream that ignores failed writes: a full disk below the log must not end the daemon."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            return self._stream.write(text)
        return 0

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()


class FloodLimit:
    """Admits up to `BURST` lines of an event in `WINDOW` seconds, and counts the others. `clock` is monotonic."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._windows: dict[str, tuple[float, int]] = {}  # its beginning, and its number of lines

    def admit(self, event: str) -> int | None:
        """Count a line of this event. Return None if it is suppressed, else how many were suppressed before it."""
        now = self._clock()
        began, lines = self._windows.get(event, (now, 0))
        left_out = 0
        if now - began >= WINDOW:
            left_out, began, lines = max(0, lines - BURST), now, 0
        self._windows[event] = (began, lines + 1)
        return left_out if lines < BURST else None

    def left_out(self, *, at_once: bool = False) -> list[tuple[str, int]]:
        """Return each event whose window is over (with `at_once`, each event) with its number of suppressed lines."""
        now = self._clock()
        over = [name for name, (began, _) in self._windows.items() if at_once or now - began >= WINDOW]
        found = [(name, self._windows.pop(name)[1] - BURST) for name in sorted(over)]
        return [(name, count) for name, count in found if count > 0]


MAX_LIBRARY_TEXT = 2000
"""Characters of a library's text that are logged at most."""

_limit = FloodLimit()


def log_suppressed_lines(*, at_once: bool = False) -> None:
    """Log the number of suppressed lines of each event. Call it about every minute, and at the end with `at_once`."""
    for event, count in _limit.left_out(at_once=at_once):
        structlog.get_logger().warning("log_lines_suppressed", of=event, count=count)


def report_dropped(count: int) -> None:
    """Log how many lines could not be written, once lines can be written again."""
    structlog.get_logger().warning("log_lines_dropped", count=count)


def configure(level: str, form: Literal["auto", "json", "console"]) -> None:
    """Send log lines to standard error; `auto` means readable lines on a terminal and JSON elsewhere."""
    global _limit  # noqa: PLW0603 - a process has one log
    _limit = limit = FloodLimit()
    console = form == "console" or (form == "auto" and sys.stderr.isatty())
    render: Any = (
        structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
        if console
        else structlog.processors.JSONRenderer(ensure_ascii=False, default=str)
    )

    def renderer(logger: Any, method: str, event: Any) -> str:
        return str(render(logger, method, {**redact_values(event, keys=True), **_unredacted(event)}))

    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]

    def limited(_: Any, method: str, event: Any) -> Any:
        if method == "debug":
            return event
        left_out = limit.admit(str(event["event"]))
        if left_out is None:
            raise structlog.DropEvent
        return {**event, "left_out": left_out} if left_out else event

    structlog.configure(
        processors=[limited, *shared, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(LEVELS[level]),
        # PrintLoggerFactory writes a line's end separately, so lines of several threads may mix.
        logger_factory=structlog.WriteLoggerFactory(cast("TextIO", _Lenient(sys.stderr))),
        cache_logger_on_first_use=False,
    )
    _configure_libraries(shared, renderer, limit)


def _unredacted(event: Any) -> Any:
    """Return the facts of a line that are never redacted, even if a password equals them."""
    return {name: event[name] for name in ("timestamp", "level") if name in event}


def _configure_libraries(shared: list[Any], renderer: Any, limit: FloodLimit) -> None:
    """Format, redact and limit the libraries' warnings, which use Python's own `logging`, like our lines."""
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(functools.partial(_admits, limit))
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[_name_library, *shared],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    logging.captureWarnings(capture=True)
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)


def _name_library(_: Any, __: str, event: Any) -> Any:
    """Turn a library's free text into a fact of the event `library`."""
    record = event["_record"]
    left_out = {"left_out": record.left_out} if record.left_out else {}
    return {
        **event,
        "event": "library",
        "library": record.name,
        "detail": outside_text(event["event"], limit=MAX_LIBRARY_TEXT),
        **left_out,
    }


def _admits(limit: FloodLimit, record: logging.LogRecord) -> bool:
    left_out = limit.admit(f"library:{record.name}")
    record.left_out = left_out
    return left_out is not None
