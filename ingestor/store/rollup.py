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
from ingestor.store.queries import QUERIES
from ingestor.store.version import check_schema

LAG = timedelta(minutes=1)
"""A minute is stored this long after its end: most ticks have arrived by then, and fewer bars become stale."""

MIN_SPAN, MAX_SPAN = timedelta(minutes=1), timedelta(days=1)
"""The least and the most time of which the bars are stored in one transaction."""

MAX_REPAIRS = 5_000
"""Stale minutes that are repaired in one transaction."""


@dataclass(frozen=True, slots=True)
class RollupStep:
    """One committed transaction: bars are stored until `until`, or `repaired` stale minutes are valid again."""

    until: datetime | None = None
    bars: int = 0
    repaired: int = 0


class Rollup:
    """Stores bars in a database that has no continuous aggregates. Use it as an asynchronous context manager.

    A transaction that exceeds `timeout` seconds is cancelled, and the next one covers half of the time. If another
    process stores bars at that moment, it `waits` or leaves the work to that process. Raises StoreError.
    """

    def __init__(self, url: str, *, timeout: float, waits: bool = False) -> None:
        self._url = url
        self._timeout = timeout
        self._waits = waits
        self._span = MAX_SPAN
        self._repairs = MAX_REPAIRS
        self._guarded: GuardedConnection | None = None

    async def __aenter__(self) -> Self:
        """Connect and check the schema."""
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
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the connection."""
        assert self._guarded is not None
        await self._guarded.close()

    async def give_up(self) -> None:
        """End the statement that is running, also if the server does not answer: its user gets a StoreError."""
        if self._guarded is not None:
            await self._guarded.give_up()

    async def steps(self) -> AsyncIterator[RollupStep]:
        """Yield each step until no closed minute is missing and none is stale, or another process does the work."""
        if not await self._fetch("SELECT to_regprocedure('ingest.roll_up(timestamptz,boolean)') IS NOT NULL"):
            return
        while (step := await self._roll_up() or await self._repair()) is not None:
            yield step

    async def _roll_up(self) -> RollupStep | None:
        target: datetime | None = await self._fetch(QUERIES["next_rollup"], self._span, LAG)
        if target is None:
            return None
        await self._fetch(QUERIES["announce_rollup"], target)
        await self._fetch(QUERIES["lock_ticks"])
        try:
            bars: int | None = await self._fetch(QUERIES["roll_up"], target, self._waits)
        except StoreError as error:
            if not _is_too_slow(error) or self._span <= MIN_SPAN:
                raise
            self._span = max(self._span / 2, MIN_SPAN)
            return RollupStep()
        self._span = min(self._span * 2, MAX_SPAN)
        return None if bars is None else RollupStep(until=target, bars=bars)

    async def _repair(self) -> RollupStep | None:
        try:
            repaired: int | None = await self._fetch(QUERIES["repair_bars"], self._repairs, self._waits)
        except StoreError as error:
            if not _is_too_slow(error) or self._repairs == 1:
                raise
            self._repairs = max(self._repairs // 2, 1)
            return RollupStep()
        self._repairs = min(self._repairs * 2, MAX_REPAIRS)
        return RollupStep(repaired=repaired) if repaired else None

    async def _fetch(self, sql: str, *arguments: object) -> Any:
        """Run one statement in a transaction of its own with a time limit, and return its value."""
        assert self._guarded is not None
        async with self._guarded as connection, connection.transaction(isolation="read_committed"):
            await connection.execute(QUERIES["limit_rollup"].replace("$1", str(round(self._timeout * 1000))))
            return await connection.fetchval(sql, *arguments)


def _is_too_slow(error: StoreError) -> bool:
    return error.sqlstate in {"57014", "53100", "53200", "54000"}
