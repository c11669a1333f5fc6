"""Keeps one stream alive: session after session, reconnecting until it is told to stop."""

from __future__ import annotations

import asyncio
import secrets
import uuid
from collections.abc import Coroutine
from typing import Any
from urllib.parse import urlsplit

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception

from ingestor.batch import Batcher
from ingestor.buffer import Buffer
from ingestor.clock import Clock, SessionClock
from ingestor.coverage.calendar import Calendar
from ingestor.errors import ConfigurationError, StreamError
from ingestor.model import SECOND, EndReason, Micros, Session
from ingestor.service.recorder import Recorder
from ingestor.settings import Settings
from ingestor.stream.backoff import Backoff
from ingestor.stream.connection import FeedConnection, closed, keep_alive, open_connection, send
from ingestor.stream.judge import Judgement, Pace, check_token, judge
from ingestor.stream.marker import Marker
from ingestor.stream.protocol import Decoder, authenticate
from ingestor.telemetry import Telemetry, hide

AUTHENTICATION_TIMEOUT = 10.0
WATCH_INTERVAL = 1.0
"""Seconds between two looks at the wall clock and at the silence."""


class Listener:
    """Runs sessions, one after the other, and judges how each of them ended."""

    def __init__(
        self, settings: Settings, *, buffer: Buffer, calendar: Calendar, clock: Clock, telemetry: Telemetry
    ) -> None:
        self._settings = settings
        self._buffer = buffer
        self._calendar = calendar
        self._clock = clock
        self._telemetry = telemetry
        self._decoder = Decoder(settings.exchange_timezone)
        self._marker = Marker(settings.state_path("accepted"))
        self._backoff = Backoff(self._judge, max_delay=settings.reconnect_max_delay)
        self._token = ""

    async def run(self) -> None:
        """Listen for ever. Raises ConfigurationError when a person must act; ends by being cancelled."""
        retrying = AsyncRetrying(
            retry=retry_if_exception(self._is_worth_another_try),
            wait=self._backoff,
            sleep=self._clock.sleep,
            before_sleep=self._say,
            reraise=True,
        )
        try:
            await retrying(self._session)
        except Exception as error:
            raise ConfigurationError(self._judge(error).message) from error

    def _judge(self, error: BaseException) -> Judgement:
        accepted = self._marker.matches(self._settings.stream_url, self._token)
        return judge(error, accepted_before=accepted)

    def _is_worth_another_try(self, error: BaseException) -> bool:
        # tenacity asks about cancellation too.
        return isinstance(error, Exception) and self._judge(error).pace is not Pace.NEVER

    def _say(self, state: RetryCallState) -> None:
        assert state.outcome is not None
        assert state.next_action is not None
        error = state.outcome.exception()
        assert error is not None
        judgement = self._judge(error)
        self._telemetry.reconnecting(judgement.message, state.next_action.sleep, loud=judgement.pace is Pace.LOUD)

    async def _session(self) -> None:
        """Run one session to its end, which is always an error."""
        self._backoff.lived = 0.0
        await self._buffer.wait_for_room()
        url = self._settings.stream_url
        self._token = self._settings.read_token()
        hide(self._token)
        check_token(urlsplit(url).hostname or "", self._token)
        recorder: Recorder | None = None
        try:
            async with open_connection(url) as connection:
                recorder = self._record(url)
                self._telemetry.connected(recorder.session)
                await self._converse(connection, recorder)
        except BaseException as error:
            # The connection is closed by now: what came during the closing handshake is recorded as well.
            if recorder is not None:
                recorder.end(*_ending(error))
            raise

    def _record(self, url: str) -> Recorder:
        session_clock = SessionClock(self._clock)
        connected_at = session_clock.now()
        session = Session(new_session_id(connected_at), self._settings.instance, url, connected_at)
        batcher = Batcher(
            session,
            max_rows=self._settings.batch_max_rows,
            occurrence_keys=self._settings.occurrence_keys,
        )
        return Recorder(
            session,
            clock=session_clock,
            decoder=self._decoder,
            batcher=batcher,
            buffer=self._buffer,
            telemetry=self._telemetry,
            max_delay=self._settings.batch_max_delay,
        )

    async def _converse(self, connection: FeedConnection, recorder: Recorder) -> None:
        """Authenticate, then listen until something ends the session."""
        connection.attach(recorder.frame)
        authenticated_at = await self._authenticated(connection, recorder)
        began = self._clock.monotonic()
        self._telemetry.authenticated(recorder.session)
        self._remember()
        settings = self._settings
        try:
            await first_to_fail(
                failed=_wait(recorder.failed),
                closed=closed(connection),
                keepalive=keep_alive(
                    connection,
                    interval=settings.ping_interval,
                    timeout=settings.ping_timeout,
                    clock=self._clock,
                    now=recorder.clock.now,
                    on_pong=recorder.pong,
                ),
                heartbeat=self._beat(recorder),
                watch=self._watch(recorder, authenticated_at),
            )
        finally:
            self._backoff.lived = self._clock.monotonic() - began

    async def _authenticated(self, connection: FeedConnection, recorder: Recorder) -> Micros:
        try:
            async with asyncio.timeout(AUTHENTICATION_TIMEOUT):
                await send(connection, authenticate(self._token))
                await first_to_fail(
                    failed=_wait(recorder.failed),
                    closed=closed(connection),
                    until=asyncio.shield(recorder.authenticated),
                )
        except TimeoutError:
            raise StreamError(
                f"The server did not answer the token within {AUTHENTICATION_TIMEOUT:g} s.",
                reason=EndReason.AUTHENTICATION_TIMEOUT,
            ) from None
        return recorder.authenticated.result()

    def _remember(self) -> None:
        try:
            self._marker.write(self._settings.stream_url, self._token)
        except OSError as error:
            self._telemetry.warned("marker_not_written", detail=str(error))

    async def _beat(self, recorder: Recorder) -> None:
        while True:
            await self._clock.sleep(self._settings.heartbeat)
            recorder.heartbeat()

    async def _watch(self, recorder: Recorder, authenticated_at: Micros) -> None:
        """End the session when the wall clock was set, or when the stream is mute in trading hours."""
        timeout = round(self._settings.stall_timeout * SECOND)
        while True:
            await self._clock.sleep(min(WATCH_INTERVAL, self._settings.stall_timeout / 4))
            if recorder.clock.has_stepped():
                raise StreamError("This machine's clock was set.", reason=EndReason.CLOCK_STEP)
            last = max(authenticated_at, recorder.last_message_at or 0)
            if is_stalled(self._calendar, recorder.clock.now(), last, timeout):
                raise StreamError(
                    f"No message for {self._settings.stall_timeout:g} s in trading hours.",
                    reason=EndReason.STALL,
                )


