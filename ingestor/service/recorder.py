"""Records one session: turns frames into numbered batches with coverage, and puts them into the buffer."""

from __future__ import annotations

import asyncio
import math
import secrets
import uuid
from collections.abc import Sequence
from typing import Literal

from ingestor.batch import Batcher
from ingestor.buffer.fifo import BLOCK_MESSAGES, Buffer
from ingestor.clock import Clock, SessionClock
from ingestor.errors import StreamError
from ingestor.model import SECOND, EndReason, Micros, Session, SessionEnd, Tick
from ingestor.settings import Settings
from ingestor.stream.decoder import Authenticated, Decoder, Refused, ServerError
from ingestor.stream.retry import server_error
from ingestor.telemetry.events import Telemetry

WATCH_INTERVAL = 1.0
"""Seconds between two checks of the clocks and for a stall."""


class Recorder:
    """Decodes, numbers and batches the messages of one session. Never waits.

    `authenticated` is a future of the instant at which the server accepted the token. `failed` is a future of the
    StreamError that ends the session from our side: a server's error message, a full buffer, a clock that was set, a
    process that did not run.

    Arrival times are proof only while this process runs. After a pause longer than `pause` seconds, messages in the
    socket may have arrived at any time during the pause, so coverage waits for the answer to a ping sent after it.
    After a pause longer than `freeze` seconds the session ends without further coverage.

    While a message is incomplete, coverage extends at most to its beginning: pongs may arrive between its fragments,
    and the message is lost if the connection is cut.
    """

    arrivals_prove = True
    """Whether time is covered by the arrival of messages here."""

    def __init__(
        self,
        session: Session,
        *,
        clock: SessionClock,
        decoder: Decoder,
        batcher: Batcher,
        buffer: Buffer,
        telemetry: Telemetry,
        max_delay: float,
        pause: float = math.inf,
        freeze: float = math.inf,
    ) -> None:
        self.session = session
        self.clock = clock
        self._decoder = decoder
        self._batcher = batcher
        self._buffer = buffer
        self._telemetry = telemetry
        self._max_delay = max_delay
        self._pause = pause
        self._freeze = freeze
        self._ran_at = clock.now()
        self._uncertain_since: Micros | None = None
        self._partial_since: Micros | None = None
        self._is_time_broken = False
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._first_at: Micros = 0  # arrival of the batch's first message, while the timer runs
        self._ended = False
        self._put_since_heartbeat = False
        self.authenticated: asyncio.Future[Micros] = self._loop.create_future()
        self.failed: asyncio.Future[None] = self._loop.create_future()

    @property
    def last_message_at(self) -> Micros | None:
        """The arrival of the last tick or rejection."""
        return self._batcher.last_message_at

    @property
    def last_tick_at(self) -> Micros | None:
        """The arrival of the last tick."""
        return self._batcher.last_tick_at

    def frame(self, payload: bytes, binary: bool = False) -> None:
        """Record one message."""
        self.frames((payload,), binary)

    def frames(self, payloads: Sequence[bytes], binary: bool = False) -> None:
        """Record messages that were read at once; ignore them after the session's end."""
        if self._ended:
            return
        self._partial_since = None
        decode, batcher = self._decoder.decode, self._batcher
        for at, payload in enumerate(payloads, self.clock.stamp(len(payloads))):
            message = decode(payload, at, binary=binary)
            if isinstance(message, Tick):
                batcher.add(message, at)
            elif isinstance(message, Refused):
                batcher.reject(payload, message.reason, at)
                self._telemetry.rejected(self.session, message.reason, len(payload), at)
            else:
                self._control(message, at)
                continue
            if self._timer is None:
                self._first_at = at
                self._timer = self._loop.call_later(self._max_delay, self.flush)
            if batcher.is_full:
                self.flush()

    def _control(self, message: Authenticated | ServerError, at: Micros) -> None:
        if isinstance(message, ServerError):
            self._fail(server_error(message))
        elif not self.authenticated.done():
            self._batcher.authenticated(at)
            self.authenticated.set_result(at)
            self.flush()

    def _added(self, at: Micros) -> None:
        """Start the batch's timer, or close the batch if it is full."""
        if self._timer is None:
            self._first_at = at
            self._timer = self._loop.call_later(self._max_delay, self.flush)
        if self._batcher.is_full:
            self.flush()

    def partial(self) -> None:
        """Record that the beginning of a message has arrived; the next `frames` begins with this message."""
        if self._partial_since is None:
            self.check_time()  # if it arrived during a pause, its beginning is unknown
            self._partial_since = self.clock.now()

    def check_time(self) -> None:
        """Detect a pause of this process and a step of its clock; call it about every second."""
        now = self.clock.now()
        paused, self._ran_at = (now - self._ran_at) / SECOND, now
        if paused > self._freeze:
            self._is_time_broken = True
            self._fail(StreamError(f"This process did not run for {paused:.0f} s.", reason=EndReason.FROZEN))
        elif paused > self._pause:
            self._uncertain_since = now
        if self.clock.has_stepped():
            self._is_time_broken = True
            self._fail(StreamError("This machine's clock was set.", reason=EndReason.CLOCK_STEP))

    def pong(self, sent_at: Micros) -> None:
        """Extend coverage to the time when an answered ping was sent."""
        self.check_time()  # a ping may be the first action after a pause
        if self._is_time_broken:
            return
        if self._partial_since is not None and sent_at > self._partial_since:
            if self._uncertain_since is None:
                self._batcher.cover(self._partial_since)
            return
        self._batcher.cover(sent_at)
        if self._uncertain_since is not None and sent_at >= self._uncertain_since:
            self._uncertain_since = None

    def heartbeat(self) -> None:
        """Put a batch that proves a quiet session alive, unless one was put since the last heartbeat."""
        if not self._put_since_heartbeat and self.authenticated.done():
            self.flush()
        self._put_since_heartbeat = False

    def flush(self) -> None:
        """Close the batch and put it into the buffer; fail the session if the buffer is blocked."""
        self._put()
        reason = self._buffer.blocked_by
        if reason is not None and not self.failed.done():
            self._telemetry.stream_blocked(self.session, reason, self._buffer.size)
            self._fail(StreamError(BLOCK_MESSAGES[reason], reason=reason))

    def end(self, reason: EndReason, close_code: int | None = None, message: str = "") -> None:
        """Put the last batch with the end of the session; later messages are ignored."""
        if self._ended:
            return
        end = SessionEnd(self.clock.now(), reason, close_code)
        self._put(end)
        self._ended = True
        self.authenticated.cancel()
        if not self.failed.cancel():
            self.failed.exception()  # retrieve it, so that asyncio does not warn
        self._telemetry.session_ended(self.session, end, message)

    def _put(self, end: SessionEnd | None = None) -> None:
        age = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            # The stamps of one read run ahead of the clock if a row takes less than a microsecond.
            age = max(0.0, (self.clock.now() - self._first_at) / SECOND)
        self.check_time()
        proved = self.arrivals_prove and not self._is_time_broken and self._uncertain_since is None
        batch = self._batcher.close(end, proved=proved)
        self._telemetry.batch_closed(batch, age)
        self._buffer.put(batch)
        self._put_since_heartbeat = True

    def _fail(self, error: StreamError) -> None:
        """End the session; only the first error counts."""
        if not self.failed.done():
            self.failed.set_exception(error)


