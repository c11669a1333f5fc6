"""Reads the record for relays: stored ticks in the order of their arrival, and the log of commits.

A step reads both in one snapshot, so each tick is either in the table that the step reads, or in a later entry of the
log. Each step is a short transaction: a replay of a year keeps no snapshot open.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple
from uuid import UUID

import asyncpg

from ingestor.batch import COPY_HEADER, COPY_TRAILER, Row, unpack_rows
from ingestor.clock import from_datetime, to_datetime
from ingestor.errors import CursorError
from ingestor.model import Micros
from ingestor.protocol.messages import CURSOR_TOO_OLD
from ingestor.store.connection import GuardedConnection
from ingestor.store.queries import QUERIES
from ingestor.store.relay_tokens import TokenGrant, find, valid_hashes

MAX_ENTRIES = 256
MAX_ENTRY_BYTES = 4 * 2**20
"""Limits of what is read of the log at once; one entry may be as large again."""

LOG_KEPT = timedelta(hours=1)
"""The log holds the commits of this time."""

END_OF_TIME = datetime(9999, 12, 31, tzinfo=UTC)

_LOST = f"{CURSOR_TOO_OLD}, or the client too slow: the log of commits no longer has what follows; use from"

_BEHIND = (
    'AND (received_at > $1::timestamptz OR (symbol COLLATE "C", time, price, volume, occurrence) '
    "> ({symbol}::text, {time}::timestamptz, {price}::float8, {volume}::bigint, {occurrence}::int))"
)
_OF_SYMBOLS = "AND symbol = ANY ({symbols}::text[])"


class LogPosition(NamedTuple):
    """A place in the log: before entry `entry`, or behind its first `skip` ticks."""

    entry: int
    skip: int = 0


@dataclass(frozen=True, slots=True)
class Place:
    """A place in the table: behind all ticks that arrived before `received_at`, and behind those of that instant.

    With `last`, only behind the ticks of that instant up to this one.
    """

    received_at: Micros
    last: Row | None = None

    def covers(self, row: Row) -> bool:
        """Return whether a tick is before this place."""
        if row[1] != self.received_at or self.last is None:
            return row[1] <= self.received_at
        return _order(row) <= _order(self.last)


@dataclass(frozen=True, slots=True)
class Progress:
    """A client's progress: the ticks of the log up to `position`, as far as they are before `place` (None: all)."""

    position: LogPosition
    place: Place | None


@dataclass(frozen=True, slots=True)
class Window:
    """The part of the record that a step may read: arrivals before `until` (None: all), at most `rows` ticks.

    Of the log it reads no more after `log_bytes`.
    """

    until: Micros | None
    rows: int
    log_bytes: int = MAX_ENTRY_BYTES


@dataclass(frozen=True, slots=True)
class Entry:
    """A commit, as the log has it. `skip` of its ticks come before the place from which it was read.

    `age` is the time in seconds from its place in the log to its being read, by the database's clock.
    """

    id: int
    rows: bytes
    skip: int
    age: float


@dataclass(frozen=True, slots=True)
class Step:
    """The part of the record behind a `Progress` that one snapshot shows.

    `progress` is the client's after it; if `is_complete`, the log was read to its end, and with it the table's `rows`.
    Ticks before `ticks_since` were dropped by their age.
    """

    entries: tuple[Entry, ...]
    rows: tuple[Row, ...]
    progress: Progress
    is_complete: bool
    ticks_since: datetime | None = None


@dataclass(frozen=True, slots=True)
class CoverageStatement:
    """The spans in which the record is complete, for a client that has the log up to `end`.

    The sessions' coverage and the end of the log are of one snapshot, and coverage is committed with or after its
    ticks. `began` is when it was asked for, in monotonic seconds.
    """

    spans: tuple[tuple[Micros, Micros], ...]
    end: LogPosition
    began: float


class LogState(NamedTuple):
    """The log's identity, the last id that may be gone, and the position behind its newest entry.

    Ticks of the table before `ticks_since` were dropped by their age; None if none were.
    """

    identity: UUID
    complete_after: int
    end: LogPosition
    ticks_since: datetime | None

    @property
    def mark(self) -> str:
        """The part of the identity that is in cursors."""
        return mark_of(self.identity)


