"""Records from a relay: takes over its ticks as they are on its record, and its coverage, gaps included."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ingestor.batch import Batcher
from ingestor.buffer.fifo import Buffer
from ingestor.clock import Clock, SessionClock
from ingestor.errors import StoreError, StreamError
from ingestor.model import SECOND, Duration, EndReason, Micros, ResumePoint, Session, SessionEnd
from ingestor.protocol.messages import CURSOR_TOO_OLD
from ingestor.service.recorder import Recorder, new_session_id
from ingestor.settings import Settings
from ingestor.store.resume import resume_state
from ingestor.stream.decoder import Authenticated, Decoder, Refused, ServerError
from ingestor.stream.recorded import Covered, NotARelay, RecordedDecoder, RecordedTick
from ingestor.stream.upstream import (
    FIRST_SPAN,
    CoverageChange,
    UpstreamCoverage,
    UpstreamStart,
    choose_start,
    relay_address,
)
from ingestor.telemetry.events import Telemetry

SILENCE: Duration = 60 * SECOND
"""Without ticks and further coverage for so long, the relay's record has a gap now, and so has ours."""

_GAP = "The relay's record has a gap."
_SILENT = f"The relay has reported neither ticks nor coverage for {SILENCE // SECOND} s."
_MUTE = "The relay has withdrawn coverage that it had reported: its own stream was mute."
_NOT_A_RELAY = "The server sends prices without received_at, occurrence and cursor: with ?meta=1, it must be a relay."

_LOST = {EndReason.SPOOL_DAMAGED, EndReason.COMMITS_LOST}


class UpstreamRecorder(Recorder):
    """Records one connection to a relay, as one session after the other: each covers one span of the relay's record.

    Ticks keep the arrival and the number that they have on the relay's record. Coverage comes only from the relay's
    messages; no arrival and no pong here proves anything, so a frozen process or a clock that was set costs nothing.
    `point` is the place at which the next connection continues; `is_cursor_refused` is set if the relay could not.
    """

    arrivals_prove = False

    def __init__(
        self,
        start: UpstreamStart,
        *,
        new_batcher: Callable[[], Batcher],
        clock: SessionClock,
        decoder: Decoder,
        buffer: Buffer,
        telemetry: Telemetry,
        max_delay: float,
    ) -> None:
        first = new_batcher()
        super().__init__(
            first.session,
            clock=clock,
            decoder=decoder,
            batcher=first,
            buffer=buffer,
            telemetry=telemetry,
            max_delay=max_delay,
        )
        self.start = start
        self._new_batcher = new_batcher
        self._recorded = RecordedDecoder(decoder)
        self._coverage = UpstreamCoverage(start.base)
        self._cursor = start.point.cursor
        self._progress_at = clock.now()
        self.is_cursor_refused = False
        first.resume(self._cursor, None)

    @property
    def point(self) -> ResumePoint:
        """The point at which the next connection continues, once everything in the buffer is committed."""
        return ResumePoint(self._cursor, self._coverage.until)

    def frames(self, payloads: Sequence[bytes], binary: bool = False) -> None:
        """Record messages that were read at once; ignore them after the session's end."""
        if self._ended:
            return
        decode = self._recorded.decode
        for at, payload in enumerate(payloads, self.clock.stamp(len(payloads))):
            message = decode(payload, at, binary=binary)
            if isinstance(message, RecordedTick):
                self._cursor, self._progress_at = message.cursor, at
                self._batcher.add_recorded(message.tick, message.received_at, message.occurrence, message.cursor)
                self._added(at)
            elif isinstance(message, Refused):
                self._batcher.reject(payload, message.reason, at)
                self._telemetry.rejected(self.session, message.reason, len(payload), at)
                self._added(at)
            elif isinstance(message, Covered):
                self._report(message, at)
            elif isinstance(message, NotARelay):
                self._fail(StreamError(_NOT_A_RELAY, reason=EndReason.PROTOCOL_ERROR))
            else:
                self._control(message, at)

    def _control(self, message: Authenticated | ServerError, at: Micros) -> None:
        if isinstance(message, ServerError):
            self.is_cursor_refused = self.start.cursor is not None and message.text.startswith(CURSOR_TOO_OLD)
            super()._control(message, at)
        elif not self.authenticated.done():
            self._progress_at = at
            self._batcher.authenticated(self.start.base)
            self.authenticated.set_result(at)
            self.flush()

    # Coverage.

    def _report(self, message: Covered, at: Micros) -> None:
        coverage = self._coverage
        if not self.authenticated.done():
            return
        if message.is_complete:
            change = coverage.report(message.since, message.until)
        else:
            change = coverage.withdraw(message.since, message.until)
        match change:
            case CoverageChange.NOTHING:
                return
            case CoverageChange.NEXT:
                self._next_session(EndReason.UPSTREAM_GAP, _GAP)
                self._begin(at)
            case CoverageChange.BEGINS:
                self._begin(at)
            case CoverageChange.WITHDRAWN:
                self._next_session(EndReason.STALL, _MUTE)
        self._progress_at = at
        if coverage.since is not None:
            self._batcher.cover(coverage.until)

    def _begin(self, at: Micros) -> None:
        """Let the session cover from the place on at which the relay's record is complete."""
        assert self._coverage.since is not None
        self._batcher.authenticated(self._coverage.since)
        self._telemetry.authenticated(self.session, at)

    def _next_session(self, reason: EndReason, message: str) -> None:
        """End the session, and begin the next one of this connection. It covers nothing yet."""
        end = SessionEnd(self.clock.now(), reason)
        last_tick_at = self._batcher.last_tick_at
        self._put(end)
        self._telemetry.session_ended(self.session, end, message)
        self._batcher = self._new_batcher()
        self._batcher.resume(self._cursor, last_tick_at)
        self.session = self._batcher.session
        self._telemetry.connected(self.session)

    def check_time(self) -> None:
        """Ignore a pause of this process and a step of its clock: the relay has everything."""

    def check_silence(self) -> None:
        """End the session if the relay has been silent for too long; call it about every second."""
        if not self.authenticated.done() or self._ended or self._coverage.since is None:
            return
        if self.clock.now() - self._progress_at > SILENCE:
            self._coverage.stop()
            self._next_session(EndReason.UPSTREAM_GAP, _SILENT)

    def partial(self) -> None:
        """Ignore the beginning of a message: nothing is covered by its arrival."""

    def pong(self, sent_at: Micros) -> None:
        """Ignore the answer to a ping: it proves the connection, and no coverage."""

    def heartbeat(self) -> None:
        """Put a batch that proves a quiet session alive, unless it covers nothing."""
        if self._coverage.since is not None:
            super().heartbeat()


