"""Stores bars of closed minutes and repairs stale ones, in short transactions on a connection of its own.

The order keeps the bars exact. A step first announces how far it will go. Then it waits once for the writer: every
later transaction notes the minutes of its late ticks as stale, and every earlier one is visible. Only then it computes.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from types import TracebackType
from typing import Any, Self

from ingestor.errors import StoreError
from ingestor.store.connect import connect
from ingestor.store.connection import GuardedConnection
from ingestor.store.portion import AdaptiveLimit
from ingestor.store.queries import QUERIES
from ingestor.store.retry import may_be_too_large
from ingestor.store.version import check_schema

LAG = timedelta(minutes=1)
"""A minute is stored this long after its end: most ticks have arrived by then, and fewer bars become stale."""

MIN_SPAN, MAX_SPAN = 60, 86_400
"""The least and the most time, in seconds, of which the bars are stored in one transaction."""

MAX_REPAIRS = 5_000
"""Stale minutes that are repaired in one transaction."""


@dataclass(frozen=True, slots=True)
class RollupStep:
    """One committed transaction: bars are stored until `until`, or `repaired` stale minutes are valid again."""

    until: datetime | None = None
    bars: int = 0
    repaired: int = 0


class RollupSize:
    """How much the next transactions of a rollup cover: `span` in seconds, and `repairs` in stale minutes.

    The next rollup can receive it, because a limit of the server outlasts a connection.
    """

    def __init__(self) -> None:
        self.span = AdaptiveLimit(MIN_SPAN, MAX_SPAN)
        self.repairs = AdaptiveLimit(1, MAX_REPAIRS)


class Rollup:
    """Stores bars in a database that has no continuous aggregates. Use it as an asynchronous context manager.

    A transaction that exceeds `timeout` seconds is cancelled, and the next one covers half of the time, as after any
    other failure that size may explain; if that ended the connection, the rollup connects again. If another process
    stores bars at that moment, it `waits` or leaves the work to that process. Raises StoreError.
    """

    def __init__(self, url: str, *, timeout: float, waits: bool = False, size: RollupSize | None = None) -> None:
        self._url = url
        self._timeout = timeout
        self._waits = waits
        self._size = RollupSize() if size is None else size
        self._guarded: GuardedConnection | None = None
        self._is_given_up = False

    async def __aenter__(self) -> Self:
        """Connect and check the schema."""
        await self._connect()
        return self

    async def _connect(self) -> None:
        connection = await connect(
            self._url, timeout=self._timeout, application_name="ingestor rollup", read_write=True
        )
        self._guarded = guarded = GuardedConnection(connection, self._timeout + 5)
        try:
            async with guarded as connection, connection.transaction():
                await check_schema(connection)
        except BaseException:
            connection.terminate()
            raise

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the connection."""
        assert self._guarded is not None
        await self._guarded.close()

    async def give_up(self) -> None:
        """End the statement that is running, also if the server does not answer: its user gets a StoreError."""
        self._is_given_up = True
        if self._guarded is not None:
            await self._guarded.give_up()

    async def steps(self) -> AsyncIterator[RollupStep]:
        """Yield each step until no closed minute is missing and none is stale, or another process does the work."""
        if not await self._fetch("SELECT to_regprocedure('ingest.roll_up(timestamptz,boolean)') IS NOT NULL"):
            return
        while (step := await self._roll_up() or await self._repair()) is not None:
            yield step

    async def _roll_up(self) -> RollupStep | None:
        span = self._size.span
        target: datetime | None = await self._fetch(QUERIES["next_rollup"], timedelta(seconds=span.value), LAG)
        if target is None:
            return None
        await self._fetch(QUERIES["announce_rollup"], target)
        await self._fetch(QUERIES["lock_ticks"])
        try:
            bars: int | None = await self._fetch(QUERIES["roll_up"], target, self._waits)
        except StoreError as error:
            await self._shrink(span, error)
            return RollupStep()
        span.succeeded(span.value)
        return None if bars is None else RollupStep(until=target, bars=bars)

    async def _repair(self) -> RollupStep | None:
        repairs = self._size.repairs
        try:
            repaired: int | None = await self._fetch(QUERIES["repair_bars"], repairs.value, self._waits)
        except StoreError as error:
            await self._shrink(repairs, error)
            return RollupStep()
        repairs.succeeded(repairs.value)
        return RollupStep(repaired=repaired) if repaired else None

    async def _shrink(self, limit: AdaptiveLimit, error: StoreError) -> None:
        """Let the next step be smaller, on a new connection if the failure ended this one.

        Raises the error if a smaller step would not help. A full disk counts: sorting a shorter span needs less of it.
        """
        may_help = may_be_too_large(error) or error.sqlstate == "53100"
        if self._is_given_up or not may_help or not limit.failed(limit.value):
            raise error
        assert self._guarded is not None
        if self._guarded.connection.is_closed():
            await self._connect()

    async def _fetch(self, sql: str, *arguments: object) -> Any:
        """Run one statement in a transaction of its own with a time limit, and return its value."""
        assert self._guarded is not None
        async with self._guarded as connection, connection.transaction(isolation="read_committed"):
            await connection.execute(QUERIES["limit_rollup"].replace("$1", str(round(self._timeout * 1000))))
            return await connection.fetchval(sql, *arguments)