class Record:
    """Reads by one connection. Raises StoreError, and CursorError if the log no longer reaches back far enough."""

    def __init__(self, guarded: GuardedConnection) -> None:
        self._guarded = guarded

    async def state(self) -> LogState:
        """Return the state of the log."""
        async with self._snapshot() as connection:
            return await log_state(connection)

    async def step(
        self, progress: Progress, window: Window, symbols: tuple[str, ...] = (), mark: str | None = None
    ) -> Step:
        """Return the next step of a client. `mark` is that of the log to which the progress belongs."""
        async with self._snapshot() as connection:
            state = await log_state(connection)
            if progress.position > state.end:
                raise CursorError(_LOST)
            entries = await entries_after(connection, progress.position, mark, window.log_bytes)
            position = LogPosition(entries[-1].id + 1) if entries else progress.position
            if position < state.end and entries:
                return Step(entries, (), replace(progress, position=position), is_complete=False)
            end = max(position, state.end)
            if progress.place is None:
                return Step(entries, (), Progress(end, None), is_complete=True)
            rows = await _ticks(connection, progress.place, window, symbols)
            after = Progress(end, _place(progress.place, rows, window))
            return Step(entries, rows, after, is_complete=True, ticks_since=state.ticks_since)

    async def coverage(self, since: Micros, began: float) -> CoverageStatement:
        """Return when the record is complete, from an instant on. `began` is when the caller asked."""
        async with self._snapshot() as connection:
            end = (await log_state(connection)).end
            rows = await connection.fetch(QUERIES["stated_coverage"], to_datetime(since))
        return CoverageStatement(tuple((from_datetime(row[0]), from_datetime(row[1])) for row in rows), end, began)

    async def gaps(self, since: Micros, until: Micros | None) -> list[dict[str, Any]]:
        """Return the gaps that overlap a span, the oldest first."""
        async with self._snapshot() as connection:
            end = END_OF_TIME if until is None else to_datetime(until)
            return [dict(row) for row in await connection.fetch(QUERIES["recorded_gaps"], to_datetime(since), end)]

    async def token_grant(self, token: str) -> TokenGrant | None:
        """Return the client of a token; None if it is not valid."""
        async with self._snapshot() as connection:
            return await find(connection, token)

    async def valid_hashes(self) -> set[bytes]:
        """Return the hashes of the valid tokens."""
        async with self._snapshot() as connection:
            return await valid_hashes(connection)

    @asynccontextmanager
    async def _snapshot(self) -> AsyncIterator[asyncpg.Connection]:
        async with (
            self._guarded as connection,
            connection.transaction(isolation="repeatable_read", readonly=True),
        ):
            yield connection


async def log_state(connection: asyncpg.Connection) -> LogState:
    """Return the state of the log in the connection's snapshot."""
    row = await connection.fetchrow(QUERIES["log_state"])
    assert row is not None  # the migration has written it
    identity, complete_after, following, ticks_since = row
    return LogState(identity, complete_after, LogPosition(following), ticks_since)


async def entries_after(
    connection: asyncpg.Connection, position: LogPosition, mark: str | None, most_bytes: int = MAX_ENTRY_BYTES
) -> tuple[Entry, ...]:
    """Return the next entries of the log, within `MAX_ENTRIES`, and no more after `most_bytes`.

    Raises CursorError if the log has lost an entry behind the position, or is not the one with that mark.
    """
    found = await connection.fetch(QUERIES["log_entries"], position.entry, MAX_ENTRIES, most_bytes)
    identity, complete_after = found[0][:2]
    if position.entry <= complete_after or mark not in {None, mark_of(identity)}:
        raise CursorError(_LOST)
    return tuple(
        Entry(id_, rows, position.skip if id_ == position.entry else 0, age) for *_, id_, rows, age in found if id_
    )


def mark_of(identity: UUID) -> str:
    """Return the part of a log's identity that is in cursors."""
    return identity.hex[:8]


async def _ticks(
    connection: asyncpg.Connection, place: Place, window: Window, symbols: tuple[str, ...]
) -> tuple[Row, ...]:
    """Return the ticks of a window behind a place, as COPY sends them, in their order."""
    since = place.received_at if place.last is not None else place.received_at + 1
    until = END_OF_TIME if window.until is None else to_datetime(window.until)
    arguments: list[Any] = [to_datetime(since), until, window.rows]

    def add(value: Any) -> str:
        arguments.append(value)
        return f"${len(arguments)}"

    more = ""
    if place.last is not None:
        time, _, price, volume, occurrence, symbol = place.last
        fields = {"symbol": symbol.decode(), "time": to_datetime(time)}
        fields |= {"price": price, "volume": volume, "occurrence": occurrence}
        more += _BEHIND.format(**{name: add(value) for name, value in fields.items()})
    if symbols:
        more += _OF_SYMBOLS.format(symbols=add(list(symbols)))
    body = bytearray()

    async def take(data: bytes) -> None:
        body.extend(data)

    query = QUERIES["recorded_ticks"].replace("{more}", more)
    await connection.copy_from_query(query, *arguments, output=take, format="binary")
    return tuple(unpack_rows(bytes(body[len(COPY_HEADER) : -len(COPY_TRAILER)])))


def _place(before: Place, rows: tuple[Row, ...], window: Window) -> Place | None:
    """Return the place behind what was read: None at the table's end."""
    if len(rows) == window.rows:
        return Place(rows[-1][1], rows[-1])
    if window.until is None:
        return None
    return Place(max(window.until - 1, before.received_at))


def _order(row: Row) -> tuple[bytes, Micros, float, int, int]:
    """Return the key by which ticks of one instant are ordered."""
    time, _, price, volume, occurrence, symbol = row
    return symbol, time, price, volume, occurrence
