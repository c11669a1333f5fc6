from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any
from uuid import uuid4

import asyncpg
import pytest

from ingestor.batch import unpack, unpack_rows
from ingestor.errors import CursorError
from ingestor.store.connect import connect
from ingestor.store.connection import GuardedConnection
from ingestor.store.record import LogPosition, Place, Progress, Record, Window
from ingestor.store.registry import CHANNEL, prune, register, renew
from ingestor.store.ticks import TickStore
from tests.integration.test_store import T0, batcher, filled, tick
from tests.servers import query

LOG = "SELECT id, rows, ticks FROM ingest.tick_log ORDER BY id"
ALL = Window(None, 1000)


@pytest.fixture
async def relay(database: str) -> AsyncIterator[asyncpg.Connection]:
    """Yield a connection of a registered relay."""
    connection = await connect(database)
    await register(connection, uuid4(), "relay")
    yield connection
    await connection.close()


@pytest.fixture
async def store(writer_url: str) -> AsyncIterator[TickStore]:
    store = TickStore(writer_url, write_timeout=10)
    yield store
    await store.close()


async def logged(url: str) -> list[list[tuple[str, int]]]:
    """Return the symbol and the occurrence of each tick of each commit."""
    return [[(row[5].decode(), row[4]) for row in unpack_rows(rows)] for _, rows, _ in await query(url, LOG)]


async def test_nothing_is_logged_without_a_relay(store: TickStore, database: str) -> None:
    """Without a registered relay, and an hour after the last sign of one, the log stays empty."""
    await store.write([filled(batcher(), tick())])
    assert await logged(database) == []
    connection = await connect(database)
    await register(connection, uuid4(), "relay")
    await connection.execute("UPDATE ingest.relays SET seen_at = clock_timestamp() - interval '61 minutes'")
    await store.write([filled(batcher(), tick("B"))])
    assert await logged(database) == []
    await connection.close()


async def test_a_commit_is_logged_with_its_rows(store: TickStore, database: str, relay: asyncpg.Connection) -> None:
    """Each transaction logs its rows as they were packed, by session, and wakes the relays once."""
    notices: list[Any] = []
    await relay.add_listener(CHANNEL, lambda *notice: notices.append(notice))
    first, second = batcher(), batcher()
    batches = [filled(first, tick(), tick("Ω.NZ", price=1e300)), filled(first, tick("B")), filled(second, tick("C"))]
    await store.write(batches)
    assert await logged(database) == [[("AIR.NZ", 1), ("Ω.NZ", 1), ("B", 1)], [("C", 1)]]
    assert (await query(database, LOG))[0][1:] == (batches[0].rows + batches[1].rows, 3)
    await relay.execute("SELECT")  # the notices arrive before the answer
    assert len(notices) == 1


async def test_the_staged_way_logs_what_is_new(store: TickStore, database: str, relay: asyncpg.Connection) -> None:
    """Of ticks that are partly stored already, the log gets the new ones, byte for byte as they were packed."""
    await store.write([filled(batcher(), tick(), tick("B"))])
    batch = filled(batcher(), tick(), tick(), tick("Ω.NZ", price=-0.1, volume=2**62), tick("B"))
    written = await store.write([batch])
    assert (written.ticks, written.duplicates) == (4, 2)
    assert (await logged(database))[1:] == [[("AIR.NZ", 2), ("Ω.NZ", 1)]]
    packed = [row for row, _, _ in unpack(batch.rows)]
    assert (await query(database, LOG))[-1][1:] == (packed[1] + packed[2], 2)
    assert (await store.write([filled(batcher(), tick(), tick("B"))])).duplicates == 2
    assert len(await logged(database)) == 2


async def test_the_quarantine_logs_what_is_stored(store: TickStore, database: str, relay: asyncpg.Connection) -> None:
    """Refused rows are not in the log, and those of a part that is rolled back are in it once."""
    await relay.execute("ALTER TABLE market.ticks ADD CONSTRAINT no_zero CHECK (price > 0)")
    ticks = [tick(f"S{number}", price=0.0 if number == 5 else 1.0) for number in range(12)]
    written = await store.write([filled(batcher(), *ticks)])
    assert written.refused == ("database:23514",)
    found = Counter(symbol for commit in await logged(database) for symbol, _ in commit)
    assert found == Counter(f"S{number}" for number in range(12) if number != 5)


