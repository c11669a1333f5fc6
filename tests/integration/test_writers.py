"""Several processes write to one database: they wait for each other and never deadlock."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import count

import pytest

from ingestor.buffer.fifo import Buffer
from ingestor.model import DAY, SECOND, Bar, GapSpan, Instrument, Tick
from ingestor.service.writer import Writer
from ingestor.store.gaps import Difference, GapStore, Outcome
from ingestor.store.ticks import TickStore
from ingestor.telemetry.events import Telemetry
from tests.clocks import HANG_SECONDS, ManualClock
from tests.integration.test_store import T0, batcher, filled, session, tick
from tests.servers import TestServer, execute_all, query
from tests.sessions import at

ROUNDS = 5
ROWS = 1500
SECONDS = float(os.environ.get("INGESTOR_TEST_CONTENTION_SECONDS", "0"))
"""Seconds that two writers contend at least; by hand, a minute."""

SUMS = "SELECT sum(ticks)::int, sum(duplicates)::int FROM ingest.stream_sessions"


class FastClock(ManualClock):
    """Let so much time pass that every write begins with COPY, however often COPY has failed."""

    def monotonic(self) -> float:
        self.advance(100)
        return super().monotonic()


@asynccontextmanager
async def two_stores(url: str) -> AsyncIterator[tuple[TickStore, TickStore]]:
    """Yield the writers of two instances."""
    stores = TickStore(url, write_timeout=60, clock=FastClock()), TickStore(url, write_timeout=60, clock=FastClock())
    yield stores
    for store in stores:
        await store.close()


def ticks_of(number: int) -> list[Tick]:
    """Return ticks of several symbols that no other round has, not in the order of the key."""
    return [tick(f"S{index % 7}.NZ", T0 + number * SECOND, 1.0 + index % 11, index) for index in range(ROWS)]


async def isolate(server: TestServer, database: str, level: str) -> None:
    """Set an isolation level, as an administrator may for another program."""
    await server.run(f"ALTER DATABASE {database.rpartition('/')[2]} SET default_transaction_isolation = '{level}'")


@pytest.mark.parametrize("level", ["read committed", "repeatable read", "serializable"])
async def test_opposite_orders(writer_url: str, database: str, server: TestServer, level: str) -> None:
    """Two writers store the same rows in opposite orders without an error, at any isolation level."""
    await isolate(server, database, level)
    began, rounds = time.monotonic(), 0
    async with two_stores(writer_url) as (one, other):
        up, down = batcher(), batcher()
        for number in count():
            if number >= ROUNDS and time.monotonic() - began >= SECONDS:
                break
            rounds += 1
            ticks = ticks_of(number)
            await asyncio.gather(one.write([filled(up, *ticks)]), other.write([filled(down, *reversed(ticks))]))
    assert await query(database, "SELECT count(*) FROM market.ticks") == [(rounds * ROWS,)]
    assert await query(database, SUMS) == [(2 * rounds * ROWS, rounds * ROWS)]


async def test_a_month_that_both_begin(writer_url: str, database: str) -> None:
    """Two writers need the same partitions or chunks in opposite orders, and both succeed."""
    async with two_stores(writer_url) as (one, other):
        up, down = batcher(), batcher()
        for number in range(ROUNDS):
            old, new = ticks_of(number), [tick(time=T0 + (1 + number) * 10 * DAY)]
            later = [tick("X.NZ", T0 + (1 + number) * 10 * DAY)]
            await asyncio.gather(one.write([filled(up, *old, *new)]), other.write([filled(down, *later, *old[::-1])]))
    assert await query(database, SUMS) == [(2 * ROUNDS * (ROWS + 1), ROUNDS * ROWS)]


async def test_sessions_in_opposite_orders(writer_url: str, database: str) -> None:
    """Two copies of one spool, as after a restored machine, count each batch once."""
    batchers = [batcher(session(instance=f"{number}")) for number in range(6)]
    async with two_stores(writer_url) as (one, other):
        for number in range(ROUNDS):
            batches = [
                filled(each, *(tick(f"{index}.NZ", T0 + number * SECOND, volume=volume) for volume in range(50)))
                for index, each in enumerate(batchers)
            ]
            found = await asyncio.gather(one.write(batches), other.write(batches[::-1]))
            assert sum(each.ticks for each in found) == 300
    assert await query(database, SUMS) == [(300 * ROUNDS, 0)]


async def test_crashed_sessions_that_continue(writer_url: str, database: str) -> None:
    """A second process of the same instance ends sessions while the first writes them: neither fails."""
    batchers = [batcher() for _ in range(100)]
    async with two_stores(writer_url) as (one, other):
        await one.write([each.close() for each in batchers])
        for _ in range(ROUNDS):
            batches = [each.close() for each in reversed(batchers)]
            await asyncio.gather(one.write(batches), other.end_crashed_sessions("test"))


@pytest.mark.parametrize("sqlstate", ["40P01", "40001"])
async def test_a_deadlock_victim_is_retried(writer_url: str, database: str, sqlstate: str) -> None:
    """After a deadlock or a serialization failure the write is retried at once, and counts once."""
    await execute_all(
        database,
        "CREATE SEQUENCE public.tries",
        "GRANT USAGE ON SEQUENCE public.tries TO PUBLIC",
        f"""
        CREATE FUNCTION public.fail_once() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
            IF NEW.volume = 70 AND nextval('public.tries') = 1 THEN
                RAISE EXCEPTION 'in the way' USING ERRCODE = '{sqlstate}';
            END IF;
            RETURN NEW;
        END $$
        """,
        "CREATE TRIGGER fail_once BEFORE INSERT ON market.ticks FOR EACH ROW EXECUTE FUNCTION public.fail_once()",
    )
    clock, telemetry = ManualClock(), Telemetry()
    began = clock.monotonic()
    buffer = Buffer(memory_max_bytes=2**20, clock=clock, telemetry=telemetry)
    store = TickStore(writer_url, write_timeout=60, clock=clock)
    buffer.put(filled(batcher(), *(tick(volume=volume) for volume in range(100))))
    writing = asyncio.create_task(Writer(store, buffer=buffer, clock=clock, telemetry=telemetry, instance="test").run())
    async with asyncio.timeout(HANG_SECONDS):
        await buffer.wait_until_empty()
    writing.cancel()
    await asyncio.gather(writing, return_exceptions=True)
    await store.close()
    assert clock.monotonic() == began  # no wait before the retry
    assert (telemetry.counts.write_failures, telemetry.counts.ticks_recovered) == (1, 100)
    assert await query(database, "SELECT count(*) FROM market.ticks") == [(100,)]
    assert await query(database, SUMS) == [(100, 0)]


@pytest.mark.parametrize("level", ["read committed", "serializable"])
async def test_gaps_in_opposite_orders(writer_url: str, database: str, server: TestServer, level: str) -> None:
    """Concurrent backfills and reconciliations of the same gaps, in any order, do not fail."""
    await isolate(server, database, level)
    pieces = [GapSpan(at(minute), at(minute + 1)) for minute in range(0, 40, 2)]
    symbols = [f"{number}.NZ" for number in range(20)]
    listed = [Instrument(symbol, f"Company {symbol}", None, None, active=True) for symbol in symbols]
    bars = [Bar(at(minute), 1.0, 1.0, 1.0, 1.0, 5) for minute in range(100)]

    async def work(gap_store: GapStore, turn: int) -> None:
        """Make all writes of a gap store; every second caller in reverse order."""
        way = slice(None, None, 1 if turn % 2 else -1)
        for _ in range(3):
            await gap_store.store_instruments("nzx", listed[way])
            for piece in pieces[way]:
                await gap_store.begin(piece, symbols[way])
            for symbol in symbols[:4][way]:
                outcomes = [Outcome(piece, "unfillable") for piece in pieces[way]]
                await gap_store.settle(symbol, outcomes, bars[way])
            for piece in await gap_store.given_up(at(0), at(40)):
                await gap_store.ask_again(piece)
            await gap_store.forget_needless()
            found = [Difference(symbol, at(0), bars[0], None) for symbol in symbols[way]]
            await gap_store.store_differences(at(0).date(), symbols[way], found)
            await gap_store.adopt("start")

    async with GapStore(writer_url) as one, GapStore(writer_url) as other, GapStore(writer_url) as third:
        await asyncio.gather(*(work(gap_store, turn) for turn, gap_store in enumerate((one, other, third))))
    assert await query(database, "SELECT count(*) FROM market.instruments") == [(20,)]
