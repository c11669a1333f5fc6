"""A write that exceeds a limit of the server or the link shrinks, and every row is stored once."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from ingestor.batch import Batcher
from ingestor.buffer.fifo import Buffer
from ingestor.errors import StoreError
from ingestor.model import SECOND, Batch, EndReason, Reason, Session, SessionEnd, Tick
from ingestor.service.recorder import new_session_id
from ingestor.service.writer import Writer
from ingestor.store.ticks import TickStore
from ingestor.telemetry.events import Telemetry
from tests.clocks import ManualClock
from tests.proxy import Proxy
from tests.servers import execute_all, query

T0 = 1_790_000_000 * SECOND
SESSION = (
    "SELECT ticks::int, duplicates::int, rejected::int, last_batch::int, last_batch_messages::int, "
    "(extract(epoch FROM covered_until) * 1000000)::bigint, end_reason FROM ingest.stream_sessions"
)
LIMIT = """
CREATE FUNCTION market.limit_rows() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    PERFORM set_config('test.rows', '1' || coalesce(current_setting('test.rows', true), ''), true);
    IF length(current_setting('test.rows')) > {most} THEN RAISE 'too much' USING ERRCODE = '{state}'; END IF;
    RETURN new;
END $$
"""
SLOW = """
CREATE FUNCTION market.limit_rows() RETURNS trigger LANGUAGE plpgsql AS
$$ BEGIN PERFORM pg_sleep(0.02); RETURN new; END $$
"""
BROKEN = """
CREATE FUNCTION market.limit_rows() RETURNS trigger LANGUAGE plpgsql AS
$$ BEGIN IF new.volume = 700 THEN RAISE 'no'; END IF; RETURN new; END $$
"""
TRIGGER = "CREATE TRIGGER limit_rows BEFORE INSERT ON market.ticks FOR EACH ROW EXECUTE FUNCTION market.limit_rows()"


def batcher() -> Batcher:
    instance = Batcher(Session(new_session_id(T0), "test", "ws://x/ws", T0), max_rows=5000, occurrence_keys=10_000)
    instance.authenticated(T0)
    return instance


def filled(instance: Batcher, first: int, count: int, *, rejected: int = 0) -> Batch:
    """Return a batch of different ticks with rejections among them."""
    for number in range(first, first + count):
        instance.add(Tick("AIR.NZ", T0, 1.5, number), T0 + number)
        if rejected and number % (count // rejected) == 0:
            instance.reject(b"nonsense", Reason.NOT_JSON, T0 + number)
    return instance.close()


async def written(url: str, batches: list[Batch], **changes: Any) -> tuple[Telemetry, ManualClock]:
    """Let a writer empty a buffer with these batches."""
    clock, telemetry = ManualClock(), Telemetry()
    buffer = Buffer(memory_max_bytes=2**30, clock=clock, telemetry=telemetry)
    for batch in batches:
        telemetry.batch_closed(batch, None)
        buffer.put(batch)
    store = TickStore(url, **{"write_timeout": 30, **changes})
    writer = Writer(store, buffer=buffer, clock=clock, telemetry=telemetry, instance="test")
    task = asyncio.create_task(writer.run())
    async with asyncio.timeout(60):
        await buffer.wait_until_empty()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await store.close()
    return telemetry, clock


async def is_complete(url: str, batches: list[Batch]) -> None:
    """Check that all ticks and rejections of one session are stored, counted once and covered."""
    ticks = sum(batch.count for batch in batches)
    rejections = [(batch.number, each.position) for batch in batches for each in batch.rejections]
    last = batches[-1]
    assert await query(url, "SELECT volume::int FROM market.ticks ORDER BY volume") == [(n,) for n in range(ticks)]
    assert await query(url, "SELECT batch, position FROM ingest.rejected_messages ORDER BY 1, 2") == rejections
    end = None if last.end is None else str(last.end.reason)
    expected = (ticks, 0, len(rejections), last.number, None, last.covered_until, end)
    assert await query(url, SESSION) == [expected]


@pytest.mark.parametrize("state", ["57014", "53200", "53400", "54000", "25P04", "08P01"])
@pytest.mark.parametrize("most", [1, 150])
async def test_a_limit_of_the_server(writer_url: str, database: str, state: str, most: int) -> None:
    """Without a pause the writer tries fewer batches, then parts of one, down to one row; then more again."""
    await execute_all(database, LIMIT.format(most=most, state=state), TRIGGER)
    instance, size = batcher(), 40 * min(most, 10)
    batches = [filled(instance, start, size, rejected=4) for start in range(0, 3 * size, size)]
    batches.append(instance.close(SessionEnd(T0 + SECOND, EndReason.CLOSED)))
    telemetry, clock = await written(writer_url, batches)
    await is_complete(database, batches)
    assert telemetry.counts.ticks_written == 3 * size
    assert telemetry.counts.write_failures < 40
    assert clock.monotonic() == ManualClock().monotonic()


async def test_a_statement_timeout_of_the_role(writer_url: str, database: str, server: Any) -> None:
    """Under a role's statement timeout the transactions shrink."""
    await execute_all(database, SLOW, TRIGGER)
    name = database.rpartition("/")[2]
    await server.run(f"ALTER ROLE {server.prefix} IN DATABASE {name} SET statement_timeout = '300ms'")
    batches = [filled(batcher(), 0, 40)]
    telemetry, _ = await written(writer_url, batches)
    await is_complete(database, batches)
    assert telemetry.counts.write_failures


