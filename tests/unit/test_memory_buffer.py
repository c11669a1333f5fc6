from __future__ import annotations

import asyncio
from uuid import UUID

import pytest

from ingestor.buffer.memory import MemoryBuffer
from ingestor.model import Batch, EndReason, Session, SessionEnd

SESSION = Session(UUID(int=1), "test", "ws://localhost/ws", 0)
OTHER = Session(UUID(int=2), "test", "ws://localhost/ws", 0)


def batch(number: int, count: int = 1, session: Session = SESSION) -> Batch:
    return Batch(session, number, rows=b"x" * 100 * count, count=count)


async def test_first_in_first_out() -> None:
    """Batches leave in the order in which they came, and only when they are done."""
    buffer = MemoryBuffer(2**20)
    batches = [batch(number) for number in range(1, 6)]
    for each in batches:
        buffer.put(each)
    assert await buffer.take(max_rows=3) == tuple(batches[:3])
    assert await buffer.take(max_rows=2) == tuple(batches[:2])
    assert buffer.depth == 5
    buffer.done()
    assert await buffer.take() == tuple(batches[2:])
    buffer.done()
    assert (buffer.depth, buffer.size) == (0, 0)


async def test_limits_never_hold_back_a_single_batch() -> None:
    """A batch beyond the limits is taken alone."""
    buffer = MemoryBuffer(2**20)
    buffer.put(batch(1, 100))
    buffer.put(batch(2))
    assert [b.number for b in await buffer.take(max_rows=10)] == [1]
    assert [b.number for b in await buffer.take(max_bytes=10)] == [1]


async def test_take_waits() -> None:
    """Taking waits for the first batch."""
    buffer = MemoryBuffer(2**20)
    taking = asyncio.create_task(buffer.take())
    await asyncio.sleep(0)
    assert not taking.done()
    buffer.put(batch(1))
    assert [b.number for b in await taking] == [1]


async def test_high_and_low_mark() -> None:
    """A full buffer keeps what it gets, and has room again at 80 %."""
    buffer = MemoryBuffer(10 * batch(1).size)
    for number in range(1, 11):
        assert buffer.has_room
        buffer.put(batch(number))
    assert not buffer.has_room
    waiting = asyncio.create_task(buffer.wait_for_room())
    buffer.put(batch(11))
    assert buffer.depth == 11
    for expected in (False, False, True):
        await buffer.take(max_rows=1)
        buffer.done()
        await asyncio.sleep(0)
        assert buffer.has_room is expected
    await waiting


async def test_heartbeats_merge() -> None:
    """A heartbeat takes the place of the one before it: days without a database cost no memory."""
    buffer = MemoryBuffer(2**20)
    buffer.put(batch(1, 0))  # the beginning of a session is no heartbeat
    for number in range(2, 1000):
        buffer.put(batch(number, 0))
    assert [b.number for b in await buffer.take()] == [1, 999]
    assert buffer.size == 2 * batch(1, 0).size


@pytest.mark.parametrize(
    "other",
    [batch(3), batch(3, 0, OTHER), Batch(SESSION, 3, end=SessionEnd(0, EndReason.CLOSED))],
    ids=["ticks", "another session", "an end"],
)
async def test_only_neighbouring_heartbeats_of_a_session_merge(other: Batch) -> None:
    """Nothing else takes a heartbeat's place."""
    buffer = MemoryBuffer(2**20)
    buffer.put(batch(2, 0))
    buffer.put(other)
    assert buffer.depth == 2


async def test_a_heartbeat_being_written_is_left_alone() -> None:
    """What was taken may be half written; the newer heartbeat comes after it."""
    buffer = MemoryBuffer(2**20)
    buffer.put(batch(2, 0))
    await buffer.take()
    buffer.put(batch(3, 0))
    buffer.done()
    assert [b.number for b in await buffer.take()] == [3]


async def test_wait_until_empty() -> None:
    """Empty means committed, not taken."""
    buffer = MemoryBuffer(2**20)
    await buffer.wait_until_empty()
    buffer.put(batch(1))
    waiting = asyncio.create_task(buffer.wait_until_empty())
    await buffer.take()
    await asyncio.sleep(0)
    assert not waiting.done()
    buffer.done()
    await waiting
