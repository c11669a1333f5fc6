"""Keeps the stream alive: runs one session after the other until the daemon stops."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any
from urllib.parse import urlsplit

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception

from ingestor.buffer.fifo import BLOCK_MESSAGES, Buffer
from ingestor.clock import Clock
from ingestor.coverage.calendar import Calendar
from ingestor.errors import ConfigurationError, StreamError
from ingestor.model import SECOND, Duration, EndReason, Micros
from ingestor.redaction import outside_text
from ingestor.service.recorder import Recorder, new_recorder, watch_interval
from ingestor.service.upstream import UpstreamRecorder, new_upstream
from ingestor.settings import Settings
from ingestor.stream.accepted_token import AcceptedToken
from ingestor.stream.connection import LONGEST_OPEN, FeedConnection, closed, keep_alive, open_connection, send
from ingestor.stream.decoder import Decoder, authenticate
from ingestor.stream.retry import Backoff, RetryDecision, RetryPolicy, cause_of, check_token, classify
from ingestor.stream.upstream import UpstreamStart
from ingestor.telemetry.events import Telemetry
from ingestor.telemetry.liveness import LivenessDeadline

AUTHENTICATION_TIMEOUT = 10.0

START_TIMEOUTS = 5
"""Write timeouts after which the query for the start of a relay's recording has failed: connect, two queries, close."""


class StreamReader:
    """Runs sessions one after the other, and applies the retry policy to the end of each."""

    def __init__(
        self,
        settings: Settings,
        *,
        buffer: Buffer,
        calendar: Calendar,
        clock: Clock,
        telemetry: Telemetry,
        liveness: LivenessDeadline | None = None,
    ) -> None:
        self._settings = settings
        self._buffer = buffer
        self._calendar = calendar
        self._clock = clock
        self._telemetry = telemetry
        self._liveness = liveness or LivenessDeadline(clock)
        self._decoder = Decoder(settings.exchange_timezone)
        self._accepted_token = AcceptedToken(settings.state_path("accepted"))
        self._backoff = Backoff(self._classify, max_delay=settings.reconnect_max_delay)
        self._upstream = new_upstream(settings, clock=clock, buffer=buffer, telemetry=telemetry)
        self._token = ""
        self._decided: tuple[BaseException, RetryDecision] | None = None

    async def run(self) -> None:
        """Read until cancelled. Raises ConfigurationError if a failure requires operator action."""
        retrying = AsyncRetrying(
            retry=retry_if_exception(self._should_retry),
            wait=self._backoff,
            sleep=self._clock.sleep,
            before_sleep=self._report_retry,
            reraise=True,
        )
        try:
            await retrying(self._session)
        except Exception as error:
            raise ConfigurationError(self._classify(error).message) from error
        finally:
            self._liveness.clear()

    def _classify(self, error: BaseException) -> RetryDecision:
        """Classify an error once: retry, delay and message all follow from the decision."""
        if self._decided is None or self._decided[0] is not error:
            accepted = self._accepted_token.matches(self._settings.stream_url, self._token)
            self._decided = error, classify(error, accepted_before=accepted, now=self._clock.wall())
        return self._decided[1]

    def _should_retry(self, error: BaseException) -> bool:
        # tenacity passes cancellations too.
        return isinstance(error, Exception) and self._classify(error).policy is not RetryPolicy.FATAL

    def _report_retry(self, state: RetryCallState) -> None:
        assert state.outcome is not None
        assert state.next_action is not None
        error = state.outcome.exception()
        assert error is not None
        decision, seconds = self._classify(error), state.next_action.sleep
        self._liveness.expect_within(seconds)
        self._telemetry.reconnecting(
            decision.message, seconds, cause=cause_of(error), alert=decision.policy is RetryPolicy.ALERT
        )

    async def _session(self) -> None:
        """Run one session. It always ends with an error."""
        await self._wait_for_room()
        self._telemetry.connecting()
        start = await self._find_start()
        self._liveness.expect_within(LONGEST_OPEN + AUTHENTICATION_TIMEOUT)
        url = self._settings.stream_url
        self._token = self._settings.read_token()
        check_token(urlsplit(url).hostname or "", self._token)
        recorder: Recorder | None = None
        try:
            async with open_connection(url if start is None else start.url(url)) as connection:
                recorder = self._record(url, start)
                self._telemetry.connected(recorder.session)
                await self._read_session(connection, recorder)
        except BaseException as error:
            # The connection is closed now, so messages of the closing handshake are recorded too.
            if recorder is not None:
                self._end(recorder, *_ending(error))
            raise

    async def _find_start(self) -> UpstreamStart | None:
        """Return where the recording of a relay goes on; None if the stream is no relay's. Raises StoreError."""
        if self._upstream is None:
            return None
        self._liveness.expect_within(START_TIMEOUTS * self._settings.write_timeout)
        return await self._upstream.start()

    def _end(self, recorder: Recorder, reason: EndReason, close_code: int | None, message: str) -> None:
        recorder.end(reason, close_code, message)
        if self._upstream is not None:
            assert isinstance(recorder, UpstreamRecorder)
            self._upstream.ended(recorder, reason)

    async def _wait_for_room(self) -> None:
        """Wait while the buffer is blocked."""
        if self._buffer.blocked_by is not None:
            self._telemetry.waiting_for_room(BLOCK_MESSAGES[self._buffer.blocked_by])
        self._liveness.clear()
        await self._buffer.wait_for_room()

    def _record(self, url: str, start: UpstreamStart | None) -> Recorder:
        if self._upstream is not None and start is not None:
            return self._upstream.recorder(start, self._decoder)
        return new_recorder(
            self._settings,
            endpoint=url,
            kind="stream",
            clock=self._clock,
            decoder=self._decoder,
            buffer=self._buffer,
            telemetry=self._telemetry,
        )

    async def _read_session(self, connection: FeedConnection, recorder: Recorder) -> None:
        """Authenticate, then read until the session ends."""
        connection.attach(recorder.frames, recorder.partial)
        await self._authenticate(connection, recorder)
        began = self._clock.monotonic()
        self._telemetry.authenticated(recorder.session, recorder.authenticated.result())
        self._save_accepted_token()
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
                heartbeat=self._record_heartbeats(recorder),
                watch=self._watch(recorder),
            )
        finally:
            self._backoff.session_ended(self._clock.monotonic() - began)

    async def _authenticate(self, connection: FeedConnection, recorder: Recorder) -> None:
        try:
            async with asyncio.timeout(AUTHENTICATION_TIMEOUT):
                await send(connection, authenticate(self._token))
                await first_to_fail(
                    failed=_wait(recorder.failed),
                    closed=closed(connection),
                    watch=self._watch(recorder),
                    until=asyncio.shield(recorder.authenticated),
                )
        except TimeoutError:
            raise StreamError(
                f"The server did not answer the token within {AUTHENTICATION_TIMEOUT:g} s.",
                reason=EndReason.AUTHENTICATION_TIMEOUT,
            ) from None

    def _save_accepted_token(self) -> None:
        try:
            self._accepted_token.write(self._settings.stream_url, self._token)
        except OSError as error:
            self._telemetry.warned("accepted_token_not_saved", detail=outside_text(error))

    async def _record_heartbeats(self, recorder: Recorder) -> None:
        while True:
            await self._clock.sleep(self._settings.heartbeat)
            recorder.heartbeat()

    async def _watch(self, recorder: Recorder) -> None:
        """End the session after a clock step or a long pause of the process, or if the stream stalls."""
        timeout = round(self._settings.stall_timeout * SECOND)
        while True:
            self._liveness.expect_within(watch_interval(self._settings))
            await self._clock.sleep(watch_interval(self._settings))
            recorder.check_time()
            if isinstance(recorder, UpstreamRecorder):
                recorder.check_silence()
                continue
            if not recorder.authenticated.done() or recorder.failed.done():
                continue
            last = max(recorder.authenticated.result(), recorder.last_tick_at or 0)
            if is_stalled(self._calendar, recorder.clock.now(), last, timeout):
                raise StreamError(
                    f"No tick for {self._settings.stall_timeout:g} s in trading hours.",
                    reason=EndReason.STALL,
                )


