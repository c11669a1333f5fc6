"""What happens, said once: a function for each event writes the log line and moves the counter.

Event names are constants of the interface, facts are keys. Secrets that were registered with `hide` never reach
a log line, wherever they come from.
"""

from __future__ import annotations

import logging
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import structlog

from ingestor.model import Batch, Session, SessionEnd

_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
_REPEAT_AFTER = 60.0  # seconds: the same trouble is said again only then

_SHORTEST_SECRET = 4

_secrets: set[str] = set()


def hide(secret: str) -> None:
    """Keep a secret out of every log line from now on. One too short to be one would garble every line."""
    if len(secret) >= _SHORTEST_SECRET:
        _secrets.add(secret)


def scrub(text: str) -> str:
    """Return text without the secrets that were registered."""
    for secret in _secrets:
        text = text.replace(secret, "[hidden]")
    return text


def configure(level: str, form: Literal["auto", "json", "console"]) -> None:
    """Send log lines to standard error: readable on a terminal, JSON elsewhere."""
    console = form == "console" or (form == "auto" and sys.stderr.isatty())
    renderer: Any = (
        structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
        if console
        else structlog.processors.JSONRenderer(ensure_ascii=False)
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            _scrub_event,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[level]),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )


def _scrub_event(_: Any, __: str, event: Any) -> Any:
    return {key: scrub(value) if isinstance(value, str) else value for key, value in event.items()}


@dataclass(slots=True)
class Counts:
    """What this process has done so far."""

    messages: int = 0
    ticks_written: int = 0
    duplicates: int = 0
    sessions: int = 0
    batches_written: int = 0
    write_failures: int = 0
    spools_damaged: int = 0
    calendar_days_left: int | None = None
    """How many days ahead the trading calendar is known; None before the first look."""
    rejected: Counter[str] = field(default_factory=Counter)
    ends: Counter[str] = field(default_factory=Counter)
    last_batch_rows: int = 0
    last_commit_seconds: float = 0.0
    last_lag_seconds: float = 0.0
    """From the arrival of the newest message of the last batch to its commit."""