def new_recorder(
    settings: Settings,
    *,
    endpoint: str,
    kind: Literal["stream", "replay"],
    clock: Clock,
    decoder: Decoder,
    buffer: Buffer,
    telemetry: Telemetry,
) -> Recorder:
    """Begin a session and return its recorder."""
    session_clock = SessionClock(clock)
    now = session_clock.now()
    session = Session(new_session_id(now), settings.instance, endpoint, now, kind)
    watched = kind == "stream"
    return Recorder(
        session,
        clock=session_clock,
        decoder=decoder,
        batcher=Batcher(session, max_rows=settings.batch_max_rows, occurrence_keys=settings.occurrence_keys),
        buffer=buffer,
        telemetry=telemetry,
        max_delay=settings.batch_max_delay,
        pause=2 * watch_interval(settings) if watched else math.inf,
        freeze=settings.ping_interval + settings.ping_timeout if watched else math.inf,
    )


def watch_interval(settings: Settings) -> float:
    """Return the seconds between two checks of the clocks and for a stall."""
    return min(WATCH_INTERVAL, settings.stall_timeout / 4)


def new_session_id(now: Micros) -> uuid.UUID:
    """Return a UUIDv7 (RFC 9562, section 5.7); such ids sort by time."""
    milliseconds = (now // 1000) & ((1 << 48) - 1)
    high, low = secrets.randbits(12), secrets.randbits(62)
    return uuid.UUID(int=milliseconds << 80 | 7 << 76 | high << 64 | 0b10 << 62 | low)