def is_stalled(calendar: Calendar, now: Micros, last: Micros, timeout: Micros) -> bool:
    """Whether the stream has been mute for too long while the market was open.

    The time counts from the latest of the opening, the authentication and the last message (`last` is the later of
    these two), and only between a session's opening and its close: a closed market is silent by right.
    """
    session = calendar.session_at(now)
    return session is not None and now - max(session.opens_at, last) >= timeout


def _ending(error: BaseException) -> tuple[EndReason, int | None, str]:
    """Return what the session's record says about its end."""
    match error:
        case StreamError():
            return error.reason, error.close_code, error.message
        case asyncio.CancelledError():
            return EndReason.STOPPED, None, "We were asked to stop."
        case _:
            return EndReason.INTERNAL_ERROR, None, f"{type(error).__name__}: {error}"


async def first_to_fail(*, until: asyncio.Future[Any] | None = None, **tasks: Coroutine[Any, Any, None]) -> None:
    """Run named tasks until one ends, or `until` is done; cancel the others, and raise what it raised."""
    running = [asyncio.create_task(task, name=name) for name, task in tasks.items()]
    waiting: list[asyncio.Future[Any]] = [*running, *([until] if until is not None else [])]
    try:
        done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        for task in waiting:  # in the given order: what the server said counts before that it closed
            if task in done:
                task.result()
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


async def _wait(future: asyncio.Future[None]) -> None:
    await asyncio.shield(future)


def new_session_id(now: Micros) -> uuid.UUID:
    """Return a UUIDv7 (RFC 9562, section 5.7): ids sort by the time at which they were made."""
    milliseconds = (now // 1000) & ((1 << 48) - 1)
    high, low = secrets.randbits(12), secrets.randbits(62)
    return uuid.UUID(int=milliseconds << 80 | 7 << 76 | high << 64 | 0b10 << 62 | low)
