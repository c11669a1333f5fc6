"""Stores a batch without the few rows that the database refuses; these become rejections."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from itertools import count

import asyncpg

from ingestor.batch import unpack
from ingestor.clock import to_datetime
from ingestor.errors import StoreError
from ingestor.model import Batch, Rejection, Tick
from ingestor.store.refusal import translated
from ingestor.store.retry import RetryAction, classify

MAX_REFUSED_ROWS = 10
MAX_REFUSED_SHARE = 0.01
"""More rows of a batch than the greater of these are not refused one by one: then it is no fault of single rows."""


class RejectionBudget:
    """How many rows may be refused: of a batch by the rule above, and in the long run by its share alone.

    Without the second bound, small batches could lose all their rows, one batch after the other.
    """

    def __init__(self) -> None:
        self._left = float(MAX_REFUSED_ROWS)

    def of(self, rows: int) -> int:
        """Return how many of a batch of so many rows may be refused."""
        return int(min(max(MAX_REFUSED_ROWS, rows * MAX_REFUSED_SHARE), self._left + rows * MAX_REFUSED_SHARE))

    def note(self, rows: int, refused: int = 0) -> None:
        """Take note of rows that were committed, and of how many among them were refused."""
        self._left = min(MAX_REFUSED_ROWS, self._left + rows * MAX_REFUSED_SHARE - refused)


async def insert_without_bad_rows(
    batch: Batch,
    insert: Callable[[Sequence[bytes]], Awaitable[int]],
    savepoint: Callable[[], AbstractAsyncContextManager[object]],
    *,
    most: int,
    after: int = 0,
) -> tuple[int, list[Rejection]]:
    """Insert a batch's rows by halves, each within a savepoint. Returns how many are new, and what was refused.

    Raises what `insert` raises where no row is at fault, and StoreError where more than `most` are. The batch may be
    the part of one that begins after its first `after` messages.
    """
    rows = list(unpack(batch.rows))
    positions = list(_positions(batch, after))
    refused: list[Rejection] = []

    async def attempt(first: int, last: int) -> int:
        try:
            async with savepoint():
                return await insert([row for row, _, _ in rows[first:last]])
        except asyncpg.PostgresError as exc:
            error = translated(exc)
            if classify(error) is not RetryAction.QUARANTINE:
                raise
            if last - first == 1:
                _, tick, received_at = rows[first]
                raw = as_message(tick)
                refused.append(Rejection(positions[first], received_at, f"database:{error.sqlstate}", raw, len(raw)))
                if len(refused) > most:
                    raise StoreError(
                        f"The database refuses more than {most} of a batch's {len(rows)} ticks, or lately more than "
                        f"{MAX_REFUSED_SHARE:.0%} of all. {error.message}",
                        sqlstate=error.sqlstate,
                        constraint=error.constraint,
                        hint="Nothing is given up; look at the constraints and triggers of market.ticks.",
                    ) from exc
                return 0
        middle = (first + last) // 2
        return await attempt(first, middle) + await attempt(middle, last)

    return await attempt(0, len(rows)), refused


def _positions(batch: Batch, after: int) -> Iterator[int]:
    """Yield the places of a batch's ticks among its messages: those that no rejection has."""
    taken = {rejection.position for rejection in batch.rejections}
    places = (place for place in count(after + 1) if place not in taken)
    for _ in range(batch.count):
        yield next(places)


def as_message(tick: Tick) -> bytes:
    """Return a tick as the message that the feed documents, with its date in UTC."""
    date = to_datetime(tick.time).isoformat()
    data = {"date": date, "price": tick.price, "volume": tick.volume, "symbol": tick.symbol}
    return json.dumps({"type": "price", "data": data}, ensure_ascii=False).encode()