class Upstream:
    """Remembers over the connections to a relay where the recording goes on, and which gaps were asked for."""

    def __init__(
        self,
        settings: Settings,
        *,
        address: str,
        first: Micros | None,
        clock: Clock,
        buffer: Buffer,
        telemetry: Telemetry,
    ) -> None:
        self._settings = settings
        self._database_url = settings.read_database_url()
        self._address = address
        self._first = first
        self._clock = clock
        self._buffer = buffer
        self._telemetry = telemetry
        self._point: ResumePoint | None = None
        self._asked: set[Micros] = set()
        self._refused: set[str] = set()
        self._found: tuple[Micros, ...] = ()  # the gaps that the next connection asks for

    async def start(self) -> UpstreamStart:
        """Return where the next connection begins. Raises StoreError if only the database knows, and is unavailable."""
        stored: ResumePoint | None = None
        gaps: tuple[Micros, ...] = ()
        try:
            stored, gaps = await resume_state(self._database_url, self._address, timeout=self._settings.write_timeout)
        except StoreError:
            if self._point is None:
                raise
        is_newest = self._point is None or (stored is not None and not self._buffer.size)
        point = stored if is_newest else self._point
        self._found = tuple(gap for gap in gaps if gap not in self._asked)
        first = self._first if self._first is not None else self._clock.wall() - FIRST_SPAN
        start = choose_start(point, self._found, self._refused, first)
        self._telemetry.upstream_asked(covered_from=start.base, since=start.since, resumes=start.cursor is not None)
        return start

    def recorder(self, start: UpstreamStart, decoder: Decoder) -> UpstreamRecorder:
        """Begin to record a connection."""
        settings, clock = self._settings, SessionClock(self._clock)

        def new_batcher() -> Batcher:
            now = clock.now()
            session = Session(new_session_id(now), settings.instance, settings.stream_url, now, "stream")
            return Batcher(session, max_rows=settings.batch_max_rows, occurrence_keys=1)

        return UpstreamRecorder(
            start,
            new_batcher=new_batcher,
            clock=clock,
            decoder=decoder,
            buffer=self._buffer,
            telemetry=self._telemetry,
            max_delay=settings.batch_max_delay,
        )

    def ended(self, recorder: UpstreamRecorder, reason: EndReason) -> None:
        """Remember what a connection has brought, and whether its batches are sure to be stored."""
        if recorder.authenticated.cancelled():
            return
        if recorder.is_cursor_refused:
            assert recorder.start.cursor is not None
            self._refused = {recorder.start.cursor}
        else:
            self._asked |= set(self._found)
        self._point = None if reason in _LOST else recorder.point


def new_upstream(settings: Settings, *, clock: Clock, buffer: Buffer, telemetry: Telemetry) -> Upstream | None:
    """Return the memory of a relay's connections; None if the stream is no relay's."""
    found = relay_address(settings.stream_url)
    if found is None:
        return None
    address, first = found
    return Upstream(settings, address=address, first=first, clock=clock, buffer=buffer, telemetry=telemetry)
