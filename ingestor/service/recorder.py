"""Records one session: frames in; numbered batches, with what they prove, into the buffer."""

from __future__ import annotations

import asyncio

from ingestor.batch import Batcher
from ingestor.buffer import Buffer
from ingestor.clock import SessionClock
from ingestor.errors import StreamError
from ingestor.model import EndReason, Micros, Session, SessionEnd, Tick
from ingestor.stream.judge import server_error
from ingestor.stream.protocol import Authenticated, Decoder, Refused, ServerError
from ingestor.telemetry import Telemetry


class Recorder:
    """Decodes, numbers and batches what one session hears. Never waits, for anything.

    `authenticated` is a future of the moment at which the server accepted the token. `failed` is a future that
    gets the StreamError which ends the session from our side: the server's error message, or a full buffer.
    """

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
    ) -> None:
        self.session = session
        self.clock = clock
        self._decoder = decoder
        self._batcher = batcher
        self._buffer = buffer
        self._telemetry = telemetry
        self._max_delay = max_delay
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._ended = False
        self._put_since_heartbeat = False
        self.last_message_at: Micros | None = None
        self.authenticated: asyncio.Future[Micros] = self._loop.create_future()
        self.failed: asyncio.Future[None] = self._loop.create_future()

    def frame(self, payload: bytes, binary: bool = False) -> None:
        """Take one message of the wire. Messages after the session's end belong to no session, and are left."""
        if self._ended:
            return
        at = self.clock.stamp()
        message = self._decoder.decode(payload, at, binary=binary)
        if isinstance(message, Tick):
            self._batcher.add(message, at)
        elif isinstance(message, Refused):
            self._batcher.reject(payload, message.reason, at)
            self._telemetry.rejected(message.reason, len(payload))
        else:
            self._control(message, at)
            return
        self.last_message_at = at
        if self._batcher.is_full:
            self.flush()
        elif self._timer is None:
            self._timer = self._loop.call_later(self._max_delay, self.flush)

    def _control(self, message: Authenticated | ServerError, at: Micros) -> None:
        if isinstance(message, ServerError):
            self._fail(server_error(message))
        elif not self.authenticated.done():
            self._batcher.authenticated(at)
            self.authenticated.set_result(at)
            self.flush()

    def pong(self, sent_at: Micros) -> None:
        """Vouch for the time up to the sending of a ping that was answered."""
        self._batcher.cover(sent_at)

    def heartbeat(self) -> None:
        """Put a quiet session on record, unless a batch has just done so."""
        if not self._put_since_heartbeat and self.authenticated.done():
            self.flush()
        self._put_since_heartbeat = False

    def flush(self) -> None:
        """Close the batch and put it into the buffer."""
        self._put()
        if not self._buffer.has_room and not self.failed.done():
            self._telemetry.buffer_full(self._buffer.size)
            self._fail(StreamError("The buffer is full.", reason=EndReason.BUFFER_FULL))

    def end(self, reason: EndReason, close_code: int | None = None, message: str = "") -> None:
        """Put what is left, with the end of the session. Nothing is taken after it."""
        if self._ended:
            return
        end = SessionEnd(self.clock.now(), reason, close_code)
        self._put(end)
        self._ended = True
        self.authenticated.cancel()
        if not self.failed.cancel():
            self.failed.exception()  # known by now, or overtaken by another end
        self._telemetry.session_ended(self.session, end, message)

    def _put(self, end: SessionEnd | None = None) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        batch = self._batcher.close(end)
        self._telemetry.batch_closed(batch)
        self._buffer.put(batch)
        self._put_since_heartbeat = True

    def _fail(self, error: StreamError) -> None:
        """End the session; the first reason counts."""
        if not self.failed.done():
            self.failed.set_exception(error)