class Telemetry:
    """One function for each event. `counts` is what they have moved."""

    def __init__(self, log: Any = None) -> None:
        self.counts = Counts()
        self._log = log or structlog.get_logger()
        self._trouble = ("", 0.0)
        self._said: dict[str, float] = {}
        self._spooling = False

    def started(self, **facts: Any) -> None:
        """Log that the daemon runs."""
        self._log.info("started", **facts)

    def stopped(self, **facts: Any) -> None:
        """Log that the daemon ends, and how."""
        self._log.info("stopped", **facts)

    def warned(self, event: str, **facts: Any) -> None:
        """Log what a person should look at, though everything goes on."""
        self._log.warning(event, **facts)

    def calendar_known(self, *, days: int, warn_below: int, remedy: str) -> None:
        """Note how many days ahead the trading calendar is known, and warn when there are few."""
        self.counts.calendar_days_left = days
        if days < warn_below:
            self._log.warning("calendar_ends", in_days=days, remedy=remedy)

    def stopping(self, **facts: Any) -> None:
        """Log that a stop was asked for."""
        self._log.info("stopping", **facts)

    def connected(self, session: Session) -> None:
        """Log that a connection is open."""
        self.counts.sessions += 1
        self._log.info("connected", session=str(session.id), endpoint=session.endpoint)

    def authenticated(self, session: Session) -> None:
        """Log that prices flow from here on."""
        self._log.info("authenticated", session=str(session.id))

    def session_ended(self, session: Session, end: SessionEnd, message: str) -> None:
        """Log why a session ended, and count it."""
        self.counts.ends[end.reason] += 1
        level = self._log.info if end.reason == "stopped" else self._log.warning
        level(
            "session_ended",
            session=str(session.id),
            reason=str(end.reason),
            close_code=end.close_code,
            detail=message,
        )

    def reconnecting(self, message: str, seconds: float, *, loud: bool) -> None:
        """Log that the stream is down, why, and when it is tried again."""
        (self._log.error if loud else self._log.warning)("reconnecting", detail=message, in_seconds=round(seconds, 2))

    def rejected(self, reason: str, raw_bytes: int) -> None:
        """Count a message that was not stored as a tick; its text goes to the database, not to the log."""
        self.counts.rejected[reason] += 1
        if self.counts.rejected[reason] == 1:
            self._log.warning("message_rejected", reason=reason, bytes=raw_bytes, note="first of its kind")

    def batch_closed(self, batch: Batch) -> None:
        """Count the messages of a batch."""
        self.counts.messages += batch.count + len(batch.rejections)

    def committed(
        self, *, batches: int, ticks: int, duplicates: int, rejected: int, seconds: float, lag: float | None
    ) -> None:
        """Count a commit. `seconds` is its length, `lag` that from the newest message's arrival to the commit."""
        counts = self.counts
        counts.batches_written += batches
        counts.ticks_written += ticks
        counts.duplicates += duplicates
        counts.last_commit_seconds = seconds
        if ticks:
            counts.last_batch_rows = ticks
            counts.last_lag_seconds = lag or 0.0
        if self._trouble[0]:
            self._trouble = ("", 0.0)
            self._log.info("database_back")
        self._log.debug("committed", batches=batches, ticks=ticks, duplicates=duplicates, rejected=rejected)

    def rows_refused(self, reasons: tuple[str, ...]) -> None:
        """Log and count ticks that the database refused for what they are; they are kept as rejections."""
        self.counts.rejected.update(reasons)
        if reasons:
            self._log.error("rows_refused", count=len(reasons), reasons=sorted(set(reasons)))

    def write_failed(self, message: str, now: float, *, waiting_bytes: int) -> None:
        """Log that the database does not take ticks: once for each kind of trouble, and then every minute."""
        self.counts.write_failures += 1
        last, at = self._trouble
        if message == last and now - at < _REPEAT_AFTER:
            return
        self._trouble = (message, now)
        self._log.warning("database_trouble", detail=message, waiting_bytes=waiting_bytes)

    def spool_found(self, *, batches: int, size: int) -> None:
        """Log that an earlier process left something to be written."""
        self._spooling = True
        self._log.info("spool_found", batches=batches, bytes=size)

    def spool_damaged(self, path: Path) -> None:
        """Log and count a spool that could not be read. It is kept: a person may save something from it."""
        self.counts.spools_damaged += 1
        self._log.error("spool_damaged", set_aside_as=str(path))

    def spooling(self, *, away: bool, now: float) -> None:
        """Log that batches go to the disk; not more than once a minute, should it go on and off."""
        if self._is_due("spooling", now):
            self._spooling = True
            self._log.warning("spooling", because="the database is away" if away else "the database is slow")

    def spool_drained(self) -> None:
        """Log that nothing waits on disk any more, where it was logged that something does."""
        if self._spooling:
            self._spooling = False
            self._log.info("spool_drained")

    def left_in_spool(self, *, batches: int, size: int) -> None:
        """Log what the next start will write."""
        self._log.warning("left_in_spool", batches=batches, bytes=size, note="the next start writes it")

    def disk_trouble(self, message: str, now: float) -> None:
        """Log that the spool's disk takes or gives nothing; not more than once a minute."""
        if self._is_due("disk_trouble", now):
            self._log.error("disk_trouble", detail=message)

    def _is_due(self, event: str, now: float) -> bool:
        if now - self._said.get(event, -_REPEAT_AFTER) < _REPEAT_AFTER:
            return False
        self._said[event] = now
        return True

    def stream_blocked(self, reason: str, size: int) -> None:
        """Log that the stream is closed, because there is no room for more."""
        self._log.error("stream_blocked", reason=reason, waiting_bytes=size)

    def crashed_sessions_ended(self, count: int) -> None:
        """Log that sessions of an earlier process were found open."""
        if count:
            self._log.warning("crashed_sessions_ended", count=count)

    def abandoned(self, *, batches: int, messages: int) -> None:
        """Log what could not be written before the process had to end."""
        self._log.error("abandoned", batches=batches, messages=messages)
