"""The batch: numbers repeated ticks, and packs each tick into a row of PostgreSQL's binary COPY format.

Pure: no I/O, and every instant is an argument. The packed rows go to the database without further encoding.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from typing import TypeAlias

from ingestor.clock import from_datetime, to_datetime
from ingestor.model import RAW_LIMIT, Batch, Micros, Reason, Rejection, Session, SessionEnd, Tick

# https://www.postgresql.org/docs/current/sql-copy.html, "Binary Format".
COPY_HEADER = b"PGCOPY\n\xff\r\n\0" + struct.pack("!ii", 0, 0)
COPY_TRAILER = struct.pack("!h", -1)

COLUMNS = ("time", "received_at", "price", "volume", "occurrence", "symbol")
"""The columns of a packed row, in the order of `market.ticks`."""

MAX_BYTES = 4 * 2**20
"""A batch is full at this size, whatever its number of rows: rejections can be large."""

POSTGRES_EPOCH: Micros = from_datetime(datetime(2000, 1, 1, tzinfo=UTC))
"""PostgreSQL counts `timestamptz` in microseconds since this instant."""

_NEVER: Micros = 2**63
"""Later than any instant."""

# The number of fields, then each field after its length; the symbol's bytes follow.
_ROW = struct.Struct("!h iq iq id iq ii i")
_KEY = struct.Struct("!qdq")


class Numbering:
    """Counts equal ticks (symbol, time, price, volume) of one session: the `occurrence` of each.

    It keeps the `capacity` most recently seen keys, by arrival and not by time, so that a tick with a wrong time can't
    empty it. A tick equal to a forgotten one gets a low number again, so the unique key takes it for a copy.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._counts: OrderedDict[bytes, int] = OrderedDict()

    def next(self, tick: Tick, symbol: bytes) -> int:
        """Return the number of ticks equal to this one so far, including it."""
        key = _KEY.pack(tick.time, tick.price, tick.volume) + symbol
        counts = self._counts
        count = counts.get(key, 0) + 1
        counts[key] = count
        if count > 1:
            counts.move_to_end(key)
        elif len(counts) > self._capacity:
            counts.popitem(last=False)
        return count


class RecordedNumber:
    """Stands for `Numbering` if ticks come with their numbers: returns the one that was set."""

    number = 1

    def next(self, _tick: Tick, _symbol: bytes) -> int:
        """Return the number of the tick."""
        return self.number


