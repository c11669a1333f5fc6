"""The relay's events: one function for each writes its log line and updates counters and readiness."""

from __future__ import annotations

import traceback
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import structlog

from ingestor.clock import Clock, SystemClock
from ingestor.redaction import outside_text

REPEAT_SECONDS = 60.0
"""The same failure is logged again after this time."""

REFUSALS = ("token", "no_authentication", "stream_limit", "option", "cursor", "database")
"""The reasons for which a client is refused, and their name in logs and metrics."""


@dataclass(slots=True)
class RelayCounts:
    """The counts of one relay."""

    ticks_sent: int = 0
    """Ticks sent to clients: one for each client."""
    streams: int = 0
    """Streams that were authenticated."""
    fallen_back: int = 0
    stuck: int = 0
    failed: int = 0
    follow_failures: int = 0
    read_failures: int = 0
    commits: int = 0
    refused: Counter[str] = field(default_factory=Counter)


class RelayTelemetry:
    """Has one function for each event. `problem` is why the log is not followed now; empty while it is."""

    def __init__(self, clock: Clock | None = None) -> None:
        self._clock = clock or SystemClock()
        self._log = structlog.get_logger()
        self._logged_at: dict[str, float] = {}
        self._is_failing = False
        self.counts = RelayCounts()
        self.problem = "The database has not answered yet."
        self.problem_since = self._clock.wall()
        self.last_commit_at: int | None = None
        self.lag_seconds = 0.0

    def started(self, **facts: Any) -> None:
        """Log the start of the relay."""
        self._log.info("relay_started", **facts)

    def listening(self, url: str, health_url: str) -> None:
        """Log the addresses of the stream and of health and metrics."""
        self._log.info("relay_listening", url=url, health_url=health_url)

    def stopping(self, signal: str | None, clients: int) -> None:
        """Log a request to stop."""
        self._log.info("relay_stopping", signal=signal, clients=clients)

    def stopped(self) -> None:
        """Log an orderly end."""
        self._log.info("relay_stopped", ticks_sent=self.counts.ticks_sent)

    def signal_ignored(self, name: str) -> None:
        """Log a signal that has no meaning for the relay."""
        self._log.warning("signal_ignored", signal=name)

    def variable_unknown(self, name: str) -> None:
        """Log a variable with our prefix that is no setting."""
        self._log.warning("unknown_variable", variable=name, note="no setting has this name")

    def followed(self) -> None:
        """Log that the log of commits is followed."""
        self.problem = ""
        self._is_failing = False
        self._log.info("relay_following")

    def follow_failed(self, detail: str) -> None:
        """Log that the log of commits can't be followed: at once, then once a minute."""
        self.counts.follow_failures += 1
        if not self.problem:
            self.problem_since = self._clock.wall()
        self.problem = outside_text(detail)
        if not self._is_failing or self._is_due("relay_follow_failed"):
            self._is_failing = True
            self._logged_at["relay_follow_failed"] = self._clock.monotonic()
            self._log.warning("relay_follow_failed", detail=self.problem)

    def read_failed(self, detail: str) -> None:
        """Count a failed read for a client, its token included; log it at most once a minute."""
        self.counts.read_failures += 1
        if self._is_due("relay_read_failed"):
            self._log.warning("relay_read_failed", detail=outside_text(detail))

    def published(self, commits: int, *, lag: float) -> None:
        """Count commits that were handed to the live clients. `lag` is the age in seconds of the newest of them."""
        self.counts.commits += commits
        self.last_commit_at = self._clock.wall()
        self.lag_seconds = max(lag, 0.0)

    def caught_up(self) -> None:
        """Note that no commit waits to be handed out."""
        self.lag_seconds = 0.0

    def log_restarted(self) -> None:
        """Log that the log of commits began again, which ends all streams."""
        self._log.error("relay_log_restarted", note="clients connect again, and ask for what they missed by from")

    def client_connected(self, client: str, **options: Any) -> None:
        """Log an authenticated stream."""
        self.counts.streams += 1
        self._log.info("relay_client_connected", client=client, **options)

    def client_left(self, client: str, *, ticks: int, reason: str) -> None:
        """Log the end of a stream."""
        self._log.info("relay_client_left", client=client, ticks=ticks, reason=outside_text(reason))

    def client_refused(self, reason: str, address: str) -> None:
        """Count a refused client; log it at most once a minute for each reason."""
        self.counts.refused[reason] += 1
        if self._is_due(f"relay_client_refused {reason}"):
            self._log.warning("relay_client_refused", reason=reason, address=address)

    def client_stuck(self, client: str) -> None:
        """Log a client that accepted nothing for too long."""
        self.counts.stuck += 1
        self._log.warning("relay_client_stuck", client=client)

    def stream_failed(self, error: Exception) -> None:
        """Log a defect of the relay that ended a stream, without the error's text: it may hold the client's data."""
        self.counts.failed += 1
        at = [f"{frame.name}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)[-3:]]
        self._log.error("relay_stream_failed", error=type(error).__name__, at=at)

    def fell_back(self) -> None:
        """Count a client that became too slow to be live."""
        self.counts.fallen_back += 1

    def sent(self, ticks: int) -> None:
        """Count ticks that were sent."""
        self.counts.ticks_sent += ticks

    def _is_due(self, event: str) -> bool:
        now = self._clock.monotonic()
        if event in self._logged_at and now - self._logged_at[event] < REPEAT_SECONDS:
            return False
        self._logged_at[event] = now
        return True
