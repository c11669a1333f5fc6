"""The daemon's status: the one source of its page, metrics, readiness and health."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from itertools import chain, islice
from typing import Any

from ingestor import __version__
from ingestor.batch import unpack
from ingestor.buffer.fifo import BLOCK_MESSAGES, Buffer
from ingestor.clock import UNCOMPARED, Clock, ClockDifference, from_datetime, to_datetime
from ingestor.coverage.calendar import Calendar
from ingestor.coverage.report import Day, as_record
from ingestor.model import SECOND, EndReason, Micros
from ingestor.service.coverage_monitor import Coverage, CoverageMonitor
from ingestor.settings import Settings
from ingestor.store.registry import RegisteredRelay
from ingestor.telemetry.buffer_events import BufferEvents
from ingestor.telemetry.events import LATEST_TICKS, Connection, Telemetry
from ingestor.telemetry.history import HISTORY_STEPS
from ingestor.telemetry.liveness import LivenessDeadline
from ingestor.telemetry.metrics import Facts

VERSION = 1
"""The version of the JSON. Within a version, fields may be added; none is removed or changes its meaning."""

MISSED_HEARTBEATS = 3
"""While the stream is alive, readiness fails after so many heartbeats without a commit."""


class Status:
    """Collects the status from all parts of the daemon, without waiting."""

    def __init__(
        self,
        settings: Settings,
        *,
        clock: Clock,
        telemetry: Telemetry,
        buffer: Buffer,
        calendar: Calendar,
        coverage_monitor: CoverageMonitor,
        liveness_deadlines: Mapping[str, LivenessDeadline],
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._telemetry = telemetry
        self._buffer = buffer
        self._calendar = calendar
        self._coverage_monitor = coverage_monitor
        self._liveness_deadlines = liveness_deadlines
        self._was_blocked = False
        self.buffer_events: BufferEvents | None = None
        """The replicated buffer's, if there is one."""

    def refresh(self) -> None:
        """Update the checks of readiness that no event updates. Only the daemon's loop calls it, about every second."""
        readiness, blocked = self._telemetry.readiness, self._buffer.blocked_by
        if blocked is EndReason.COMMITS_LOST:
            readiness.fails("database", BLOCK_MESSAGES[blocked])
        elif blocked is not None:
            readiness.fails("spool", BLOCK_MESSAGES[blocked])
        elif self._was_blocked or not self._buffer.size:
            readiness.passes("spool")
        self._was_blocked = blocked is not None
        self._check_commits()

    def _check_commits(self) -> None:
        """Fail readiness while nothing is committed, beside the cause if one is known."""
        stream, committed = self._telemetry.stream, self._telemetry.counts.last_commit_at
        if stream.state != "streaming":
            return
        now, expected_since = self._clock.wall(), max(committed or 0, stream.since)
        if now - expected_since > self._settings.heartbeat * MISSED_HEARTBEATS * SECOND:
            age = (now - (committed or self._telemetry.started_at)) / SECOND
            self._telemetry.readiness.shows("database", f"Nothing was committed for {age:.0f} s.", expected_since)

    def loops(self) -> dict[str, bool]:
        """Return for each loop's name whether it advances."""
        return {name: not liveness.is_stuck for name, liveness in self._liveness_deadlines.items()}

    def readiness(self) -> dict[str, Any]:
        """Return whether ticks are received and written, and each failing check with its start and detail."""
        problems = [
            {"check": problem.check, "since": _iso(problem.since), "detail": problem.detail}
            for problem in self._telemetry.readiness.problems
        ]
        return {"ready": not problems, "problems": problems}

    def line(self) -> str:
        """Return the status in one line for the service manager."""
        stream, counts = self._telemetry.stream, self._telemetry.counts
        problems = "".join(f"; {each.check}: {each.detail}" for each in self._telemetry.readiness.problems)
        return f"{stream.state}, {counts.ticks_written:,} ticks written, {self._buffer.size:,} bytes waiting{problems}"

    def facts(self) -> Facts:
        """Return the current values of the metrics."""
        buffer, coverage = self._buffer, self._coverage_monitor.coverage
        day = coverage.day if coverage else None
        now = self._clock.wall()
        return Facts(
            exchange_open=self._calendar.session_at(now) is not None,
            buffer_bytes=buffer.size,
            spool_bytes=buffer.spooled_bytes,
            spool_max_bytes=buffer.spool_max_bytes,
            spool_batches=buffer.spooled_batches,
            open_gaps=coverage.open.count if coverage else None,
            oldest_open_gap_seconds=self._oldest_gap_seconds(coverage),
            coverage_ratio=day.percent / 100 if day is not None and day.percent is not None else None,
        )

    def _oldest_gap_seconds(self, coverage: Coverage | None) -> float | None:
        if coverage is None:
            return None
        return self._age(coverage.open.oldest) if coverage.open.oldest else 0.0

    def _age(self, moment: datetime) -> float:
        """Return the age in seconds of an instant in the database, by the database's clock."""
        difference = self._telemetry.clock_difference or UNCOMPARED
        return (self._clock.wall() - difference.ahead - from_datetime(moment)) / SECOND

    def status(self) -> dict[str, Any]:
        """Return the page's data for JSON: instants in ISO 8601 and UTC, durations in seconds, sizes in bytes."""
        telemetry, counts, stream = self._telemetry, self._telemetry.counts, self._telemetry.stream
        return {
            "version": VERSION,
            "ingestor": __version__,
            "instance": self._settings.instance,
            "endpoint": self._settings.stream_url,
            "timezone": self._settings.exchange_timezone,
            "now": _iso(self._clock.wall()),
            "started_at": _iso(telemetry.started_at),
            "ready": self.readiness(),
            "stream": {
                "state": stream.state,
                "since": _iso(stream.since),
                "detail": stream.detail,
                "retry_at": _iso(stream.retry_at),
            },
            "market": self._market(),
            "counts": {
                "messages": counts.messages,
                "ticks_written": counts.ticks_written,
                "ticks_recovered": counts.ticks_recovered,
                "duplicates": counts.duplicates,
                "rejected": counts.rejected.total(),
                "sessions": counts.sessions,
                "batches_written": counts.batches_written,
                "write_failures": counts.write_failures,
            },
            "buffer": {
                "bytes": self._buffer.size,
                "spool_bytes": self._buffer.spooled_bytes,
                "spool_batches": self._buffer.spooled_batches,
                "spool_max_bytes": self._buffer.spool_max_bytes,
                "blocked_by": self._buffer.blocked_by,
            },
            "last": {
                "message_at": _iso(counts.last_message_at),
                "tick_at": _iso(counts.last_tick_at),
                "commit_at": _iso(counts.last_commit_at),
                "commit_seconds": counts.last_commit_seconds if counts.last_commit_at else None,
                "wire_to_commit_seconds": counts.last_lag_seconds if counts.last_batch_rows else None,
            },
            **self._replicated(),
            "history": self._history(),
            "connections": [_connection(each) for each in telemetry.connections],
            "coverage": self._coverage(),
            "relays": self._relays(),
            "ticks": self._ticks(),
            "rejections": {
                "by_reason": dict(counts.rejected.most_common()),
                "latest": [
                    {"received_at": _iso(each.received_at), "reason": each.reason, "bytes": each.size}
                    for each in telemetry.rejections
                ],
            },
            "calendar_days_left": counts.calendar_days_left,
            "clock": _difference(telemetry.clock_difference),
        }

    def _replicated(self) -> dict[str, Any]:
        """Return the state of the replicated buffer, if there is one."""
        events = self.buffer_events
        if events is None:
            return {}
        state = events.state
        return {
            "replicated": {
                "problem": events.problem or None,
                "published": events.counts.published,
                "republished": events.counts.republished,
                "messages": state.messages if state else None,
                "bytes": state.size if state else None,
                "replicas": state.replicas if state else None,
                "replicas_in_step": state.replicas - state.lagging if state else None,
            }
        }

    def _coverage(self) -> dict[str, Any] | None:
        coverage = self._coverage_monitor.coverage
        if coverage is None or coverage.day is None:
            return None
        return _coverage(coverage, coverage.day, max(0.0, self._age(coverage.as_of)))

    def _relays(self) -> list[dict[str, Any]] | None:
        """Return the relays as of the last query; None if they are unknown."""
        coverage = self._coverage_monitor.coverage
        return None if coverage is None else [_relay(relay) for relay in coverage.relays]

    def _market(self) -> dict[str, Any]:
        now = self._clock.wall()
        session = self._calendar.session_at(now)
        shown = session or self._calendar.session_after(now)
        return {
            "open": session is not None,
            "trading_day": shown.trading_day.isoformat() if shown else None,
            "opens_at": _iso(shown.opens_at) if shown else None,
            "closes_at": _iso(shown.closes_at) if shown else None,
        }

    def _history(self) -> dict[str, Any]:
        now, history = self._clock.monotonic(), self._telemetry.history
        steps, length = history.steps(now), history.step
        before = [None] * (HISTORY_STEPS - len(steps))
        return {
            "step": length,
            "until": _iso(self._clock.wall() - round(now % length * SECOND)),
            "ticks": [*before, *(step.ticks / length for step in steps)],
            "delay": [*before, *(step.delay for step in steps)],
            "delay_max": [*before, *(step.delay_max for step in steps)],
        }

    def _ticks(self) -> list[dict[str, Any]]:
        newest = (reversed(list(unpack(batch.rows))) for batch in reversed(self._telemetry.latest_batches))
        return [
            {
                "received_at": _iso(received_at),
                "time": _iso(tick.time),
                "symbol": tick.symbol,
                "price": tick.price,
                "volume": tick.volume,
            }
            for _, tick, received_at in islice(chain.from_iterable(newest), LATEST_TICKS)
        ]


