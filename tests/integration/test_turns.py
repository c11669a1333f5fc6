"""Several writers at one database: one has the turn, and no hole is written unless it is accepted."""

from __future__ import annotations

import asyncio
from uuid import uuid4

import pytest

from ingestor.errors import HoleError, StandbyError
from ingestor.model import Batch, Rejection, Session
from ingestor.store.ticks import Position, TickStore
from tests.clocks import HANG_SECONDS
from tests.servers import query

REJECTIONS = "SELECT count(*) FROM ingest.rejected_messages"


def batch(session: Session, number: int) -> Batch:
    """Return a batch of one message, of which each has a number of its own."""
    rejection = Rejection(1, 10 * number, "not_json", b"x", 1)
    return Batch(session, number, rejections=(rejection,), messages_before=number - 1)


async def test_a_hole_is_not_written_unless_accepted(writer_url: str, database: str) -> None:
    """A batch behind a missing one is refused in its transaction, until the session's hole is accepted."""
    session = Session(uuid4(), "test", "ws://localhost/ws", 5)
    accepted: set[object] = set()
    store = TickStore(writer_url, write_timeout=10.0, accepts_hole=lambda each: each in accepted)
    await store.write([batch(session, 1)])
    with pytest.raises(HoleError) as hole:
        await store.write([batch(session, 3)])
    assert (hole.value.session, hole.value.last_batch) == (session.id, 1)
    assert await query(database, REJECTIONS) == [(1,)]
    assert await store.positions([session.id]) == {session.id: Position(1, 1, 0, 0, False)}
    accepted.add(session.id)
    written = await store.write([batch(session, 3)])
    assert written.tallies[session.id].missing == 1
    assert await query(database, REJECTIONS) == [(2,)]
    await store.close()


async def test_one_of_several_has_the_turn(writer_url: str) -> None:
    """The second store gets the turn when the first one's connection ends, and cannot write before."""
    first, second = (TickStore(writer_url, write_timeout=10.0, is_one_of_several=True) for _ in range(2))
    session = Session(uuid4(), "test", "ws://localhost/ws", 5)
    assert await first.take_turn()
    assert await first.take_turn()
    assert not await second.take_turn()
    with pytest.raises(StandbyError):
        await second.write([batch(session, 1)])
    await first.write([batch(session, 1)])
    await first.close()
    async with asyncio.timeout(HANG_SECONDS):
        while not await second.take_turn():
            await asyncio.sleep(0.05)
    await second.write([batch(session, 2)])
    await second.close()