def is_stalled(calendar: Calendar, now: Micros, last: Micros, timeout: Duration) -> bool:
    """Return whether no tick came for `timeout` microseconds while the exchange was open.

    `last` is the later of authentication and last tick. The time counts from `last` or the opening, whichever is later,
    until the close: a closed exchange sends no ticks. Only ticks count, because a server without prices may still send
    heartbeats, or prices in an unreadable format.
    """
    session = calendar.session_at(now)
    return session is not None and now - max(session.opens_at, last) >= timeout


def _ending(error: BaseException) -> tuple[EndReason, int | None, str]:
    """Return the reason, close code and message of a session's end."""
    match error:
        case StreamError():
            return error.reason, error.close_code, error.message
        case asyncio.CancelledError():
            return EndReason.STOPPED, None, "The daemon was asked to stop."
        case _:
            return EndReason.INTERNAL_ERROR, None, f"{type(error).__name__}: {outside_text(error)}"


async def first_to_fail(*, until: asyncio.Future[Any] | None = None, **tasks: Coroutine[Any, Any, None]) -> None:
    """Run named tasks until one ends or `until` is done; then cancel the others, and raise its error."""
    running = [asyncio.create_task(task, name=name) for name, task in tasks.items()]
    waiting: list[asyncio.Future[Any]] = [*running, *([until] if until is not None else [])]
    try:
        done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        for task in waiting:  # in the given order: a server's error message takes precedence over its close
            if task in done:
                task.result()
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


async def _wait(future: asyncio.Future[None]) -> None:
    await asyncio.shield(future)