def _connection(connection: Connection) -> dict[str, Any]:
    session, end = connection.session, connection.end
    return {
        "connected_at": _iso(session.connected_at),
        "authenticated_at": _iso(connection.authenticated_at),
        "ended_at": _iso(end.at) if end else None,
        "reason": end.reason if end else None,
        "close_code": end.close_code if end else None,
        "detail": connection.detail,
        "ticks": connection.ticks,
    }


def _coverage(coverage: Coverage, day: Day, age: float) -> dict[str, Any]:
    return {
        "trading_day": day.trading_day.isoformat(),
        "started_at": day.started_at.isoformat(),
        "ended_at": day.ended_at.isoformat(),
        "trading_minutes": day.trading_minutes,
        "covered_minutes": day.covered_minutes,
        "missing_minutes": day.missing_minutes,
        "backfilled_minutes": day.backfilled_minutes,
        "percent": day.percent,
        "open_gaps": coverage.open.count,
        "as_of": coverage.as_of.isoformat(),
        "age_seconds": age,
        "gaps": [as_record(gap) for gap in coverage.gaps],
    }


def _relay(relay: RegisteredRelay) -> dict[str, Any]:
    return {
        "instance": relay.instance,
        "clients": relay.clients,
        "started_at": relay.started_at.isoformat(timespec="milliseconds"),
        "seen_at": relay.seen_at.isoformat(timespec="milliseconds"),
        "listening": relay.is_listening,
    }


def _difference(difference: ClockDifference | None) -> dict[str, Any] | None:
    if difference is None:
        return None
    return {
        "ahead_seconds": difference.ahead / SECOND,
        "error_seconds": difference.error / SECOND,
        "is_wrong": difference.is_large,
    }


def _iso(at: Micros | None) -> str | None:
    return None if at is None else to_datetime(at).isoformat(timespec="milliseconds")