class Batcher:
    """Collects the messages of one session in numbered batches.

    A batch is full at `max_rows` messages or `MAX_BYTES`; the caller, who has the clock, applies the age limit. An
    instant given to `cover` must be proved: every message that arrived before it has been added.
    """

    def __init__(self, session: Session, *, max_rows: int, occurrence_keys: int) -> None:
        self.session = session
        self._max_rows = max_rows
        self._numbering: Numbering | RecordedNumber = Numbering(occurrence_keys)
        self._recorded = RecordedNumber()
        self._number = 0
        self._messages = 0  # in the batches that were closed
        self._authenticated_at: Micros | None = None
        self._covered_until: Micros | None = None
        self._last_tick_at: Micros | None = None
        self._last_rejection_at: Micros | None = None
        self._cursor: str | None = None
        self._start()

    def _start(self) -> None:
        self._rows = bytearray()
        self._count = 0
        self._bytes = 0
        self._rejections: list[Rejection] = []
        self._oldest: Micros = _NEVER
        self._newest: Micros = -_NEVER
        self._months: set[date] = set()
        self._month: tuple[Micros, Micros] = (0, 0)  # start and end of the month entered last

    @property
    def is_full(self) -> bool:
        """Whether the batch must be closed now."""
        return self._count + len(self._rejections) >= self._max_rows or self._bytes >= MAX_BYTES

    @property
    def last_tick_at(self) -> Micros | None:
        """The arrival of the session's last tick."""
        return self._last_tick_at

    @property
    def last_message_at(self) -> Micros | None:
        """The arrival of the session's last tick or rejection."""
        return max(self._last_tick_at or 0, self._last_rejection_at or 0) or None

    def add(self, tick: Tick, received_at: Micros) -> None:
        """Pack a tick with its number. `received_at` must not be earlier than that of the previous tick."""
        symbol = tick.symbol.encode()
        occurrence = self._numbering.next(tick, symbol)
        self._rows += _ROW.pack(
            6,
            8, tick.time - POSTGRES_EPOCH,
            8, received_at - POSTGRES_EPOCH,
            8, tick.price,
            8, tick.volume,
            4, occurrence,
            len(symbol),
        )  # fmt: skip
        self._rows += symbol
        self._bytes += _ROW.size + len(symbol)
        self._count += 1
        if not self._oldest <= tick.time <= self._newest:  # mostly once for each new second
            self._oldest = min(tick.time, self._oldest)
            self._newest = max(tick.time, self._newest)
        if not self._month[0] <= tick.time < self._month[1]:
            self._enter_month(tick.time)
        self._last_tick_at = received_at

    def add_recorded(self, tick: Tick, received_at: Micros, occurrence: int, cursor: str) -> None:
        """Pack a tick of a relay with the arrival and the number that it has in the relay's record, in any order."""
        newest = max(received_at, self._last_tick_at or received_at)
        self._recorded.number = occurrence
        self.add(tick, received_at)
        self._last_tick_at = newest
        self._cursor = cursor

    def resume(self, cursor: str | None, last_tick_at: Micros | None) -> None:
        """Begin a relay's session at a cursor, and with the last tick of the connection's earlier session."""
        self._numbering = self._recorded
        self._cursor = cursor
        self._last_tick_at = last_tick_at

    def _enter_month(self, time: Micros) -> None:
        first = to_datetime(time).date().replace(day=1)
        following = (first + timedelta(days=31)).replace(day=1)
        self._month = (_midnight(first), _midnight(following))
        self._months.add(first)

    def reject(self, frame: bytes, reason: Reason, received_at: Micros) -> None:
        """Add a message that could not be stored as a tick."""
        position = self._count + len(self._rejections) + 1
        raw = bytes(frame[:RAW_LIMIT])
        self._rejections.append(Rejection(position, received_at, reason, raw, len(frame)))
        self._bytes += len(raw)
        self._last_rejection_at = received_at

    def authenticated(self, at: Micros) -> None:
        """Begin the session's coverage."""
        self._authenticated_at = at
        self._covered_until = at

    def cover(self, until: Micros) -> None:
        """Extend coverage to `until`. An earlier instant changes nothing, nor does a call before authentication."""
        if self._covered_until is not None:
            self._covered_until = max(until, self._covered_until)

    def close(self, end: SessionEnd | None = None, *, proved: bool = True) -> Batch:
        """Return the collected messages as the next batch, and start a new one.

        Without messages it is a heartbeat. Once the session is authenticated, coverage extends at least to the arrival
        of the last message, unless the time of that arrival is not `proved`.
        """
        last_message_at = self.last_message_at
        if proved and last_message_at is not None:
            self.cover(last_message_at)
        self._number += 1
        batch = Batch(
            session=self.session,
            number=self._number,
            rows=bytes(self._rows),
            count=self._count,
            span=(self._oldest, self._newest) if self._count else None,
            months=frozenset(self._months),
            rejections=tuple(self._rejections),
            authenticated_at=self._authenticated_at,
            covered_until=self._covered_until,
            last_message_at=last_message_at,
            end=end,
            messages_before=self._messages,
            last_tick_at=self._last_tick_at,
            cursor=self._cursor,
        )
        self._messages += batch.count + len(batch.rejections)
        self._start()
        return batch


def unpack(rows: bytes) -> Iterator[tuple[bytes, Tick, Micros]]:
    """Yield each packed row, its tick and its arrival: for rows that the database refuses."""
    position = 0
    while position < len(rows):
        _, _, time, _, received_at, _, price, _, volume, _, _, length = _ROW.unpack_from(rows, position)
        end = position + _ROW.size + length
        symbol = rows[position + _ROW.size : end].decode()
        yield rows[position:end], Tick(symbol, time + POSTGRES_EPOCH, price, volume), received_at + POSTGRES_EPOCH
        position = end


Row: TypeAlias = tuple[Micros, Micros, float, int, int, bytes]
"""The time, arrival, price, volume, occurrence and symbol of a packed row."""


def unpack_rows(rows: bytes) -> Iterator[Row]:
    """Yield the fields of each packed row, with the symbol in UTF-8."""
    position, size, read = 0, _ROW.size, _ROW.unpack_from
    while position < len(rows):
        _, _, time, _, received_at, _, price, _, volume, _, occurrence, length = read(rows, position)
        begin = position + size
        position = begin + length
        symbol = rows[begin:position]
        yield time + POSTGRES_EPOCH, received_at + POSTGRES_EPOCH, price, volume, occurrence, symbol


def row_ends(rows: bytes) -> Iterator[int]:
    """Yield the end of each packed row, in bytes from the start."""
    end = 0
    while end < len(rows):
        start = end + _ROW.size
        end = start + int.from_bytes(rows[start - 4 : start])  # the symbol's length
        yield end


def _midnight(day: date) -> Micros:
    return from_datetime(datetime(day.year, day.month, day.day, tzinfo=UTC))
