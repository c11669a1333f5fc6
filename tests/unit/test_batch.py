from __future__ import annotations

import struct
from datetime import UTC, date, datetime
from uuid import UUID

import pytest

from ingestor.batch import COPY_HEADER, COPY_TRAILER, MAX_BYTES, Batcher, Numbering
from ingestor.clock import from_datetime
from ingestor.model import RAW_LIMIT, EndReason, Micros, Reason, Session, SessionEnd, Tick

T0: Micros = from_datetime(datetime(2026, 3, 2, tzinfo=UTC))
SESSION = Session(UUID(int=1), "test", "ws://localhost/ws", T0)


def batcher(max_rows: int = 100, occurrence_keys: int = 100) -> Batcher:
    return Batcher(SESSION, max_rows=max_rows, occurrence_keys=occurrence_keys)


def tick(symbol: str = "AIR.NZ", time: Micros = T0, price: float = 1.5, volume: int = 10) -> Tick:
    return Tick(symbol, time, price, volume)


def test_packed_row() -> None:
    """A row follows PostgreSQL's documentation of the binary COPY format, field by field."""
    instance = batcher()
    instance.add(tick("Ω", T0, 0.1, 7), T0 + 3)
    since_2000 = T0 - from_datetime(datetime(2000, 1, 1, tzinfo=UTC))
    expected = struct.pack("!h", 6)
    expected += struct.pack("!iq", 8, since_2000) + struct.pack("!iq", 8, since_2000 + 3)
    expected += struct.pack("!id", 8, 0.1) + struct.pack("!iq", 8, 7)
    expected += struct.pack("!ii", 4, 1) + struct.pack("!i", 2) + "Ω".encode()
    assert instance.close().rows == expected
    assert COPY_HEADER[:11] == b"PGCOPY\n\xff\r\n\0"
    assert len(COPY_HEADER) == 19
    assert COPY_TRAILER == b"\xff\xff"


def test_numbers_and_counts() -> None:
    """Batches are numbered 1, 2, 3; rows and messages are counted; a new batch starts empty."""
    instance = batcher()
    instance.add(tick(), T0)
    instance.add(tick("SPK.NZ"), T0)
    first, second = instance.close(), instance.close()
    assert (first.number, first.count, len(first.rows)) == (1, 2, 2 * 62 + 12)
    assert (second.number, second.count, second.rows) == (2, 0, b"")
    assert second.is_heartbeat
    assert not first.is_heartbeat


def test_full_by_rows() -> None:
    """Rejections fill a batch as ticks do."""
    instance = batcher(max_rows=2)
    instance.add(tick(), T0)
    assert not instance.is_full
    instance.reject(b"x", Reason.NOT_JSON, T0)
    full = instance.is_full
    instance.close()
    assert (full, instance.is_full) == (True, False)


def test_full_by_bytes() -> None:
    """Large rejections close a batch before its number of rows does."""
    instance = batcher(max_rows=100_000)
    for _ in range(MAX_BYTES // RAW_LIMIT):
        assert not instance.is_full
        instance.reject(b"x" * 2**20, Reason.NOT_JSON, T0)
    assert instance.is_full


def test_rejections_keep_their_place() -> None:
    """A rejection knows its position among all messages of the batch, and its full size."""
    instance = batcher()
    instance.add(tick(), T0)
    instance.reject(b"y" * (RAW_LIMIT + 5), Reason.NOT_JSON, T0 + 1)
    instance.add(tick(), T0 + 2)
    instance.reject(b"z", Reason.UNKNOWN_TYPE, T0 + 3)
    first, second = instance.close().rejections
    assert (first.position, first.received_at, first.reason, first.raw_bytes) == (
        2,
        T0 + 1,
        "not_json",
        RAW_LIMIT + 5,
    )
    assert first.raw == b"y" * RAW_LIMIT
    assert (second.position, second.raw) == (4, b"z")


@pytest.mark.parametrize(
    ("times", "months"),
    [
        ([], []),
        (["2026-03-31T23:59:59.999999"], [(2026, 3)]),
        (["2026-03-31T23:59:59.999999", "2026-04-01T00:00:00"], [(2026, 3), (2026, 4)]),
        (["2026-12-31T00:00:00", "1990-01-01T00:00:00", "2026-12-01T00:00:00"], [(1990, 1), (2026, 12)]),
    ],
)
def test_months(times: list[str], months: list[tuple[int, int]]) -> None:
    """A batch names the UTC months of its ticks."""
    instance = batcher()
    for text in times:
        instance.add(tick(time=from_datetime(datetime.fromisoformat(text).replace(tzinfo=UTC))), T0)
    assert instance.close().months == {date(year, month, 1) for year, month in months}
    assert instance.close().months == frozenset()


def test_coverage_needs_authentication() -> None:
    """Messages before authentication are kept, but cover nothing."""
    instance = batcher()
    instance.add(tick(), T0)
    instance.cover(T0 + 5)
    batch = instance.close()
    assert (batch.authenticated_at, batch.covered_until, batch.last_message_at) == (None, None, T0)


def test_coverage_follows_proof() -> None:
    """Coverage begins with authentication, follows messages and pongs, and never decreases."""
    instance = batcher()
    instance.authenticated(T0)
    assert instance.close().covered_until == T0
    instance.add(tick(), T0 + 10)
    assert instance.close().covered_until == T0 + 10
    instance.cover(T0 + 30)
    assert instance.close().covered_until == T0 + 30
    instance.cover(T0 + 20)
    assert instance.close().covered_until == T0 + 30
    instance.reject(b"x", Reason.NOT_JSON, T0 + 25)
    last = instance.close(SessionEnd(T0 + 40, EndReason.STALL))
    assert (last.covered_until, last.last_message_at, last.authenticated_at) == (T0 + 30, T0 + 25, T0)
    assert last.end == SessionEnd(T0 + 40, EndReason.STALL)
    assert not last.is_heartbeat


def test_occurrence_counts_equal_ticks() -> None:
    """Only ticks equal in symbol, time, price and volume are counted together."""
    numbering = Numbering(100)
    variants = [tick(), tick(symbol="B"), tick(time=T0 + 1), tick(price=1.6), tick(volume=11)]
    for expected in (1, 2, 3):
        assert [numbering.next(t, t.symbol.encode()) for t in variants] == [expected] * 5


def test_occurrence_forgets_the_least_recently_seen() -> None:
    """The counter keeps the most recently received keys."""
    numbering = Numbering(2)

    def seen(symbol: str) -> int:
        return numbering.next(tick(symbol), symbol.encode())

    assert [seen("A"), seen("B"), seen("A")] == [1, 1, 2]
    assert seen("C") == 1  # forgets B, not A
    assert seen("A") == 3
    assert seen("B") == 1  # forgets C
    assert seen("A") == 4
    assert len(numbering._counts) == 2
