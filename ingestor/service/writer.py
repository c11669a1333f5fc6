"""Takes batches from the buffer and writes them to the database, with retries."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from structlog.contextvars import bind_contextvars, bound_contextvars
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception,
    wait_fixed,
    wait_random_exponential,
)

from ingestor.buffer.fifo import MAX_BYTES, Buffer
from ingestor.clock import Clock
from ingestor.errors import DatabaseAccessError, StoreError
from ingestor.model import SECOND, Batch
from ingestor.store.retry import RetryAction, classify
from ingestor.store.ticks import TickStore, WriteResult
from ingestor.telemetry.events import Telemetry
from ingestor.telemetry.liveness import LivenessDeadline

MAX_WAIT = 5.0
"""The most seconds between two attempts, and the time between two checks for a missing schema."""


class Writer:
    """Empties the buffer. A batch leaves it only after its commit."""

    def __init__(
        self,
        store: TickStore,
        *,
        buffer: Buffer,
        clock: Clock,
        telemetry: Telemetry,
        instance: str,
        liveness: LivenessDeadline | None = None,
    ) -> None:
        self._store = store
        self._buffer = buffer
        self._clock = clock
        self._telemetry = telemetry
        self._instance = instance
        self._liveness = liveness or LivenessDeadline(clock)
        self._own_sessions: set[UUID] = set()  # of this process, written before all inherited batches were
        self._wait_with_backoff = wait_random_exponential(multiplier=0.5, max=MAX_WAIT)
        self._wait_longest = wait_fixed(MAX_WAIT)

    async def end_crashed_sessions(self) -> None:
        """Mark this instance's earlier open sessions as crashed, with retries until the database answers."""
        async for attempt in self._retrying():
            with attempt:
                count = await self._store.end_crashed_sessions(self._instance, self._own_sessions)
                self._telemetry.crashed_sessions_ended(count)

    async def write_inherited(self) -> None:
        """Write the batches that an earlier process left on disk."""
        while self._buffer.has_inherited:
            self._own_sessions |= await self._write_next()

    async def run(self) -> None:
        """Write batches until cancelled."""
        while True:
            await self._write_next()

    async def _write_next(self) -> set[UUID]:
        """Write the oldest batches; return their sessions, or an empty set if an earlier process left them.

        An attempt after one that was too large takes fewer batches; the others stay for the next call.
        """
        batches = await self._take()
        inherited = self._buffer.has_inherited
        write = self._store.write_inherited if inherited else self._store.write
        with bound_contextvars(**_log_context(batches)):
            async for attempt in self._retrying():
                with attempt:
                    if attempt.retry_state.attempt_number > 1:
                        batches = await self._take()
                        bind_contextvars(**_log_context(batches))
                    began = self._clock.monotonic()
                    written = await write(batches)
                    self._count(batches, written, self._clock.monotonic() - began)
        self._liveness.extend()
        await self._buffer.acknowledge()
        return set() if inherited else {batch.session.id for batch in batches}

    async def _take(self) -> tuple[Batch, ...]:
        """Wait for batches, and take as many as one transaction may hold."""
        self._liveness.clear()
        batches = await self._buffer.take(max_bytes=min(MAX_BYTES, self._store.size.max_bytes))
        self._liveness.extend()
        return batches

    def _retrying(self) -> AsyncRetrying:
        return AsyncRetrying(
            retry=retry_if_exception(self._should_retry),
            reraise=True,
            wait=self._wait,
            sleep=self._clock.sleep,
            before=self._start_attempt,
            before_sleep=self._report_failure,
        )

    def _should_retry(self, error: BaseException) -> bool:
        """Return whether to retry. A failed access before the first connection requires operator action instead."""
        if isinstance(error, DatabaseAccessError) and not self._store.has_connected:
            return False
        return isinstance(error, StoreError)

    def _wait(self, state: RetryCallState) -> float:
        if _error(state).is_smaller_next:
            return 0.0  # each attempt is half as large, so this ends soon
        match classify(_error(state)):
            case RetryAction.RETRY_SLOWLY:
                return self._wait_longest(state)
            case RetryAction.MAKE_PARTITION | RetryAction.RETRY_AT_ONCE if state.attempt_number == 1:
                return 0.0
            case _:
                return self._wait_with_backoff(state)

    def _start_attempt(self, _: RetryCallState) -> None:
        self._liveness.extend()

    def _report_failure(self, state: RetryCallState) -> None:
        self._liveness.extend()
        self._buffer.write_failed()
        error = _error(state)
        alert = isinstance(error, DatabaseAccessError)
        self._telemetry.write_failed(str(error), waiting_bytes=self._buffer.size, alert=alert)
        self._report_size()

    def _report_size(self) -> None:
        size = self._store.size
        self._telemetry.transactions_sized(size.max_bytes, is_normal=size.is_normal)

    def _count(self, batches: tuple[Batch, ...], written: WriteResult, seconds: float) -> None:
        newest = batches[-1].last_message_at
        self._telemetry.committed(
            batches,
            written=written.batches,
            ticks=written.ticks,
            tallies=written.tallies,
            seconds=seconds,
            lag=None if newest is None else (self._clock.wall() - newest) / SECOND,
        )
        self._report_size()
        self._telemetry.rows_refused(written.refused)
        for session, tally in written.tallies.items():
            if tally.missing:
                self._telemetry.commits_lost(session, tally.missing)
                self._buffer.invalidate_session(session)


def _log_context(batches: tuple[Batch, ...]) -> dict[str, Any]:
    """Return the newest batch's session and number for log lines."""
    return {"session": str(batches[-1].session.id), "batch": batches[-1].number}


def _error(state: RetryCallState) -> StoreError:
    assert state.outcome is not None
    error = state.outcome.exception()
    assert isinstance(error, StoreError)
    return error
