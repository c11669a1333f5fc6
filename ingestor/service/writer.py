"""Takes batches from the buffer and commits them, however long it takes."""

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
"""Seconds between two tries at most, and between two looks at a schema that is not there."""


class Writer:
    """The one who empties the buffer. A batch leaves it after its commit, never before."""

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
        self._own: set[UUID] = set()  # of this process, and written before what an earlier one left was done with
        self._soon = wait_random_exponential(multiplier=0.5, max=MAX_WAIT)
        self._slowly = wait_fixed(MAX_WAIT)

    async def end_crashed_sessions(self) -> None:
        """Say of this instance's earlier sessions that they crashed, as soon as the database answers."""
        async for attempt in self._retrying():
            with attempt:
                count = await self._store.end_crashed_sessions(self._instance, self._own)
                self._telemetry.crashed_sessions_ended(count)

    async def write_inherited(self) -> None:
        """Write what an earlier process left on disk."""
        while self._buffer.has_inherited:
            self._own |= await self._write_next()

    async def run(self) -> None:
        """Write for ever; ends by being cancelled."""
        while True:
            await self._write_next()

    async def _write_next(self) -> set[UUID]:
        """Write what is oldest, and return whose it is, unless an earlier process left it.

        A try after one that was too large takes fewer batches: the others stay for the next call.
        """
        batches = await self._take()
        inherited = self._buffer.has_inherited
        write = self._store.write_inherited if inherited else self._store.write
        with bound_contextvars(**_names(batches)):
            async for attempt in self._retrying():
                with attempt:
                    if attempt.retry_state.attempt_number > 1:
                        batches = await self._take()
                        bind_contextvars(**_names(batches))
                    began = self._clock.monotonic()
                    written = await write(batches)
                    self._count(batches, written, self._clock.monotonic() - began)
        self._liveness.extend()
        await self._buffer.acknowledge()
        return set() if inherited else {batch.session.id for batch in batches}

    async def _take(self) -> tuple[Batch, ...]:
        """Wait for batches, and take as many as one transaction may hold now."""
        self._liveness.clear()
        batches = await self._buffer.take(max_bytes=min(MAX_BYTES, self._store.size.max_bytes))
        self._liveness.extend()
        return batches

    def _retrying(self) -> AsyncRetrying:
        return AsyncRetrying(
            retry=retry_if_exception(self._is_worth_another_try),
            reraise=True,
            wait=self._wait,
            sleep=self._clock.sleep,
            before=self._begin,
            before_sleep=self._say,
        )

    def _is_worth_another_try(self, error: BaseException) -> bool:
        """Whether a failure may pass by itself: one that only an operator can end must not look like a slow start."""
        if isinstance(error, DatabaseAccessError) and not self._store.has_connected:
            return False
        return isinstance(error, StoreError)

    def _wait(self, state: RetryCallState) -> float:
        if _error(state).is_smaller_next:
            return 0.0  # each try is half as large, so this ends soon
        match classify(_error(state)):
            case RetryAction.RETRY_SLOWLY:
                return self._slowly(state)
            case RetryAction.MAKE_PARTITION | RetryAction.RETRY_AT_ONCE if state.attempt_number == 1:
                return 0.0
            case _:
                return self._soon(state)

    def _begin(self, _: RetryCallState) -> None:
        self._liveness.extend()

    def _say(self, state: RetryCallState) -> None:
        self._liveness.extend()
        self._buffer.write_failed()
        error = _error(state)
        loud = isinstance(error, DatabaseAccessError)
        self._telemetry.write_failed(str(error), waiting_bytes=self._buffer.size, loud=loud)
        self._tell_size()

    def _tell_size(self) -> None:
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
        self._tell_size()
        self._telemetry.rows_refused(written.refused)
        for session, tally in written.tallies.items():
            if tally.missing:
                self._telemetry.commits_lost(session, tally.missing)
                self._buffer.invalidate_session(session)


def _names(batches: tuple[Batch, ...]) -> dict[str, Any]:
    """Return what log lines say of batches: the newest one."""
    return {"session": str(batches[-1].session.id), "batch": batches[-1].number}


def _error(state: RetryCallState) -> StoreError:
    assert state.outcome is not None
    error = state.outcome.exception()
    assert isinstance(error, StoreError)
    return error