@pytest.mark.parametrize("cuts", [False, True])
async def test_a_slow_link(writer_url: str, database: str, cuts: bool) -> None:
    """If bytes are lost, or the connection ends, after a number of bytes, the writer sends less at a time."""
    instance = batcher()
    batches = [filled(instance, start, 400) for start in range(0, 1200, 400)]
    async with Proxy(writer_url) as proxy:
        proxy.most_unanswered, proxy.cuts_unanswered = 12_000, cuts
        telemetry, _ = await written(proxy.url, batches, write_timeout=30 if cuts else 0.5)
    await is_complete(database, batches)
    assert telemetry.counts.write_failures


async def test_sent_bytes_count_as_progress(writer_url: str) -> None:
    """Each piece of a large batch that the link accepts restarts the timeout."""
    steps: list[None] = []
    store = TickStore(writer_url, write_timeout=30, on_progress=lambda: steps.append(None))
    instance = batcher()
    await store.write([filled(instance, 0, 1)])
    steps.clear()
    batch = filled(instance, 1, 5000)
    await store.write([batch])
    await store.close()
    assert len(steps) >= len(batch.rows) / 65536


@pytest.mark.parametrize("staged", [False, True])
async def test_a_crash_between_two_parts(writer_url: str, database: str, staged: bool) -> None:
    """A part of a batch covers nothing; the next process continues after it and counts each tick once."""
    await execute_all(database, BROKEN, TRIGGER)
    batches = [filled(batcher(), 0, 1000, rejected=10)]
    store = TickStore(writer_url, write_timeout=30)
    store.size.max_bytes = 5000
    store._staged_until = 1e9 if staged else 0.0
    with pytest.raises(StoreError, match="no"):
        await store.write(batches)
    await store.close()
    ((ticks, duplicates, rejected, number, messages, covered, _),) = await query(database, SESSION)
    assert 0 < ticks < 700
    assert (duplicates, number, messages, covered) == (0, 1, ticks + rejected, None)
    await execute_all(database, "DROP TRIGGER limit_rows ON market.ticks")
    after = TickStore(writer_url, write_timeout=30)
    assert (await after.write_inherited(batches)).ticks == 1000 - ticks
    await after.close()
    await is_complete(database, batches)


async def test_a_lost_remainder_of_a_batch(writer_url: str, database: str) -> None:
    """If the spool lost the rest of a batch, the next batch is stored completely and covers nothing."""
    await execute_all(database, BROKEN, TRIGGER)
    instance = batcher()
    first, lost, later = (filled(instance, start, count) for start, count in ((0, 10), (10, 800), (810, 20)))
    store = TickStore(writer_url, write_timeout=30)
    store.size.max_bytes = 5000
    with pytest.raises(StoreError):
        await store.write([first, lost])
    ((ticks, *_),) = await query(database, SESSION)
    written = await store.write([later])
    await store.close()
    assert written.tallies[instance.session.id].missing == 810 - ticks
    assert await query(database, SESSION) == [(ticks + 20, 0, 0, 3, None, first.covered_until, None)]


async def test_a_part_with_a_row_that_is_refused(writer_url: str, database: str) -> None:
    """A rejection has its position in the whole batch."""
    await execute_all(database, "ALTER TABLE market.ticks ADD CONSTRAINT local_rule CHECK (volume <> 700)")
    store = TickStore(writer_url, write_timeout=30)
    store.size.max_bytes = 5000
    result = await store.write([filled(batcher(), 0, 1000, rejected=10)])
    await store.close()
    assert (result.ticks, result.rejected, result.duplicates) == (999, 11, 0)
    rows = "SELECT position FROM ingest.rejected_messages WHERE reason LIKE 'database%'"
    assert await query(database, rows) == [(708,)]  # after 700 ticks and 7 rejections
