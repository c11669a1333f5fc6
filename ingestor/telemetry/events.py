"""Events: one function for each writes its log line and updates counters and readiness.

The names of events and their keys are part of the interface (docs/reference/events.md).
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args
from uuid import UUID

import structlog
from prometheus_client import Histogram

from ingestor.clock import Clock, ClockDifference, SystemClock, to_datetime
from ingestor.model import SECOND, Batch, EndReason, Micros, Session, SessionEnd, Tally
from ingestor.redaction import outside_text
from ingestor.telemetry.history import HISTORY_STEP_SECONDS, History
from ingestor.telemetry.readiness import MAX_DETAIL, Readiness
from ingestor.telemetry.rejections import RejectionRun

_REPEAT_SECONDS = 60.0
"""The same failure is logged again after this time."""

LATEST_TICKS = 20
LATEST_REJECTIONS = 10
LATEST_CONNECTIONS = 50

StreamState: TypeAlias = Literal["connecting", "authenticating", "streaming", "waiting", "blocked", "stopped"]
STREAM_STATES: tuple[StreamState, ...] = get_args(StreamState)

_DELAYS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0, 600.0, 3600.0)


@dataclass(slots=True)
class Counts:
    """The counts of this process."""

    messages: int = 0
    ticks_written: int = 0
    """Ticks of this process's sessions, with duplicates: the sum of `ticks` over their rows in the database."""
    ticks_recovered: int = 0
    """Ticks of an earlier process's sessions, written from the spool that it left."""
    duplicates: int = 0
    sessions: int = 0
    batches_written: int = 0
    write_failures: int = 0
    spools_damaged: int = 0
    bars_stored: int = 0
    """One-minute bars."""
    bars_repaired: int = 0
    """Stale minutes whose bars were computed again."""
    rollup_failures: int = 0
    calendar_days_left: int | None = None
    """How many days ahead the trading calendar is known; None before the first check."""
    rejected: Counter[str] = field(default_factory=Counter)
    ends: Counter[str] = field(default_factory=Counter)
    reconnects: Counter[str] = field(default_factory=Counter)
    transaction_max_bytes: int | None = None
    """The most bytes of one transaction; None before the first commit or failure."""
    last_batch_rows: int = 0
    last_commit_seconds: float = 0.0
    last_lag_seconds: float = 0.0
    """The time from the arrival of the last batch's newest message to its commit."""
    last_message_at: Micros | None = None
    last_tick_at: Micros | None = None
    last_commit_at: Micros | None = None


@dataclass(frozen=True, slots=True)
class Stream:
    """The state of the connection and its beginning. `retry_at` is the time of the next attempt, while it waits."""

    state: StreamState
    since: Micros
    detail: str = ""
    retry_at: Micros | None = None


@dataclass(slots=True)
class Connection:
    """One session of this process, as the page shows it."""

    session: Session
    authenticated_at: Micros | None = None
    end: SessionEnd | None = None
    detail: str = ""
    ticks: int = 0


@dataclass(frozen=True, slots=True)
class SeenRejection:
    """A rejected message without its text, which is in the database."""

    received_at: Micros
    reason: str
    size: int


class Histograms:
    """Histograms for Prometheus, observed once for each batch or commit, never for each tick."""

    def __init__(self) -> None:
        self.batch_ticks = Histogram(
            "ingestor_batch_ticks",
            "Ticks in a batch that has any.",
            buckets=(1, 2, 5, 10, 25, 50, 100, 250, 500, 1000, 2500, 5000, 10_000, 50_000, 100_000),
            registry=None,
        )
        self.batch_age = Histogram(
            "ingestor_batch_age_seconds",
            "From the arrival of a batch's first message to its close.",
            buckets=_DELAYS,
            registry=None,
        )
        self.commit = Histogram(
            "ingestor_commit_seconds", "Length of a transaction that was committed.", buckets=_DELAYS, registry=None
        )
        self.wire_to_commit = Histogram(
            "ingestor_wire_to_commit_seconds",
            "From the arrival of the newest message of a commit to the commit.",
            buckets=_DELAYS,
            registry=None,
        )
        self.feed_delay = Histogram(
            "ingestor_feed_delay_seconds",
            "From the exchange's time of a batch's newest tick, in whole seconds, to its arrival.",
            buckets=(0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0, 1200.0, 3600.0),
            registry=None,
        )

    def __iter__(self) -> Iterator[Histogram]:
        return iter((self.batch_ticks, self.batch_age, self.commit, self.wire_to_commit, self.feed_delay))