async def test_a_relay_that_was_silent_registers_again(database: str, relay: asyncpg.Connection) -> None:
    """A relay that was not seen for 50 minutes must register again, and the log then begins again."""
    before = await Record(GuardedConnection(relay, 10)).state()
    (identity,) = (await query(database, "SELECT id FROM ingest.relays"))[0]
    assert await renew(relay, identity, 3)
    assert await query(database, "SELECT clients FROM ingest.relays") == [(3,)]
    await relay.execute("UPDATE ingest.relays SET seen_at = clock_timestamp() - interval '51 minutes'")
    assert not await renew(relay, identity, 3)
    await relay.execute("UPDATE ingest.relays SET seen_at = clock_timestamp() - interval '61 minutes'")
    await register(relay, identity, "relay")
    assert (await Record(GuardedConnection(relay, 10)).state()).identity != before.identity


async def test_a_second_relay_keeps_the_log(store: TickStore, database: str, relay: asyncpg.Connection) -> None:
    """The log goes on when another relay registers."""
    await store.write([filled(batcher(), tick())])
    state = await Record(GuardedConnection(relay, 10)).state()
    await register(relay, uuid4(), "another")
    assert await Record(GuardedConnection(relay, 10)).state() == state
    assert len(await logged(database)) == 1


async def test_the_log_is_pruned(store: TickStore, database: str, relay: asyncpg.Connection) -> None:
    """Old entries are deleted, and a position from before them is refused; newer positions hold."""
    record = Record(GuardedConnection(relay, 10))
    begin = (await record.state()).end
    await store.write([filled(batcher(), tick())])
    middle = (await record.state()).end
    await relay.execute("UPDATE ingest.tick_log SET logged_at = logged_at - interval '2 hours'")
    await store.write([filled(batcher(), tick("B"))])
    await prune(relay)
    assert await logged(database) == [[("B", 1)]]
    with pytest.raises(CursorError, match="no longer has"):
        await record.step(Progress(begin, None), ALL)
    step = await record.step(Progress(middle, None), ALL)
    assert [entry.id for entry in step.entries] == [middle.entry]
    await prune(relay, timedelta(0))
    assert (await record.state()).end == step.progress.position
    with pytest.raises(CursorError, match="no longer has"):
        await record.step(Progress(LogPosition(1000), None), ALL)


async def test_a_step_reads_log_and_table_in_one_snapshot(store: TickStore, relay: asyncpg.Connection) -> None:
    """Ticks behind the place come from the table, ticks of the log before it are late, and none is in both."""
    record = Record(GuardedConnection(relay, 10))
    await store.write([filled(batcher(), *(tick(f"S{number}") for number in range(5)))])
    state = await record.state()
    start = Progress(state.end, Place(T0 - 1))
    step = await record.step(start, Window(None, 2))
    assert [row[5] for row in step.rows] == [b"S0", b"S1"]
    await store.write([filled(batcher(), tick("LATE"))])
    step = await record.step(step.progress, Window(None, 2), mark=state.mark)
    (entry,) = step.entries
    (late,) = unpack_rows(entry.rows)
    place = Place(T0 + 1)
    assert place.covers(late)
    assert [row[5] for row in step.rows] == [b"S2", b"S3"]
    step = await record.step(step.progress, Window(None, 2))
    assert [row[5] for row in step.rows] == [b"S4"]
    assert step.entries == ()
    assert step.progress == Progress((await record.state()).end, None)


async def test_equal_arrivals_are_divided_by_their_key(store: TickStore, relay: asyncpg.Connection) -> None:
    """A page may end between two ticks that arrived in the same microsecond."""
    for symbol in ("b", "A", "a", "Ω"):
        await store.write([filled(batcher(), tick(symbol))])
    record = Record(GuardedConnection(relay, 10))
    progress, found = Progress((await record.state()).end, Place(T0 - 1)), []
    while progress.place is not None:
        step = await record.step(progress, Window(None, 1), ("b", "a", "Ω"))
        found += [row[5].decode() for row in step.rows]
        progress = step.progress
    assert found == ["a", "b", "Ω"]


async def test_a_step_reads_little_of_the_log(store: TickStore, relay: asyncpg.Connection) -> None:
    """A step ends the log after the bytes that its client may hold; further steps bring the rest, each entry once."""
    record = Record(GuardedConnection(relay, 10))
    progress, found = Progress((await record.state()).end, None), []
    for number in range(5):
        await store.write([filled(batcher(), tick(f"S{number}"))])
    while progress.position < (await record.state()).end:
        step = await record.step(progress, Window(None, 1000, log_bytes=1))
        (entry,) = step.entries
        found += [row[5] for row in unpack_rows(entry.rows)]
        progress = step.progress
    assert found == [b"S0", b"S1", b"S2", b"S3", b"S4"]
