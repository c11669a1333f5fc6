"""Events of the replicated buffer, in recorder and writer: log lines, counts, and the state of the stream."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import structlog
from prometheus_client import Histogram

from ingestor.clock import Clock
from ingestor.model import Micros
from ingestor.redaction import outside_text
from ingestor.telemetry.readiness import Check, Readiness

_REPEAT_SECONDS = 60.0

_TIMES = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


@dataclass(slots=True)
class BufferCounts:
    """The counts of this process."""

    published: int = 0
    """Messages that the stream acknowledged."""
    republished: int = 0
    """Times that batches were published again, because the stream had lost them."""
    failures: int = 0
    """Failed attempts to publish or to read."""
    reads_restarted: int = 0
    """Times that the stream was read again from an earlier place, or by a new consumer."""
    redelivered: int = 0
    """Batches that were read again though the database had them."""
    holes: int = 0
    """Holes in a session that the writer found."""
    holes_declared: int = 0
    """Holes that stay, and are gaps."""
    damaged: int = 0
    """Messages that could not be read."""
    turns: int = 0
    """Times that this writer became the active one."""


@dataclass(frozen=True, slots=True)
class BufferState:
    """The last known state of the stream. `lag` counts messages that are not committed; None in the recorder."""

    at: Micros
    messages: int
    size: int
    replicas: int
    lagging: int
    lag: int | None = None


class BufferEvents:
    """Has one function for each event. `check` of the readiness fails while the stream is unavailable."""

    def __init__(self, clock: Clock, readiness: Readiness, check: Check) -> None:
        self._clock = clock
        self._readiness = readiness
        self._check: Check = check
        self._log = structlog.get_logger()
        self._logged_at: dict[str, float] = {}
        self.counts = BufferCounts()
        self.state: BufferState | None = None
        self.problem = ""
        """Why the stream is unavailable; empty while it is not."""
        self.is_active: bool | None = None
        """Whether this writer is the active one; None in the recorder."""
        self.publish_seconds = Histogram(
            "ingestor_buffer_publish_seconds",
            "From the publication of a message to the stream's acknowledgement.",
            buckets=_TIMES,
            registry=None,
        )

    def histograms(self) -> Iterator[Histogram]:
        """Yield the histograms."""
        yield self.publish_seconds

    def stream_created(self, stream: str, replicas: int, *, is_first: bool) -> None:
        """Log that the stream was missing and was created; as an error if it had been there before."""
        level = self._log.info if is_first else self._log.error
        level("buffer_stream_created", stream=stream, replicas=replicas)

    def stream_differs(self, stream: str, differences: tuple[str, ...]) -> None:
        """Log each setting of the stream that differs from what the rules of delivery need; nothing is changed."""
        for difference in differences:
            self._log.warning("buffer_stream_differs", stream=stream, detail=difference)

    def unavailable(self, detail: str, **facts: Any) -> None:
        """Log that the stream cannot be used: at once if the reason is new, else once a minute."""
        self.counts.failures += 1
        detail = outside_text(detail)
        self._readiness.fails(self._check, detail)
        is_new, self.problem = not self.problem, detail
        if is_new or self._is_due("buffer_unavailable"):
            self._logged_at["buffer_unavailable"] = self._clock.monotonic()
            self._log.warning("buffer_unavailable", detail=detail, **facts)

    def works(self) -> None:
        """Log that the stream can be used again."""
        if self.problem:
            self.problem = ""
            self._log.info("buffer_recovered")

    def published(self, seconds: float) -> None:
        """Count a message that the stream acknowledged after `seconds`."""
        self.counts.published += 1
        self.publish_seconds.observe(seconds)
        self.works()

    def republishing(self, session: UUID, after: int) -> None:
        """Log that batches of a session are published again, because the stream has lost them."""
        self.counts.republished += 1
        if self._is_due("buffer_republishing"):
            self._log.warning("buffer_republishing", session=str(session), after_batch=after)

    def batches_gone(self, session: UUID, after: int) -> None:
        """Log that the recorder no longer has batches that the stream has lost: their time becomes a gap."""
        self._log.error("buffer_batches_gone", session=str(session), after_batch=after)

    def stream_reset(self) -> None:
        """Log that the stream went back or was replaced."""
        self.counts.reads_restarted += 1
        self._log.error("buffer_stream_reset", note="it is read from its beginning, and recorders publish again")

    def turn_taken(self) -> None:
        """Log that this writer is the active one."""
        self.counts.turns += 1
        self.is_active = True
        self._log.info("writer_active")

    def turn_lost(self, detail: str = "") -> None:
        """Log that another writer is the active one, once."""
        if self.is_active is not False:
            self.is_active = False
            self._log.info("writer_standby", detail=outside_text(detail))
        if not self.problem:
            self._readiness.passes(self._check)

    def hole_found(self, session: UUID, after: int) -> None:
        """Log that messages of a session are missing in the stream; its recorder is asked for them."""
        self.counts.holes += 1
        self._log.warning("buffer_hole_found", session=str(session), after_batch=after)

    def hole_closed(self, session: UUID) -> None:
        """Log that the recorder has published what was missing."""
        self._log.info("buffer_hole_closed", session=str(session))

    def hole_declared(self, session: UUID, after: int, because: str) -> None:
        """Log that what is missing stays missing: the session covers nothing more, so the time is a gap."""
        self.counts.holes_declared += 1
        self._log.error("buffer_hole_declared", session=str(session), after_batch=after, because=because)

    def database_went_back(self, session: UUID, last_batch: int) -> None:
        """Log that the database lacks commits that it had acknowledged; the stream is read again from its beginning."""
        self.counts.reads_restarted += 1
        self._log.error("database_went_back", session=str(session), last_batch=last_batch)

    def message_damaged(self, sequence: int, why: str) -> None:
        """Log a message of the stream that cannot be read."""
        self.counts.damaged += 1
        self._log.error("buffer_message_damaged", sequence=sequence, because=outside_text(why))

    def _is_due(self, event: str) -> bool:
        now = self._clock.monotonic()
        if event in self._logged_at and now - self._logged_at[event] < _REPEAT_SECONDS:
            return False
        self._logged_at[event] = now
        return True