class Telemetry:
    """Has one function for each event, and the counts and states that they update."""

    def __init__(self, clock: Clock | None = None, *, history_step: float = HISTORY_STEP_SECONDS) -> None:
        self._clock = clock or SystemClock()
        self._log = structlog.get_logger()
        self.started_at = self._clock.wall()
        self.counts = Counts()
        self.histograms = Histograms()
        self.history = History(self._clock.monotonic(), history_step)
        self.readiness = Readiness(self._clock)
        self.readiness.fails("stream", "No connection has been opened yet.")
        self.readiness.fails("database", "The database has not answered yet.")
        self.stream = Stream("connecting", self.started_at)
        self.connections: deque[Connection] = deque(maxlen=LATEST_CONNECTIONS)
        self.rejections: deque[SeenRejection] = deque(maxlen=LATEST_REJECTIONS)
        self.latest_batches: deque[Batch] = deque()
        """The newest batches, with at least `LATEST_TICKS` ticks if there were so many."""
        self._rejection_run = RejectionRun()
        self.clock_difference: ClockDifference | None = None
        """The difference between this machine's clock and the database's at the last comparison."""
        self._tallies: dict[UUID, Tally] = {}  # by session of this process, until its end is committed
        self._last_failure = ("", 0.0)
        self._logged_at: dict[str, float] = {}
        self._spooling = False
        self._reduced = False  # smaller transactions were logged
        self.database_recovered = asyncio.Event()
        """Set when writes succeed again after a failure, and when the spool is empty again: coverage has changed."""

    # The process.

    def started(self, **facts: Any) -> None:
        """Log the start of the daemon."""
        self._log.info("started", **facts)

    def http_listening(self, url: str) -> None:
        """Log the URL of the status page."""
        self._log.info("http_listening", url=url)

    def stopping(self, **facts: Any) -> None:
        """Log a request to stop."""
        self._log.info("stopping", **facts)

    def signal_ignored(self, name: str) -> None:
        """Log a signal that has no meaning for the daemon."""
        self._log.warning("signal_ignored", signal=name)

    def stopped(self) -> None:
        """Log an orderly end of the daemon."""
        self._log.info("stopped", ticks=self.counts.ticks_written)

    def warned(self, event: str, **facts: Any) -> None:
        """Log a warning that an operator should look at."""
        self._log.warning(event, **facts)

    def loop_stalled(self, loops: list[str]) -> None:
        """Log loops that no longer advance; at most once a minute."""
        if self._is_due("loop_stalled"):
            self._log.error("loop_stalled", loops=loops, note="the service manager should restart this process")

    def calendar_known(self, *, days: int, warn_below: int, remedy: str) -> None:
        """Record how many days ahead the trading calendar is known; log a warning if they are few."""
        self.counts.calendar_days_left = days
        if days < warn_below:
            self._log.warning("calendar_expiring", in_days=days, remedy=remedy)

    def coverage_query_failed(self, detail: str) -> None:
        """Log a failed query of coverage, at most once an hour, and not while writes fail too."""
        if not self._last_failure[0] and self._is_due("coverage_query_failed", every=3600.0):
            self._log.warning(
                "coverage_query_failed", detail=detail, note="gaps and coverage are not shown until it succeeds"
            )

    def rolled_up(self, *, bars: int, repaired: int) -> None:
        """Count stored bars and repaired stale minutes."""
        self.counts.bars_stored += bars
        self.counts.bars_repaired += repaired

    def rollup_failed(self, detail: str) -> None:
        """Log a failed rollup, at most once an hour, and not while writes fail too."""
        self.counts.rollup_failures += 1
        if not self._last_failure[0] and self._is_due("rollup_failed", every=3600.0):
            self._log.warning("rollup_failed", detail=detail, note="bars are computed from ticks until it succeeds")

    # The stream.

    def connecting(self) -> None:
        """Record that a connection is being opened."""
        self._stream_is("connecting", self.stream.detail)

    def upstream_asked(self, *, covered_from: Micros, since: Micros | None, resumes: bool) -> None:
        """Log what a relay is asked for: its record from an arrival on, all behind the last cursor, or both."""
        record_from = None if since is None else to_datetime(since).isoformat()
        self._log.info(
            "upstream_asked",
            covered_from=to_datetime(covered_from).isoformat(),
            record_from=record_from,
            resumes=resumes,
        )

    def connected(self, session: Session) -> None:
        """Log an open connection."""
        self.counts.sessions += 1
        self.connections.appendleft(Connection(session))
        self._stream_is("authenticating", self.stream.detail)
        self._log.info("connected", session=str(session.id), endpoint=session.endpoint)

    def authenticated(self, session: Session, at: Micros) -> None:
        """Log that the server accepted the token and sends prices."""
        if connection := self._connection(session):
            connection.authenticated_at = at
        self._stream_is("streaming")
        self._assess_stream()
        self._log.info("authenticated", session=str(session.id))

    def session_ended(self, session: Session, end: SessionEnd, message: str) -> None:
        """Log and count the end of a session and its reason."""
        self.counts.ends[end.reason] += 1
        if connection := self._connection(session):
            connection.end, connection.detail = end, outside_text(message, limit=MAX_DETAIL)
        if session.kind == "stream":
            self._stream_is("stopped" if end.reason == "stopped" else "connecting", message)
            self.readiness.fails("stream", message)
        is_good = end.reason in {EndReason.STOPPED, EndReason.FINISHED}
        level = self._log.info if is_good else self._log.warning
        level(
            "session_ended",
            session=str(session.id),
            reason=str(end.reason),
            close_code=end.close_code,
            detail=message,
        )

    def reconnecting(self, message: str, seconds: float, *, cause: str, alert: bool) -> None:
        """Log why the stream is down and in how many seconds it is retried; as an error if `alert`."""
        self.counts.reconnects[cause] += 1
        self._stream_is("waiting", message, retry_at=self._clock.wall() + round(seconds * SECOND))
        self.readiness.fails("stream", message)
        level = self._log.error if alert else self._log.warning
        level("reconnecting", cause=cause, detail=message, in_seconds=round(seconds, 2))

    def waiting_for_room(self, detail: str) -> None:
        """Record that the stream stays closed until the buffer has room."""
        self._stream_is("blocked", detail)
        self.readiness.fails("stream", detail)

    def stream_blocked(self, session: Session, reason: str, size: int) -> None:
        """Log that the stream is closed because the buffer is blocked."""
        self._log.error("stream_blocked", session=str(session.id), reason=reason, waiting_bytes=size)

    def _stream_is(self, state: StreamState, detail: str = "", *, retry_at: Micros | None = None) -> None:
        since = self.stream.since if state == self.stream.state else self._clock.wall()
        detail = outside_text(detail, limit=MAX_DETAIL)
        self.stream = replace(self.stream, state=state, since=since, detail=detail, retry_at=retry_at)

    def _connection(self, session: Session) -> Connection | None:
        return next((each for each in self.connections if each.session.id == session.id), None)

    # Messages and batches.

    def rejected(self, session: Session, reason: str, raw_bytes: int, at: Micros) -> None:
        """Count a rejected message, and log the first of each reason, without its text."""
        self.counts.rejected[reason] += 1
        self.rejections.appendleft(SeenRejection(at, reason, raw_bytes))
        if self.counts.rejected[reason] == 1:
            self._log.warning(
                "message_rejected", session=str(session.id), reason=reason, bytes=raw_bytes, note="first of its kind"
            )

    def batch_closed(self, batch: Batch, age: float | None) -> None:
        """Count the messages of a batch. `age` is the time in seconds since its first message; None without one."""
        self._tallies.setdefault(batch.session.id, Tally(0, 0, 0))
        if age is None:
            return
        counts = self.counts
        counts.messages += batch.count + len(batch.rejections)
        counts.last_message_at = batch.last_message_at
        self.histograms.batch_age.observe(age)
        if batch.session.kind == "stream":
            self._update_rejection_run(batch)
        if batch.span is None or batch.last_message_at is None:
            return
        counts.last_tick_at = batch.last_message_at  # a rejection after the last tick is milliseconds newer
        self.histograms.batch_ticks.observe(batch.count)
        self.histograms.feed_delay.observe(max(0.0, (batch.last_message_at - batch.span[1]) / SECOND))
        self.history.add_ticks(batch.count, self._clock.monotonic())
        if connection := self._connection(batch.session):
            connection.ticks += batch.count
        self._keep_latest(batch)

    def _update_rejection_run(self, batch: Batch) -> None:
        """Log the beginning and the end of a run of unreadable messages without a tick."""
        run = self._rejection_run
        was_problem = run.is_problem
        run.add(batch)
        if run.is_problem and not was_problem:
            self._log.error("ticks_missing", session=str(batch.session.id), messages=run.count, reason=run.reason)
        elif was_problem and not run.is_problem:
            self._log.info("ticks_back", session=str(batch.session.id))
        if (run.is_problem or was_problem) and self.stream.state == "streaming":
            self._assess_stream()

    def _assess_stream(self) -> None:
        """Update the readiness of an authenticated stream."""
        run = self._rejection_run
        if run.is_problem:
            self.readiness.fails("stream", run.detail, since=run.since)
        else:
            self.readiness.passes("stream")

    def _keep_latest(self, batch: Batch) -> None:
        latest = self.latest_batches
        latest.append(batch)
        while len(latest) > 1 and sum(each.count for each in latest) - latest[0].count >= LATEST_TICKS:
            latest.popleft()

    # The database.

    def committed(
        self,
        batches: tuple[Batch, ...],
        *,
        written: int,
        ticks: int,
        tallies: Mapping[UUID, Tally],
        seconds: float,
        lag: float | None,
    ) -> None:
        """Count a commit of `batches`, of which `written` batches with `ticks` ticks were not committed before.

        `tallies` are the totals of each session in the database, so that the next commit also counts one whose answer
        was lost. `seconds` is the transaction's length, `lag` the time from the newest message's arrival to the commit.
        """
        counts = self.counts
        counts.batches_written += written
        for session, tally in tallies.items():
            self._count(session, tally)
        for batch in batches:
            if batch.end is not None:
                self._tallies.pop(batch.session.id, None)
        counts.last_commit_seconds = seconds
        counts.last_commit_at = self._clock.wall()
        self.histograms.commit.observe(seconds)
        if ticks and lag is not None:
            counts.last_batch_rows = ticks
            counts.last_lag_seconds = lag
            self.histograms.wire_to_commit.observe(max(0.0, lag))
            self.history.add_delay(max(0.0, lag), self._clock.monotonic())
        self._database_works()
        self._log.debug("committed", batches=written, ticks=ticks)

    def committed_elsewhere(
        self, session: UUID, tally: Tally, *, batches: int, seconds: float, lag: float | None, is_ended: bool
    ) -> None:
        """Count a commit of this process's batches by `ingestor write`, with the same meanings as in `committed`."""
        ticks = max(0, tally.ticks - known.ticks) if (known := self._tallies.get(session)) else 0
        self._count(session, tally)
        if is_ended:
            self._tallies.pop(session, None)
        self.counts.batches_written += batches
        self.counts.last_commit_seconds = seconds
        self.counts.last_commit_at = self._clock.wall()
        if ticks and lag is not None:
            self.counts.last_batch_rows = ticks
            self.counts.last_lag_seconds = lag
            self.histograms.wire_to_commit.observe(max(0.0, lag))
            self.history.add_delay(max(0.0, lag), self._clock.monotonic())
        self._database_works()

    def _count(self, session: UUID, tally: Tally) -> None:
        known = self._tallies.get(session)
        if known is None:
            self.counts.ticks_recovered += tally.added
            return
        # A database that lost ticks reports fewer; a counter never decreases.
        self.counts.ticks_written += max(0, tally.ticks - known.ticks)
        self.counts.duplicates += max(0, tally.duplicates - known.duplicates)
        self._tallies[session] = tally

    def rows_refused(self, reasons: tuple[str, ...]) -> None:
        """Log and count ticks that the database refused for their values; they are kept as rejections."""
        self.counts.rejected.update(reasons)
        if reasons:
            self._log.error("rows_refused", count=len(reasons), reasons=sorted(set(reasons)))

    def write_failed(self, message: str, *, waiting_bytes: int, alert: bool = False) -> None:
        """Log a failed write at once if its message is new, else once a minute; as an error if `alert`."""
        self.counts.write_failures += 1
        self.readiness.fails("database", message)
        now = self._clock.monotonic()
        last, at = self._last_failure
        if message == last and now - at < _REPEAT_SECONDS:
            return
        self._last_failure = (message, now)
        level = self._log.error if alert else self._log.warning
        level("database_write_failed", detail=message, waiting_bytes=waiting_bytes)

    def transactions_sized(self, max_bytes: int, *, is_normal: bool) -> None:
        """Record the most bytes of a transaction; log a reduction, at most once a minute, and its end."""
        self.counts.transaction_max_bytes = max_bytes
        if is_normal:
            if self._reduced:
                self._reduced = False
                self._log.info("transactions_restored", max_bytes=max_bytes)
        elif self._is_due("transactions_reduced"):
            self._reduced = True
            self._log.warning("transactions_reduced", max_bytes=max_bytes)

    def lock_waited(self, detail: str) -> None:
        """Log the lock that a write waits for and its holder; at most once a minute."""
        if self._is_due("lock_waited"):
            self._log.warning("lock_waited", detail=detail)

    def commits_lost(self, session: UUID, messages: int) -> None:
        """Log that the database lacks acknowledged messages of a session; at most once a minute."""
        if self._is_due("commits_lost"):
            self._log.error("commits_lost", session=str(session), messages=messages)

    def crashed_sessions_ended(self, count: int) -> None:
        """Log how many sessions of an earlier process were open. This is the database's first answer."""
        self._database_works()
        if count:
            self._log.warning("crashed_sessions_ended", count=count)

    def _database_works(self) -> None:
        self.readiness.passes("database")
        if self._last_failure[0]:
            self._last_failure = ("", 0.0)
            self.database_recovered.set()
            self._log.info("database_recovered")

    def clocks_compared(self, difference: ClockDifference) -> None:
        """Log the difference between this machine's clock and the database's, as a warning if it is large."""
        self.clock_difference = difference
        level = self._log.warning if difference.is_large else self._log.info
        level("clocks_compared", ahead=round(difference.ahead / SECOND, 6), error=round(difference.error / SECOND, 6))

    # The spool.

    def spool_found(self, *, batches: int, size: int) -> None:
        """Log the batches that an earlier process left."""
        self._spooling = True
        self._log.info("spool_found", batches=batches, bytes=size)

    def spool_damaged(self, path: Path, why: str) -> None:
        """Log and count a damaged spool. Its file is kept, so that an operator can recover data from it."""
        self.counts.spools_damaged += 1
        self._log.error("spool_damaged", set_aside_as=str(path), because=why)

    def spooling(self, *, database_failed: bool) -> None:
        """Log that batches go to the disk; at most once a minute."""
        if self._is_due("spooling"):
            self._spooling = True
            self._log.warning(
                "spooling", because="the database is unavailable" if database_failed else "the database is slow"
            )

    def spool_drained(self) -> None:
        """Log that the spool is empty, if spooling was logged."""
        if self._spooling:
            self._spooling = False
            self.database_recovered.set()
            self._log.info("spool_drained")

    def spool_not_empty(self, *, batches: int, size: int) -> None:
        """Log the batches that the next start will write."""
        self._log.warning("spool_not_empty", batches=batches, bytes=size, note="the next start writes it")

    def spool_write_failed(self, message: str) -> None:
        """Log a failure of the spool's disk; at most once a minute."""
        self.readiness.fails("spool", message)
        if self._is_due("spool_write_failed"):
            self._log.error("spool_write_failed", detail=message)

    def disk_works(self) -> None:
        """Record that the spool's disk works."""
        self.readiness.passes("spool")

    def messages_lost(self, *, batches: int, messages: int) -> None:
        """Log the messages that could not be kept before the process had to end."""
        self._log.error("messages_lost", batches=batches, messages=messages)

    def _is_due(self, event: str, every: float = _REPEAT_SECONDS) -> bool:
        now = self._clock.monotonic()
        if event in self._logged_at and now - self._logged_at[event] < every:
            return False
        self._logged_at[event] = now
        return True
